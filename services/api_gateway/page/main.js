// The page: who is signed in, what the portfolio is now, and what of it is on the screen.

import { allocation } from "/page/allocation.js";
import * as api from "/page/api.js";
import * as charts from "/page/chart.js";
import * as format from "/page/format.js";
import { follow } from "/page/live.js";
import { showUnpriced, table, tintText } from "/page/positions.js";

const TOKEN_KEY = "foliotick.token";
const SIGNED_OUT_KEY = "foliotick.signed-out";
const AGES_MS = 5000;
const CHART_AGE_MS = 60_000;
const CHART_RETRY_MS = 10_000;
const PERIODS = {
  "1D": "past 24 hours",
  "1W": "past week",
  "1M": "past month",
  "3M": "past 3 months",
  YTD: "this year",
  ALL: "all time",
};
const CONNECTIONS = {
  none: "",
  connecting: "Connecting",
  live: "Live",
  reconnecting: "Reconnecting",
  offline: "Offline",
  polling: "Updating every 10 s",
  paused: "Paused",
};
const REFUSALS = {
  "token-expired": "Your session has expired. Sign in again with a new token.",
  "user-deactivated": "This user has been deactivated.",
  "user-unknown": "The token is valid, but there is no user with its subject.",
  "token-invalid": "The token is not valid here.",
  "token-malformed": "This is not a token. It has three parts with dots between.",
};
const MISSING_LIBRARY =
  "The chart needs TradingView\u2019s lightweight-charts, which is not installed. Install Node.js with npm and start " +
  "again with `make run`; or run `npm ci` in `services/api_gateway/page` and restart the gateway. Everything else works.";

const $ = (id) => document.getElementById(id);

/** What lives as long as the tab; a browser that keeps nothing for a page signs in anew each time. */
const kept = {
  get(key) {
    try {
      return sessionStorage.getItem(key);
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      if (value === null) sessionStorage.removeItem(key);
      else sessionStorage.setItem(key, value);
    } catch {
      // The tab has it in memory all the same.
    }
  },
};

let demoToken = null;
let hasChartLibrary = true;
let session = null;
let wait = { until: null };

// ---- signing in and out ------------------------------------------------------------------------

function showSignIn(problem = "") {
  $("portfolio").hidden = true;
  $("session").hidden = true;
  $("sign-in").hidden = false;
  $("use-demo").hidden = demoToken === null;
  $("sign-in-problem").textContent = problem;
  $("token").value = "";
  showConnection({ name: "none", retryAt: null });
  $("token").focus();
}

const refusalText = (reason) => REFUSALS[reason.type] ?? reason.message ?? "The session has ended.";

async function signIn(token) {
  const calls = api.signedIn(token);
  $("sign-in-problem").textContent = "";
  $("sign-in-button").disabled = $("use-demo").disabled = true;
  try {
    const portfolio = await calls.current();
    kept.set(SIGNED_OUT_KEY, null);
    kept.set(TOKEN_KEY, token === demoToken ? null : token);
    begin(calls, token, portfolio);
  } catch (error) {
    if (error instanceof api.Problem && error.endsSession) {
      kept.set(TOKEN_KEY, null);
      showSignIn(refusalText(error));
    } else if (!(error instanceof api.Problem || error instanceof api.Unreachable)) throw error;
    else if ($("sign-in").hidden) {
      showConnection({ name: "reconnecting", retryAt: Date.now() + 3000 });
      setTimeout(() => signIn(token), 3000);
    } else $("sign-in-problem").textContent = `${error.message} Try again in a moment.`;
  } finally {
    $("sign-in-button").disabled = $("use-demo").disabled = false;
  }
}

function signOut(problem) {
  session?.end();
  session = null;
  kept.set(TOKEN_KEY, null);
  kept.set(SIGNED_OUT_KEY, "yes");
  showSignIn(problem);
}

// ---- a session ---------------------------------------------------------------------------------

function begin(calls, token, first) {
  session?.end();
  $("sign-in").hidden = true;
  $("portfolio").hidden = false;
  $("session").hidden = false;
  $("who").textContent = api.subjectOf(token);
  $("positions-rows").replaceChildren();
  session = newSession(calls, first);
}

