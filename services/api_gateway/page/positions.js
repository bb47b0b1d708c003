// The rows of positions: made once for each ticker, and from then on changed where something has changed.

import { age, amount, direction, moment, percent, price, quantity, signedAmount } from "/page/format.js";

const COLUMNS = ["ticker", "shares", "price", "value", "gain", "gain-percent", "status"];
const NUMBERS = new Set(["shares", "price", "value", "gain", "gain-percent"]);
const STATUSES = {
  live: { name: "Live", meaning: "The feed confirmed this price within the last five minutes." },
  stale: { name: "Stale", meaning: "The feed has not confirmed this price lately: it is the last one known." },
  closed: { name: "At close", meaning: "The market is closed: this is the session\u2019s last price." },
};
const REASONS = {
  no_price: "The feed has had no price for it yet.",
  value_out_of_range: "Its value would be a trillion dollars or more.",
};
const USUAL_LENGTH_MAX = 14; // of a number, in characters; longer ones are set smaller
const TINT_MS = 900;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function fade(element, property, colour) {
  if (calm.matches || document.hidden) return;
  const from = getComputedStyle(document.documentElement).getPropertyValue(colour).trim();
  element.animate([{ [property]: from, offset: 0 }], { duration: TINT_MS, easing: "ease-out" });
}

/** Tint a cell for a moment, unless the viewer wants no motion. */
export function tint(element, sign) {
  if (sign !== 0) fade(element, "backgroundColor", sign > 0 ? "--tint-up" : "--tint-down");
}

/** Colour a text for a moment: for what changes with every price, and is large. */
export function tintText(element, sign) {
  if (sign !== 0) fade(element, "color", sign > 0 ? "--up" : "--down");
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function newRow(ticker) {
  const row = document.createElement("tr");
  row.setAttribute("role", "row");
  const cells = {};
  for (const column of COLUMNS) {
    const cell = document.createElement(column === "ticker" ? "th" : "td");
    cell.setAttribute("role", column === "ticker" ? "rowheader" : "cell");
    cell.className = NUMBERS.has(column) ? `${column} number` : column;
    const content = document.createElement("span");
    cell.append(content);
    row.append(cell);
    cells[column] = content;
  }
  row.firstElementChild.setAttribute("scope", "row");
  cells.ticker.textContent = ticker;
  cells.ticker.title = ticker;
  const dot = document.createElement("span");
  dot.className = "dot";
  dot.setAttribute("aria-hidden", "true");
  const name = document.createElement("span");
  const when = document.createElement("span");
  when.className = "when";
  cells.status.append(dot, name, when);
  return { row, cells, name, when, position: null };
}

/** Return the table of positions in `body`. */
export function table(body) {
  const rows = new Map();

  function fill(entry, position, now) {
    const { cells } = entry;
    const before = entry.position;
    write(cells.shares, quantity(position.shares));
    write(cells.price, price(position.price_per_share));
    write(cells.value, amount(position.current_value));
    write(cells.gain, signedAmount(position.unrealized_gain_loss));
    write(cells["gain-percent"], percent(position.unrealized_gain_loss_percent));
    cells.shares.title = `${position.shares} shares, cost ${amount(position.cost_basis)}`;
    const long = ["price", "value", "gain"].some((column) => cells[column].textContent.length > USUAL_LENGTH_MAX);
    entry.row.dataset.length = long ? "long" : "usual";
    const sign = direction(position.unrealized_gain_loss);
    cells.gain.dataset.sign = cells["gain-percent"].dataset.sign = sign;
    if (before) {
      tint(cells.price, Math.sign(position.price_per_share - before.price_per_share));
      tint(cells.value, Math.sign(position.current_value - before.current_value));
    }
    const status = STATUSES[position.price_status] ?? { name: position.price_status, meaning: "" };
    entry.row.dataset.status = position.price_status;
    write(entry.name, status.name);
    cells.status.title = status.meaning;
    entry.position = position;
    writeAge(entry, now);
  }

  function writeAge({ position, when }, now) {
    const isOfSession = position.price_status === "closed";
    write(when, isOfSession ? moment(position.price_as_of, now) : age(position.price_as_of, now));
  }

  return {
    /** Show exactly these positions, in their order. */
    show(positions, now) {
      const shown = new Set(positions.map((position) => position.ticker));
      for (const [ticker, { row }] of rows) {
        if (shown.has(ticker)) continue;
        row.remove();
        rows.delete(ticker);
      }
      positions.forEach((position, index) => {
        let entry = rows.get(position.ticker);
        if (!entry) rows.set(position.ticker, (entry = newRow(position.ticker)));
        if (entry.position !== position) fill(entry, position, now);
        if (body.children[index] !== entry.row) body.insertBefore(entry.row, body.children[index] ?? null);
      });
    },
    /** Let the prices grow older. */
    tick(now) {
      for (const entry of rows.values()) writeAge(entry, now);
    },
  };
}

/** Show the positions that are not in the total, each with the reason. */
export function showUnpriced(list, positions) {
  const items = positions.map((position) => {
    const item = document.createElement("li");
    for (const [name, text] of [
      ["ticker", position.ticker],
      ["held", `${quantity(position.shares)} shares, cost ${amount(position.cost_basis)}`],
      ["reason", REASONS[position.reason] ?? "It has no price."],
    ]) {
      const part = document.createElement("span");
      part.className = name;
      part.textContent = text;
      item.append(part);
    }
    return item;
  });
  list.replaceChildren(...items);
}
