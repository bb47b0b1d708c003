// The chart of the total value, drawn by TradingView's lightweight-charts.

import { scaleAmount } from "/page/format.js";

const BUCKET_SECONDS = { "1D": 300, "1W": 1800, "1M": 3600, "3M": 10800, YTD: 86400, ALL: 86400 };
const SCALE_WIDTH = 76;
const DAILY = ["YTD", "ALL"];

const inUtc = (options) => new Intl.DateTimeFormat("en-US", { timeZone: "UTC", ...options });
const YEAR = inUtc({ year: "numeric" });
const MONTH = inUtc({ month: "short" });
const DAY = inUtc({ month: "short", day: "numeric" });
const TIME = inUtc({ hour: "numeric", minute: "2-digit" });
const DATE = inUtc({ weekday: "short", month: "short", day: "numeric", year: "numeric" });
const MOMENT = inUtc({ weekday: "short", month: "short", day: "numeric", hour: "numeric", minute: "2-digit" });
const TICK_FORMATS = [YEAR, MONTH, DAY, TIME, TIME]; // by the library's TickMarkType

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Return the market date that begins at an instant, as midnight in UTC: that of the midnight nearest to it. */
const dateAt = (seconds) => Math.round(seconds / 86400) * 86400;

/**
 * Return the series that is drawn: the points, and the live value as the last one.
 *
 * The library knows no time zones: it is given the viewer's wall clock as if it were UTC, and dates as they are. An hour
 * that comes twice, when summer time ends, is drawn as moments that follow one another.
 */
export function series(performance, liveValue, nowMs) {
  const daily = DAILY.includes(performance.timeframe);
  const width = BUCKET_SECONDS[performance.timeframe];
  const points = performance.data_points.map((point) => ({
    at: Date.parse(point.timestamp) / 1000,
    value: point.value,
  }));
  if (points.length > 0) {
    const last = points.at(-1);
    const buckets = Math.max(0, Math.floor((nowMs / 1000 - last.at) / width));
    if (buckets === 0) last.value = liveValue;
    else points.push({ at: last.at + buckets * width, value: liveValue });
  }
  let previous = Number.NEGATIVE_INFINITY;
  return points.map(({ at, value }) => {
    const shown = daily ? dateAt(at) : at - new Date(at * 1000).getTimezoneOffset() * 60;
    previous = Math.max(shown, previous + 1);
    return { time: previous, value };
  });
}

/** Return a drawing in `container`; raises when the library cannot be loaded. `onPoint` hears what is pointed at. */
export async function draw(container, onPoint) {
  const library = await import("/page/lightweight-charts.js");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let range = 0;
  let daily = false;
  let last = null;

  const chart = library.createChart(container, {
    autoSize: true,
    // Its logo brings a style element along, which the page's policy forbids: the attribution stands below the chart.
    layout: { attributionLogo: false, fontSize: 12, background: { color: "transparent" } },
    handleScroll: false,
    handleScale: false,
    grid: { vertLines: { visible: false } },
    rightPriceScale: { borderVisible: false, minimumWidth: SCALE_WIDTH, entireTextOnly: true, scaleMargins: { top: 0.08, bottom: 0.06 } },
    timeScale: {
      borderVisible: false,
      timeVisible: true,
      fixLeftEdge: true,
      fixRightEdge: true,
      tickMarkFormatter: (time, type) => (TICK_FORMATS[type] || TIME).format(time * 1000),
    },
    localization: { priceFormatter: (value) => scaleAmount(value, range) },
    crosshair: { horzLine: { visible: false, labelVisible: false }, vertLine: { labelVisible: false, width: 1 } },
  });
  const area = chart.addSeries(library.AreaSeries, {
    lineWidth: 2,
    priceLineVisible: false,
    crosshairMarkerRadius: 5,
    lastPriceAnimation: calm.matches
      ? library.LastPriceAnimationMode.Disabled
      : library.LastPriceAnimationMode.OnDataUpdate,
  });
  const start = area.createPriceLine({ price: 0, lineWidth: 1, lineStyle: library.LineStyle.Dotted, axisLabelVisible: false });

  function paint() {
    const [accent, muted, line] = ["--accent", "--muted", "--line"].map(style);
    chart.applyOptions({
      layout: { textColor: muted, fontFamily: getComputedStyle(container).fontFamily },
      grid: { horzLines: { color: line } },
      crosshair: { vertLine: { color: muted } },
    });
    area.applyOptions({
      lineColor: accent,
      topColor: style("--area-top"),
      bottomColor: style("--area-bottom"),
      priceLineColor: accent,
    });
    start.applyOptions({ color: muted });
  }
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  chart.subscribeCrosshairMove(({ time, seriesData }) => {
    const point = time === undefined ? undefined : seriesData.get(area);
    onPoint(point ? { when: (daily ? DATE : MOMENT).format(time * 1000), value: point.value } : null);
  });

  return {
    show(points, timeframe, startValue) {
      daily = DAILY.includes(timeframe);
      const values = points.map((point) => point.value);
      range = Math.max(...values) - Math.min(...values);
      area.setData(points);
      start.applyOptions({ price: startValue ?? 0, lineVisible: startValue !== null });
      last = points.at(-1) ?? null;
      chart.timeScale().fitContent();
    },
    /** Move the live point, or begin the next one. */
    update(point) {
      if (last === null || point.time < last.time) return;
      if (point.time === last.time && point.value === last.value) return;
      area.update(point);
      if (point.time > last.time) chart.timeScale().fitContent();
      last = point;
    },
  };
}