function newSession(calls, first) {
  let portfolio = first;
  let performance = null;
  let performanceAt = Date.now(); // asked for at the beginning
  let timeframe = document.querySelector("#timeframes input:checked").value;
  let asked = 0;
  let drawing = null;
  let frame = 0;
  let chartTimer = 0;
  const rows = table($("positions-rows"));
  const shares = allocation($("allocation"));
  const ended = new AbortController();

  // ---- what is on the screen

  function show() {
    frame = 0;
    const now = api.now();
    showTotal(portfolio.total_value);
    write("invested", format.amount(portfolio.investment_value));
    write("cash", format.amount(portfolio.cash_balance));
    const gains = portfolio.positions.reduce((sum, position) => sum + Math.round(position.unrealized_gain_loss * 100), 0);
    write("gain", format.signedAmount(gains / 100));
    $("gain").dataset.sign = format.direction(gains);
    $("simulated").hidden = !portfolio.simulated;
    rows.show(portfolio.positions, now);
    shares.show(portfolio);
    $("positions").hidden = portfolio.positions.length === 0;
    $("positions-empty").hidden = portfolio.positions.length + portfolio.unpriced.length > 0;
    write("positions-count", portfolio.positions.length ? String(portfolio.positions.length) : "");
    showMarket(portfolio.market, now);
    write("updated", `Last update ${format.timeWithSeconds(portfolio.last_updated)}`);
    showChange();
    moveLivePoint(now);
  }

  function showAll() {
    $("unpriced").hidden = portfolio.unpriced.length === 0;
    write("unpriced-count", String(portfolio.unpriced.length));
    showUnpriced($("unpriced-rows"), portfolio.unpriced);
    shares.begin(portfolio);
    show();
  }

  /** Many changes between two frames are shown once. */
  function showSoon() {
    if (frame === 0) frame = requestAnimationFrame(show);
  }

  function showChange() {
    const element = $("change");
    if (performance === null) return;
    if (performance.start_value === null) {
      write("change", "No history yet");
      element.dataset.sign = "flat";
      return;
    }
    const change = (Math.round(portfolio.total_value * 100) - Math.round(performance.start_value * 100)) / 100;
    const share = performance.start_value === 0 ? 0 : (change / Math.abs(performance.start_value)) * 100;
    write("change-amount", `${format.signedAmount(change)} (${format.percent(share)})`);
    element.dataset.sign = format.direction(change);
  }

  function moveLivePoint(now) {
    if (performance === null) return;
    const points = charts.series(performance, portfolio.total_value, now);
    if (points.length > 0) drawing?.update(points.at(-1));
    showRange(points);
  }

  function showRange(points) {
    if ($("readout").dataset.pointing === "yes") return;
    const values = points.map((point) => point.value);
    write(
      "readout",
      values.length ? `Low ${format.amount(Math.min(...values))}  ·  High ${format.amount(Math.max(...values))}` : "\u00a0",
    );
  }

  // ---- the chart

  function showPerformance() {
    const points = charts.series(performance, portfolio.total_value, api.now());
    write("chart-note", performance.data_points.some((point) => point.partial) ? "Some points lack positions without a price." : "");
    const change = $("change");
    change.replaceChildren(
      Object.assign(document.createElement("span"), { id: "change-amount", className: "amount" }),
      Object.assign(document.createElement("span"), { className: "period", textContent: PERIODS[performance.timeframe] }),
    );
    showChange();
    $("readout").dataset.pointing = "no";
    showRange(points);
    $("chart").setAttribute("aria-label", `Chart of the total value, ${PERIODS[performance.timeframe]}. ${$("readout").textContent}`);
    if (points.length === 0) showChartMessage("No history in this timeframe yet. The first snapshot is taken within minutes.");
    else if (drawing) {
      $("chart-message").hidden = true;
      drawing.show(points, performance.timeframe, performance.start_value);
    }
  }

  async function loadPerformance(wanted = timeframe) {
    const mine = ++asked;
    clearTimeout(chartTimer);
    try {
      const answer = await calls.performance(wanted);
      if (mine !== asked || ended.signal.aborted) return;
      performance = answer;
      performanceAt = Date.now();
      showPerformance();
    } catch (error) {
      if (mine !== asked || ended.signal.aborted) return;
      if (error instanceof api.Problem && error.endsSession) return signOut(refusalText(error));
      if (!(error instanceof api.Problem || error instanceof api.Unreachable)) throw error;
      if (performance?.timeframe !== wanted) showChartMessage(`${error.message} The chart comes as soon as it does.`);
      chartTimer = setTimeout(loadPerformance, CHART_RETRY_MS);
      return;
    }
    chartTimer = setTimeout(loadPerformance, CHART_AGE_MS);
  }

  /** Show a text in the chart's place; what stands between backticks is code. */
  function showChartMessage(text) {
    const parts = text.split("`").map((part, index) => {
      if (index % 2 === 0) return part;
      return Object.assign(document.createElement("code"), { textContent: part });
    });
    $("chart-message").firstElementChild.replaceChildren(...parts);
    $("chart-message").hidden = false;
  }

  async function openChart() {
    $("chart").replaceChildren();
    $("chart-message").hidden = true;
    $("attribution").hidden = !hasChartLibrary;
    if (!hasChartLibrary) return showChartMessage(MISSING_LIBRARY);
    try {
      drawing = await charts.draw($("chart"), (point) => {
        $("readout").dataset.pointing = point ? "yes" : "no";
        if (point) write("readout", `${point.when}  ·  ${format.amount(point.value)}`);
        else if (performance) showRange(charts.series(performance, portfolio.total_value, api.now()));
      });
    } catch {
      return showChartMessage("The chart library could not be loaded. Reload the page to try again.");
    }
    if (performance) showPerformance();
  }

  // ---- what changes it

  const on = (target, name, listener) => target.addEventListener(name, listener, { signal: ended.signal });

  on($("timeframes"), "change", (event) => {
    timeframe = event.target.value;
    loadPerformance();
  });
  on($("refresh"), "click", () => refreshPrices(calls, ended.signal));

  const ages = setInterval(() => rows.tick(api.now()), AGES_MS);
  const live = follow(calls, {
    onPortfolio(whole) {
      portfolio = whole;
      showAll();
      if (Date.now() - performanceAt > CHART_AGE_MS) loadPerformance();
    },
    onChange(change) {
      const changed = new Map(change.positions.map((position) => [position.ticker, position]));
      const positions = portfolio.positions.map((position) => changed.get(position.ticker) ?? position);
      portfolio = { ...portfolio, ...change, positions };
      showSoon();
    },
    onHeartbeat({ last_updated, price_fresh }) {
      portfolio = { ...portfolio, last_updated, price_fresh };
      showSoon();
    },
    onState: showConnection,
    onRefused: (reason) => signOut(refusalText(reason)),
  });

  showAll();
  openChart();
  loadPerformance();

  return {
    end() {
      ended.abort();
      live.close();
      clearInterval(ages);
      clearTimeout(chartTimer);
      cancelAnimationFrame(frame);
      $("chart").replaceChildren();
    },
  };
}

