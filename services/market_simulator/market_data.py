"""The answers of Alpaca's market-data host, for stocks and crypto."""

import asyncio
from collections.abc import Mapping

from services.market_simulator.access import Refused
from services.market_simulator.bars import PageToken, Span, bars_of_all, first_bars
from services.market_simulator.questions import STOCKS, Question, bars_question
from services.market_simulator.simulator import Simulator
from services.market_simulator.timeframes import DAY, MINUTE, Timeframe
from services.market_simulator.wire import Json

_BARS_AT_ONCE = 10  # then other requests get their turn


def latest_trade(simulator: Simulator, asked: Question, symbol: str) -> Json | None:
    trade = simulator.tape.latest(symbol, asked.now_ns)
    return asked.venue.trade(symbol, trade, asked.feed) if trade else None


def latest_quote(simulator: Simulator, asked: Question, symbol: str) -> Json | None:
    trade = simulator.tape.latest(symbol, asked.now_ns)
    return asked.venue.quote(symbol, trade, asked.feed) if trade else None


def latest_bar(simulator: Simulator, asked: Question, symbol: str) -> Json | None:
    latest = first_bars(simulator.market, symbol, _until(asked, MINUTE), 1)
    return asked.venue.bar(latest[0]) if latest else None


def snapshot(simulator: Simulator, asked: Question, symbol: str) -> Json | None:
    """Return what is known of a symbol; None when nothing is."""
    days = first_bars(simulator.market, symbol, _until(asked, DAY), 2)
    parts = {
        "latestTrade": latest_trade(simulator, asked, symbol),
        "latestQuote": latest_quote(simulator, asked, symbol),
        "minuteBar": latest_bar(simulator, asked, symbol),
        "dailyBar": asked.venue.bar(days[0]) if days else None,
        "prevDailyBar": asked.venue.bar(days[1]) if len(days) == 2 else None,
    }
    return {name: part for name, part in parts.items() if part is not None} or None


LATEST = {"trade": latest_trade, "quote": latest_quote, "bar": latest_bar, "snapshot": snapshot}


def latest_of_all(simulator: Simulator, asked: Question, what: str) -> Json:
    """Answer for several symbols; those without an answer are absent, as at Alpaca."""
    answer = LATEST[what]
    found = {symbol: answer(simulator, asked, symbol) for symbol in asked.symbols}
    entries = {symbol: entry for symbol, entry in found.items() if entry is not None}
    return entries if what == "snapshot" and asked.venue is STOCKS else {f"{what}s": entries}


def latest_of_one(simulator: Simulator, asked: Question, what: str) -> Json:
    """Answer for the stock in the path; raises Refused 404 when there is nothing."""
    symbol = asked.symbols[0]
    entry = LATEST[what](simulator, asked, symbol)
    if entry is None:
        raise Refused(404, f"no {what} found for {symbol}")
    return {"symbol": symbol} | (entry if what == "snapshot" else {what: entry})


def _until(asked: Question, timeframe: Timeframe) -> Span:
    """Return the span of all bars that are known, the latest first."""
    return Span(timeframe, asked.venue.day_zone, 0, asked.now_ns, asked.now_ns, descending=True)


async def bars(simulator: Simulator, asked: Question, query: Mapping[str, str], *, single: bool) -> Json:
    """Answer with one page of bars; the limit counts the bars of all symbols together."""
    wanted = bars_question(asked, query)
    page: dict[str, list[Json]] = {}
    last: PageToken | None = None
    token: str | None = None
    found = bars_of_all(simulator.market, asked.symbols, wanted.span, wanted.after)
    for count, (symbol, bar) in enumerate(found):
        if count == wanted.limit:
            assert last is not None
            token = last.encoded()
            break
        page.setdefault(symbol, []).append(asked.venue.bar(bar))
        last = PageToken(symbol, wanted.span.timeframe, bar.start_ns)
        if count % _BARS_AT_ONCE == _BARS_AT_ONCE - 1:
            await asyncio.sleep(0)
    if single:
        symbol = asked.symbols[0]
        return {"symbol": symbol, "bars": page.get(symbol, []), "next_page_token": token}
    return {"bars": page, "next_page_token": token}
