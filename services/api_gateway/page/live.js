// Keeps the portfolio live: a stream with a ticket, a new one when it breaks, and asking by turns where none is offered.

import { Problem, hearClock, isReachable } from "/page/api.js";

const MUTE_MS = 40_000; // a heartbeat comes every 15 s
const POLL_MS = 10_000;
const STREAM_AGAIN_MS = 60_000;
const HIDDEN_MS = 5 * 60_000;
const RETRY_FIRST_MS = 1000;
const RETRY_MAX_MS = 30_000;
const UNOPENED_MAX = 3;

/**
 * Follow the portfolio until `close()` is called on what is returned.
 *
 * `onState` hears `{name, retryAt}`; name is connecting, live, reconnecting, offline, polling or paused.
 * `onRefused` hears why the session is over; nothing is tried after it.
 */
export function follow(calls, { onPortfolio, onChange, onHeartbeat, onState, onRefused }) {
  let attempt = 0; // since something last arrived
  let unopened = 0; // tickets in a row that opened no stream
  let streamAgainAt = 0; // while polling
  let lastEventId = "";
  let source = null;
  let timer = 0; // the next attempt, or the end of patience with a mute stream
  let hiddenTimer = 0;
  let state = "";
  let turn = 0; // what was begun in an earlier turn has no say any more

  const enter = (name, retryAt = null) => {
    state = name;
    onState({ name, retryAt });
  };

  function drop() {
    turn += 1;
    clearTimeout(timer);
    source?.close();
    source = null;
  }

  function close() {
    drop();
    clearTimeout(hiddenTimer);
    listeners.abort();
  }

  function refuse(reason) {
    close();
    onRefused(reason);
  }

  function wait(delayMs, next) {
    clearTimeout(timer);
    timer = setTimeout(next, delayMs);
  }

  /** Try again later: each time later, and never all clients at once. */
  function retry(delayMinMs = 0) {
    drop();
    attempt += 1;
    const backoffMs = Math.min(RETRY_MAX_MS, RETRY_FIRST_MS * 2 ** (attempt - 1));
    const delayMs = Math.max(delayMinMs, backoffMs * (0.5 + Math.random() / 2));
    enter(navigator.onLine ? "reconnecting" : "offline", Date.now() + delayMs);
    wait(delayMs, connect);
  }

  async function connect() {
    drop();
    const mine = turn;
    if (state !== "polling") enter("connecting");
    let ticket;
    try {
      ticket = await calls.ticket();
    } catch (error) {
      if (mine !== turn) return;
      if (error instanceof Problem && error.endsSession) refuse(error);
      else if (error instanceof Problem && [404, 405, 501, 503].includes(error.status)) poll();
      else retry((error.retryAfterSeconds || 0) * 1000);
      return;
    }
    if (mine === turn) open(ticket);
  }

  function open(ticket) {
    const query = new URLSearchParams({ ticket });
    if (lastEventId) query.set("last_event_id", lastEventId);
    const opened = new EventSource(`/api/portfolio/stream?${query}`);
    source = opened;
    const hear = (name, listener) =>
      opened.addEventListener(name, (event) => {
        if (source !== opened) return;
        wait(MUTE_MS, retry);
        attempt = 0;
        unopened = 0;
        if (event.lastEventId) lastEventId = event.lastEventId;
        if (state !== "live") enter("live");
        listener(event.data ? JSON.parse(event.data) : null);
      });
    wait(MUTE_MS, retry);
    hear("open", () => {});
    hear("portfolio", onPortfolio);
    hear("change", onChange);
    hear("heartbeat", (beat) => {
      hearClock(beat.at);
      onHeartbeat(beat);
    });
    hear("end", ({ reason }) => {
      if (reason === "going_away") retry();
      else refuse({ type: reason.replaceAll("_", "-") });
    });
    // The browser would come back by itself, with a ticket that is used up.
    opened.addEventListener("error", () => {
      if (source !== opened) return;
      if (state !== "live") unopened += 1;
      if (unopened >= UNOPENED_MAX) poll();
      else retry();
    });
  }

  function poll() {
    drop();
    unopened = 0;
    lastEventId = ""; // what is polled has no id to go on from
    streamAgainAt = Date.now() + STREAM_AGAIN_MS;
    pollOnce();
  }

  async function pollOnce() {
    const mine = turn;
    try {
      const portfolio = await calls.current();
      if (mine !== turn) return;
      attempt = 0;
      if (state !== "polling") enter("polling");
      onPortfolio(portfolio);
    } catch (error) {
      if (mine !== turn) return;
      if (error instanceof Problem && error.endsSession) refuse(error);
      else retry((error.retryAfterSeconds || 0) * 1000);
      return;
    }
    wait(POLL_MS, Date.now() < streamAgainAt ? pollOnce : connect);
  }

  const listeners = new AbortController();
  const on = (target, name, listener) => target.addEventListener(name, listener, { signal: listeners.signal });
  on(document, "visibilitychange", () => {
    clearTimeout(hiddenTimer);
    if (document.hidden) {
      hiddenTimer = setTimeout(() => {
        drop();
        enter("paused");
      }, HIDDEN_MS);
    } else if (["paused", "reconnecting", "offline"].includes(state)) connect();
  });
  on(window, "online", () => {
    if (["reconnecting", "offline"].includes(state)) connect();
  });
  // The device has lost its network, which a gateway on the same device outlives.
  on(window, "offline", async () => {
    const mine = turn;
    if (!(await isReachable()) && mine === turn) retry();
  });

  connect();
  return { close };
}
