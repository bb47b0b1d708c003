// The gateway, asked with a token. Nothing of it is kept here.

const TIMEOUT_MS = 10_000;

/** The gateway refused or failed; `type` is the problem's stable name without its prefix. */
export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(body.detail || body.title || `The gateway answered ${status}.`);
    this.status = status;
    this.type = String(body.type || "").replace("urn:foliotick:problem:", "");
    this.retryAfterSeconds = Number.parseInt(retryAfter, 10) || null;
  }

  /** Whether the token is of no use (any more): another try gives the same. */
  get endsSession() {
    return this.status === 401 || this.status === 403 || this.type === "user-unknown";
  }
}

/** There was no answer at all. */
export class Unreachable extends Error {}

/** How far the gateway's clock is ahead of this device's, in milliseconds; differences of a moment count as none. */
let clockAheadMs = 0;

export function hearClock(instant) {
  const aheadMs = Date.parse(instant) - Date.now();
  if (Number.isFinite(aheadMs)) clockAheadMs = Math.abs(aheadMs) < 3000 ? 0 : aheadMs;
}

/** Return the gateway's time, in milliseconds since 1970. */
export const now = () => Date.now() + clockAheadMs;

async function ask(path, { method = "GET", token } = {}) {
  let response, text;
  try {
    response = await fetch(path, {
      method,
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: AbortSignal.timeout(TIMEOUT_MS),
      cache: method === "GET" ? "default" : "no-store",
    });
    text = await response.text();
  } catch (error) {
    throw new Unreachable("The gateway does not answer.", { cause: error });
  }
  let body = {};
  try {
    body = JSON.parse(text);
  } catch {
    if (response.ok) throw new Unreachable("What answers here is not the gateway.");
  }
  if (!response.ok) throw new Problem(response.status, body, response.headers.get("Retry-After"));
  hearClock(response.headers.get("Date"));
  return body;
}

/** Return what the page is to know before it begins: the token of a local demonstration, and if there are charts. */
export const start = () => ask("/page/start");

export const isReachable = () =>
  fetch("/healthz", { signal: AbortSignal.timeout(3000), cache: "no-store" }).then(
    () => true,
    () => false,
  );

/** Return the calls that a signed-in user makes. */
export function signedIn(token) {
  return {
    current: () => ask("/api/portfolio/current", { token }),
    performance: (timeframe) => ask(`/api/portfolio/performance?timeframe=${timeframe}`, { token }),
    ticket: async () => (await ask("/api/portfolio/stream-tickets", { method: "POST", token })).ticket,
    refreshPrices: () => ask("/api/portfolio/refresh-prices", { method: "POST", token }),
  };
}

/** Return the `sub` that a token claims, for display alone; the gateway is who verifies it. */
export function subjectOf(token) {
  try {
    const payload = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(payload), (character) => character.codePointAt(0));
    return String(JSON.parse(new TextDecoder().decode(bytes)).sub || "");
  } catch {
    return "";
  }
}