// ---- pieces of the screen ----------------------------------------------------------------------

function write(id, text) {
  const element = $(id);
  if (element && element.textContent !== text) element.textContent = text;
}

let totalShown = null;

function showTotal(value) {
  const [whole, cents] = format.amountParts(value);
  write("total-dollars", whole);
  write("total-cents", cents);
  $("total").dataset.length = whole.length > 15 ? "huge" : whole.length > 11 ? "long" : "usual";
  if (totalShown !== null) tintText($("total-cents"), Math.sign(value - totalShown));
  totalShown = value;
}

function showMarket(market, now) {
  $("market-state").hidden = $("market-next").hidden = !market;
  if (!market) return;
  $("market-state").dataset.open = market.is_open ? "yes" : "no";
  write("market-name", market.is_open ? "Open" : "Closed");
  const next = market.is_open ? market.next_close : market.next_open;
  write("market-next", next ? `${market.is_open ? "Closes" : "Opens"} ${format.moment(next, now)}` : "\u00a0");
}

function showConnection({ name, retryAt }) {
  $("connection").dataset.state = name;
  write("connection-name", CONNECTIONS[name]);
  wait = { until: retryAt };
  countDown();
}

/** The seconds stand beside the status, so that a screen reader hears the status alone. */
function countDown() {
  const seconds = wait.until === null ? 0 : Math.max(0, Math.ceil((wait.until - Date.now()) / 1000));
  write("connection-wait", seconds > 0 ? `in ${seconds} s` : "");
}

async function refreshPrices(calls, ended) {
  const button = $("refresh");
  const say = (text) => write("refresh-outcome", text);
  const rest = (seconds) => setTimeout(() => ((button.disabled = false), say("")), seconds * 1000);
  button.disabled = true;
  say("Asking the feed …");
  try {
    const { confirmed, symbols } = await calls.refreshPrices();
    say(confirmed >= symbols ? "All prices confirmed" : `${confirmed} of ${symbols} confirmed`);
    rest(5);
  } catch (error) {
    if (ended.aborted) return;
    if (error instanceof api.Problem && error.endsSession) return signOut(refusalText(error));
    if (error instanceof api.Problem && error.status === 429) {
      const seconds = error.retryAfterSeconds ?? 30;
      say(`Again in ${seconds} s`);
      rest(seconds);
    } else if (error instanceof api.Problem && [404, 405].includes(error.status)) $("refresh-row").hidden = true;
    else if (error instanceof api.Problem || error instanceof api.Unreachable) {
      say("Not possible now");
      rest(5);
    } else throw error;
  }
}

// ---- the beginning -----------------------------------------------------------------------------

$("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim().replace(/^Bearer\s+/i, "");
  if (/^[\x21-\x7e]+$/.test(token)) signIn(token);
  else $("sign-in-problem").textContent = REFUSALS["token-malformed"];
});
$("use-demo").addEventListener("click", () => signIn(demoToken));
$("sign-out").addEventListener("click", () => signOut(""));
setInterval(countDown, 250);

async function startUp() {
  try {
    const known = await api.start();
    demoToken = known.token;
    hasChartLibrary = known.has_chart_library;
  } catch (error) {
    if (!(error instanceof api.Problem || error instanceof api.Unreachable)) throw error;
  }
  const token = kept.get(TOKEN_KEY) ?? (kept.get(SIGNED_OUT_KEY) ? null : demoToken);
  if (token) await signIn(token);
  else showSignIn();
}

startUp();
