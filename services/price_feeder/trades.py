"""Alpaca's latest trades, judged one by one: a `LastTrade`, or the reason why not. Pure."""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from services.price_feeder.conditions import CLOSING_PRINT
from services.price_feeder.conflation import StreamedTrade
from shared.messages import AssetClass, asset_class
from shared.money import PRICE_PLACES, rounded

FUTURE_MAX = timedelta(minutes=5)
"""How far a trade's time may be ahead of our clock."""

EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
"""An earlier trade is an unset time of the sender."""

PRICE_LIMIT = Decimal(10) ** 11
"""The first price that NUMERIC(15,4) cannot hold."""

_EQUITY = re.compile(r"[A-Z0-9]+([.-][A-Z0-9]+)*", re.ASCII)
_CRYPTO = re.compile(r"[A-Z0-9]+/(?P<quoted_in>[A-Z0-9]+)", re.ASCII)
_DOLLARS = ("USD", "USDC", "USDT")
_INSTANT_LENGTH_MAX = 40
_EPOCH = EARLIEST


class Rejection(StrEnum):
    """Why a held symbol gets no price in a round."""

    NOT_A_SYMBOL = "not_a_symbol"
    """Neither an equity nor a crypto pair by its form; never asked for."""
    NOT_IN_DOLLARS = "not_in_dollars"
    """A crypto pair quoted in something else; never asked for."""
    REFUSED = "refused"
    """Alpaca called the symbol invalid; asked again after a while."""
    MISSING = "missing"
    """Asked for, and not in the answer: unknown to this feed."""
    NULL = "null"
    MALFORMED = "malformed"
    """Not the fields, types or time that a trade has."""
    WITHDRAWN = "withdrawn"
    """The venue cancelled or corrected the trade."""
    NOT_POSITIVE = "not_positive"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"
    """Rounds to 0.0000."""
    FROM_THE_FUTURE = "from_the_future"
    OLDER = "older"
    """Happened before the trade that the cache has: an answer out of order, or a feed that lags behind the last one."""
    OUTSIDE_SESSION = "outside_session"
    """Happened while the market was closed, and the cache has a price of the session, though it may not be the last."""


@dataclass(frozen=True)
class LastTrade:
    """The most recent trade of a symbol, as a feed reports it; a `PriceTick` once the cache has numbered it."""

    symbol: str
    price: Decimal
    traded_at: datetime
    feed: str
    is_closing_print: bool = False
    """It is a closing auction's, which counts to the session though it is reported after the close."""
    trade_id: object = field(default=None, compare=False)
    """The venue's, where it is known."""


def symbol_problem(symbol: str) -> Rejection | None:
    """Return why Alpaca need not be asked for `symbol`, or None."""
    if asset_class(symbol) is AssetClass.EQUITY:
        return None if _EQUITY.fullmatch(symbol) else Rejection.NOT_A_SYMBOL
    pair = _CRYPTO.fullmatch(symbol)
    if not pair:
        return Rejection.NOT_A_SYMBOL
    return None if pair["quoted_in"] in _DOLLARS else Rejection.NOT_IN_DOLLARS


def last_trade(symbol: str, raw: object, *, feed: str, now: datetime) -> LastTrade | Rejection:
    """Return the trade that Alpaca's JSON object `raw` describes, or what is wrong with it."""
    if not isinstance(raw, dict):
        return Rejection.NULL if raw is None else Rejection.MALFORMED
    if raw.get("u") in ("canceled", "incorrect"):
        return Rejection.WITHDRAWN
    price = _price(raw.get("p"))
    if isinstance(price, Rejection):
        return price
    traded_at = _instant(raw.get("t"), now)
    if isinstance(traded_at, Rejection):
        return traded_at
    conditions = raw.get("c")
    is_closing_print = isinstance(conditions, list) and CLOSING_PRINT in conditions
    return LastTrade(symbol, price, traded_at, feed, is_closing_print, raw.get("i"))


def streamed_last_trade(symbol: str, trade: StreamedTrade) -> LastTrade | Rejection:
    """Return the trade that a stream sent, whose fields are of their types and within their bounds."""
    price = _price(trade.price)
    if isinstance(price, Rejection):
        return price
    traded_at = _EPOCH + timedelta(microseconds=trade.traded_at_ns // 1000)
    return LastTrade(symbol, price, traded_at, trade.feed, trade.is_closing_print, trade.trade_id)


def withdrawn_price(raw: float) -> Decimal | None:
    """Return the price of a withdrawn trade as the cache would have it."""
    price = _price(raw)
    return None if isinstance(price, Rejection) else price


def _price(raw: object) -> Decimal | Rejection:
    if raw is None:
        return Rejection.NULL
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or raw != raw:  # noqa: PLR0124  # NaN
        return Rejection.MALFORMED
    if raw <= 0:
        return Rejection.NOT_POSITIVE
    if raw >= PRICE_LIMIT:  # infinity too, which is how 1e400 arrives
        return Rejection.TOO_LARGE
    price = rounded(Decimal(str(raw)), PRICE_PLACES)
    if price >= PRICE_LIMIT:
        return Rejection.TOO_LARGE
    return price if price > 0 else Rejection.TOO_SMALL


def _instant(raw: object, now: datetime) -> datetime | Rejection:
    """Read an RFC 3339 instant; digits beyond microseconds are cut, not rounded, so that none moves ahead."""
    if not isinstance(raw, str) or len(raw) > _INSTANT_LENGTH_MAX:
        return Rejection.MALFORMED
    try:
        instant = datetime.fromisoformat(raw)
        if instant.tzinfo is None or instant < EARLIEST:
            return Rejection.MALFORMED
        return instant.astimezone(UTC) if instant <= now + FUTURE_MAX else Rejection.FROM_THE_FUTURE
    except (ValueError, OverflowError):
        return Rejection.MALFORMED
