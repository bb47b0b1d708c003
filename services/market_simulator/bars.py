"""Series of bars over a market, and Alpaca's way of paging through those of several symbols. Pure.

A bar is made of the whole minutes that have ended, so the bar of the current hour or day is there and grows.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import tzinfo
from itertools import islice

from services.market_simulator.instants import MINUTE_NS, ns_of_text, rfc3339
from services.market_simulator.market import Bar, Market
from services.market_simulator.timeframes import Timeframe, timeframe_of


@dataclass(frozen=True, slots=True)
class Span:
    """Which bars of a symbol: those that start from `first_ns` to `last_ns` (both inclusive), known at `now_ns`."""

    timeframe: Timeframe
    zone: tzinfo
    first_ns: int
    last_ns: int
    now_ns: int
    descending: bool = False


def bars(market: Market, symbol: str, span: Span) -> Iterator[Bar]:
    """Yield a symbol's bars in the order asked for; the time each takes is bounded, their number by the span."""
    known_ns = span.now_ns // MINUTE_NS * MINUTE_NS
    if span.descending:
        cursor = min(span.timeframe.bounds(span.last_ns, span.zone)[1], known_ns)
        while (minute := market.previous_minute(symbol, cursor)) is not None:
            start_ns, end_ns = span.timeframe.bounds(minute, span.zone)
            if start_ns < span.first_ns:
                return
            if bar := market.bar(symbol, start_ns, min(end_ns, known_ns)):
                yield bar
            cursor = start_ns
        return
    cursor = span.first_ns
    while (minute := market.next_minute(symbol, cursor)) is not None and minute < known_ns:
        start_ns, end_ns = span.timeframe.bounds(minute, span.zone)
        if start_ns > span.last_ns:
            return
        if start_ns >= span.first_ns and (bar := market.bar(symbol, start_ns, min(end_ns, known_ns))):
            yield bar
        cursor = end_ns


def first_bars(market: Market, symbol: str, span: Span, count: int) -> list[Bar]:
    """Return up to `count` bars of a symbol; of a descending span the latest."""
    return list(islice(bars(market, symbol, span), count))


@dataclass(frozen=True, slots=True)
class PageToken:
    """The last bar of a page; the next page goes on after it. On the wire it is opaque, as Alpaca's."""

    symbol: str
    timeframe: Timeframe
    start_ns: int

    def encoded(self) -> str:
        text = f"{self.symbol}|{self.timeframe.amount}{self.timeframe.unit}|{rfc3339(self.start_ns)}"
        return base64.b64encode(text.encode()).decode()

    @staticmethod
    def decoded(token: str, timeframe: Timeframe) -> "PageToken":
        """Raises ValueError for what is not a token of a request for these bars."""
        try:
            symbol, frame, start = base64.b64decode(token, validate=True).decode().split("|")
            decoded = PageToken(symbol, timeframe_of(frame), ns_of_text(start))
        except (binascii.Error, ValueError):
            raise ValueError("invalid page_token") from None
        if decoded.timeframe != timeframe:
            raise ValueError("page_token is of another timeframe")
        return decoded


def bars_of_all(
    market: Market, symbols: Sequence[str], span: Span, after: PageToken | None
) -> Iterator[tuple[str, Bar]]:
    """Yield the bars of all symbols, symbol after symbol in alphabetical order, from behind `after` on."""
    for symbol in sorted(symbols):
        remaining = span
        if after is not None:
            if symbol < after.symbol:
                continue
            if symbol == after.symbol and span.descending:
                remaining = replace(span, last_ns=min(span.last_ns, after.start_ns - 1))
            elif symbol == after.symbol:
                remaining = replace(span, first_ns=max(span.first_ns, after.start_ns + 1))
        for bar in bars(market, symbol, remaining):
            yield symbol, bar
