// Numbers and times as text. Amounts are US dollars; instants are RFC 3339 text or milliseconds since 1970.

const LOCALE = "en-US";
const MINUS = "\u2212"; // as wide as a plus, so that a change of sign moves nothing

const dollars = new Intl.NumberFormat(LOCALE, { style: "currency", currency: "USD" });
const signedDollars = new Intl.NumberFormat(LOCALE, { style: "currency", currency: "USD", signDisplay: "exceptZero" });
const wholeDollars = new Intl.NumberFormat(LOCALE, { style: "currency", currency: "USD", maximumFractionDigits: 0 });
const compactDollars = new Intl.NumberFormat(LOCALE, {
  style: "currency",
  currency: "USD",
  notation: "compact",
  minimumFractionDigits: 2,
  maximumFractionDigits: 2,
});
const sharePrice = new Intl.NumberFormat(LOCALE, {
  style: "currency",
  currency: "USD",
  minimumFractionDigits: 2,
  maximumFractionDigits: 4,
});
const shares = [9, 6, 3].map((digits) => new Intl.NumberFormat(LOCALE, { maximumFractionDigits: digits }));
const compactPercent = new Intl.NumberFormat(LOCALE, {
  notation: "compact",
  maximumFractionDigits: 1,
  signDisplay: "exceptZero",
});
const signedPercent = new Intl.NumberFormat(LOCALE, {
  minimumFractionDigits: 2,
  maximumFractionDigits: 2,
  signDisplay: "exceptZero",
});
const clockTime = new Intl.DateTimeFormat(LOCALE, { hour: "numeric", minute: "2-digit" });
const clockTimeWithSeconds = new Intl.DateTimeFormat(LOCALE, {
  hour: "numeric",
  minute: "2-digit",
  second: "2-digit",
});
const zonedTime = new Intl.DateTimeFormat(LOCALE, { hour: "numeric", minute: "2-digit", timeZoneName: "short" });
const weekday = new Intl.DateTimeFormat(LOCALE, { weekday: "short", month: "short", day: "numeric" });

const typographic = (text) => text.replace("-", MINUS);

export const amount = (value) => typographic(dollars.format(value));
export const signedAmount = (value) => typographic(signedDollars.format(value));
export const wholeAmount = (value) => typographic(wholeDollars.format(value));
export const price = (value) => (value < 1000 ? sharePrice : dollars).format(value);
export const percent = (value) =>
  `${typographic((Math.abs(value) < 1e5 ? signedPercent : compactPercent).format(value))}%`;

/** Return a number of shares, with fewer decimals the more there are. */
export const quantity = (value) => shares[value < 1 ? 0 : value < 1000 ? 1 : 2].format(value);

/** Return the amount in its two parts, `$1,234` and `.56`. */
export function amountParts(value) {
  const text = amount(value);
  return [text.slice(0, -3), text.slice(-3)];
}

/** Return a label for the scale of a chart that spans `range` dollars. */
export function scaleAmount(value, range) {
  if (Math.abs(value) >= 1e7) return typographic(compactDollars.format(value));
  return range < 20 ? amount(value) : wholeAmount(value);
}

/** Return `up`, `down` or `flat`: how a signed value is shown beside its sign. */
export const direction = (value) => (value > 0 ? "up" : value < 0 ? "down" : "flat");

/** Return how old something is, in steps that do not flicker. */
export function age(instant, now) {
  const seconds = Math.max(0, (now - Date.parse(instant)) / 1000);
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds / 5) * 5} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} days ago`;
}

export const time = (instant) => clockTime.format(new Date(instant));
export const timeWithSeconds = (instant) => clockTimeWithSeconds.format(new Date(instant));

/** Return an instant in the viewer's zone, with the day unless it is today. */
export function moment(instant, now) {
  const at = new Date(instant);
  const clock = zonedTime.format(at);
  return at.toDateString() === new Date(now).toDateString() ? clock : `${weekday.format(at)}, ${clock}`;
}
