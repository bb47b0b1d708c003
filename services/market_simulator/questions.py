"""Read Alpaca's request parameters; what is wrong with them is a Refused with status 400."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, timedelta, tzinfo
from zoneinfo import ZoneInfo

from services.market_simulator.access import Refused
from services.market_simulator.bars import PageToken, Span
from services.market_simulator.instants import SECOND_NS, datetime_of, local_midnight_ns, ns_of_text
from services.market_simulator.market import Bar, Trade
from services.market_simulator.timeframes import timeframe_of
from services.market_simulator.wire import (
    Json,
    crypto_bar,
    crypto_quote,
    crypto_trade,
    stock_bar,
    stock_quote,
    stock_trade,
)
from shared.market_hours import NEW_YORK

LIMIT_DEFAULT = 1000
LIMIT_MAX = 10_000

FEEDS = {"delayed_sip", "iex", "otc", "sip", "boats", "overnight"}
LOCATIONS = {"us", "us-1", "us-2", "eu-1", "bs-1"}
DELAY_NS = 15 * 60 * SECOND_NS
_YYYY_MM_DD = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True, slots=True)
class Venue:
    """How stocks and crypto differ: symbols, time zones of the days, shapes."""

    symbol: re.Pattern[str]
    day_zone: tzinfo
    date_zone: tzinfo
    key_required: bool
    trade: Callable[[str, Trade, str], Json]
    quote: Callable[[str, Trade, str], Json]
    bar: Callable[[Bar], Json]


STOCKS = Venue(
    symbol=re.compile(r"[A-Z0-9]{1,12}(\.[A-Z0-9]{1,6}){0,2}"),
    day_zone=NEW_YORK,
    date_zone=NEW_YORK,
    key_required=True,
    trade=stock_trade,
    quote=stock_quote,
    bar=stock_bar,
)
CRYPTO = Venue(
    symbol=re.compile(r"[A-Z0-9]{1,12}/[A-Z0-9]{1,12}"),
    day_zone=ZoneInfo("America/Chicago"),  # Alpaca's daily crypto bars begin at midnight there
    date_zone=UTC,
    key_required=False,  # Alpaca's crypto prices are open to everyone
    trade=lambda _symbol, trade, _feed: crypto_trade(trade),
    quote=lambda _symbol, trade, _feed: crypto_quote(trade),
    bar=crypto_bar,
)


@dataclass(frozen=True, slots=True)
class Question:
    """A request for market data, understood: symbols without doubles, the instant that counts as now."""

    venue: Venue
    symbols: tuple[str, ...]
    feed: str
    now_ns: int


@dataclass(frozen=True, slots=True)
class BarsQuestion:
    span: Span
    limit: int
    after: PageToken | None


def asked_symbols(query: Mapping[str, str], path: Mapping[str, str]) -> list[str]:
    """Return the symbols as they were sent, valid or not."""
    return [path["symbol"]] if "symbol" in path else query.get("symbols", "").split(",")


def question(venue: Venue, query: Mapping[str, str], path: Mapping[str, str], now_ns: int) -> Question:
    """Understand the parameters that all endpoints have."""
    location = path.get("loc", "us")
    if location not in LOCATIONS:
        raise Refused(400, f"invalid location: {location}")
    if "symbol" not in path and not query.get("symbols"):
        raise Refused(400, "symbols is required")
    symbols = asked_symbols(query, path)
    for symbol in symbols:
        if not venue.symbol.fullmatch(symbol):
            raise Refused(400, f"invalid symbol: {symbol}")
    feed = query.get("feed", "iex")
    if feed not in FEEDS:
        raise Refused(400, f"invalid feed: {feed}")
    if query.get("currency", "USD") != "USD":
        raise Refused(400, f"invalid currency: {query['currency']}, this market has US dollars only")
    at_ns = now_ns - DELAY_NS if feed == "delayed_sip" else now_ns
    return Question(venue, tuple(dict.fromkeys(symbols)), feed, at_ns)


def bars_question(asked: Question, query: Mapping[str, str]) -> BarsQuestion:
    """Understand the parameters of a request for bars."""
    if "timeframe" not in query:
        raise Refused(400, "timeframe is required")
    try:
        timeframe = timeframe_of(query["timeframe"])
        token = query.get("page_token")
        after = PageToken.decoded(token, timeframe) if token else None
    except ValueError as error:
        raise Refused(400, str(error)) from None
    if after is not None and after.symbol not in asked.symbols:
        raise Refused(400, "invalid page_token")
    sort = query.get("sort", "asc")
    if sort not in {"asc", "desc"}:
        raise Refused(400, f"invalid sort: {sort}")
    first_ns = _start_ns(asked, query.get("start"))
    last_ns = _end_ns(asked, query.get("end"))
    if last_ns < first_ns and "start" in query and "end" in query:
        raise Refused(400, "end should not be before start")
    span = Span(
        timeframe=timeframe,
        zone=asked.venue.day_zone,
        first_ns=first_ns,
        last_ns=min(last_ns, asked.now_ns),
        now_ns=asked.now_ns,
        descending=sort == "desc",
    )
    return BarsQuestion(span, _limit(query.get("limit")), after)


def _limit(text: str | None) -> int:
    if text is None:
        return LIMIT_DEFAULT
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= LIMIT_MAX:
        raise Refused(400, f"invalid limit: {text}, it must be from 1 to {LIMIT_MAX}")
    return int(text)


def _start_ns(asked: Question, text: str | None) -> int:
    if text is None:
        today = datetime_of(asked.now_ns).astimezone(asked.venue.day_zone).date()
        return local_midnight_ns(today, asked.venue.day_zone)
    return _instant_ns("start", text, asked.venue.date_zone, whole_day=False)


def _end_ns(asked: Question, text: str | None) -> int:
    """A date as the end means all of that day."""
    return asked.now_ns if text is None else _instant_ns("end", text, asked.venue.date_zone, whole_day=True)


def _instant_ns(name: str, text: str, zone: tzinfo, *, whole_day: bool) -> int:
    try:
        if not _YYYY_MM_DD.fullmatch(text):
            return ns_of_text(text)
        day = date.fromisoformat(text)
        return (
            local_midnight_ns(day + timedelta(days=1), zone) - 1
            if whole_day
            else local_midnight_ns(day, zone)
        )
    except (ValueError, OverflowError):
        raise Refused(400, f"invalid {name}: {text} is neither RFC 3339 nor YYYY-MM-DD") from None


def day_of(name: str, text: str | None, default: date) -> date:
    """Read a day given as a date or as an instant; Alpaca's calendar takes both."""
    if text is None:
        return default
    try:
        return date.fromisoformat(text[:10]) if _YYYY_MM_DD.fullmatch(text[:10]) else date.fromisoformat("")
    except ValueError:
        raise Refused(400, f"invalid {name}: {text} is not a date") from None
