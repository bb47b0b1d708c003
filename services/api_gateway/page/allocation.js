// What the total is made of: one bar, and the names of its parts.

const NAMED_MAX = 3; // the largest positions; the rest are one part together

/** Return the parts of a portfolio, `[name, value]`; without tickers to name, those of the largest positions. */
function parts(portfolio, tickers) {
  const values = new Map(portfolio.positions.map((position) => [position.ticker, position.current_value]));
  const named = tickers.filter((ticker) => values.has(ticker)).map((ticker) => [ticker, values.get(ticker)]);
  const others = portfolio.investment_value - named.reduce((sum, [, value]) => sum + value, 0);
  const rest = portfolio.positions.length - named.length;
  return [
    ...named,
    ...(rest > 0 ? [[`${rest} other${rest > 1 ? "s" : ""}`, others]] : []),
    ...(portfolio.cash_balance > 0 ? [["Cash", portfolio.cash_balance]] : []),
  ];
}

const largest = (portfolio) =>
  [...portfolio.positions]
    .sort((one, other) => other.current_value - one.current_value)
    .slice(0, NAMED_MAX)
    .map((position) => position.ticker);

function element(name, className) {
  const made = document.createElement(name);
  made.className = className;
  return made;
}

/** Return the allocation in `card`, which has a bar and a list. */
export function allocation(card) {
  const bar = card.querySelector(".allocation-bar");
  const list = card.querySelector(".allocation-parts");
  let tickers = [];
  let rows = [];

  return {
    /** Decide which positions are named. They stay so while prices move, so that nothing changes places. */
    begin(portfolio) {
      tickers = largest(portfolio);
      rows = parts(portfolio, tickers).map(([name]) => {
        const kind = name === "Cash" ? "cash" : String(tickers.indexOf(name));
        const row = { slice: element("span", "slice"), item: element("li", ""), share: element("span", "share") };
        const title = element("span", "name");
        title.textContent = title.title = name;
        const swatch = element("span", "swatch");
        row.slice.dataset.part = swatch.dataset.part = kind;
        row.item.append(swatch, title, row.share);
        return row;
      });
      bar.replaceChildren(...rows.map((row) => row.slice));
      list.replaceChildren(...rows.map((row) => row.item));
    },
    show(portfolio) {
      const shown = parts(portfolio, tickers);
      const whole = shown.reduce((sum, [, value]) => sum + value, 0);
      card.hidden = whole <= 0 || portfolio.positions.length === 0;
      if (card.hidden) return;
      let start = 0;
      shown.forEach(([, value], index) => {
        const share = value / whole;
        // Transformed and not laid out, so that nothing of the page moves.
        rows[index].slice.style.transform = `translateX(${start * 100}%) scaleX(${share})`;
        const text = `${(share * 100).toFixed(1)}%`;
        if (rows[index].share.textContent !== text) rows[index].share.textContent = text;
        start += share;
      });
    },
  };
}
