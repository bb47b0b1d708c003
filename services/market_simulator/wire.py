"""The JSON shapes of Alpaca's protocol: short keys, numbers as numbers, nanosecond timestamps. Pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from services.market_simulator.instants import rfc3339, rfc3339_in
from services.market_simulator.listings import tape_of
from services.market_simulator.market import Bar, Trade
from services.market_simulator.sessions import Session, next_session, session, settlement_day
from shared.market_hours import NEW_YORK

Json = dict[str, Any]

_CENT = Decimal("0.01")
_SPREAD = Decimal("0.0001")
_UINT32_MAX = 2**32 - 1


def number(value: Decimal) -> int | float:
    """Return a decimal for JSON; its shortest text is the decimal's own up to 15 digits."""
    return int(value) if value == value.to_integral_value() else float(value)


def stock_trade(symbol: str, trade: Trade, feed: str) -> Json:
    return {
        "t": rfc3339(trade.at_ns),
        "x": "V" if feed == "iex" else trade.exchange,
        "p": number(trade.price),
        "s": _whole(trade.size),
        "c": list(trade.conditions),
        "i": trade.id,
        "z": tape_of(symbol),
    }


def crypto_trade(trade: Trade) -> Json:
    return {
        "t": rfc3339(trade.at_ns),
        "p": number(trade.price),
        "s": number(trade.size),
        "i": trade.id,
        "tks": "B" if trade.id % 2 else "S",
    }


def stock_quote(symbol: str, trade: Trade, feed: str) -> Json:
    """Return a quote around the last trade: no source has quotes of its own."""
    bid, ask = _quote(trade)
    exchange = "V" if feed == "iex" else trade.exchange
    return {
        "t": rfc3339(trade.at_ns),
        "ax": exchange,
        "ap": number(ask),
        "as": 100,
        "bx": exchange,
        "bp": number(bid),
        "bs": 100,
        "c": ["R"],
        "z": tape_of(symbol),
    }


def crypto_quote(trade: Trade) -> Json:
    bid, ask = _quote(trade)
    size = number(trade.size)
    return {"t": rfc3339(trade.at_ns), "bp": number(bid), "bs": size, "ap": number(ask), "as": size}


def stock_bar(bar: Bar) -> Json:
    return crypto_bar(bar) | {"v": int(bar.volume)}


def crypto_bar(bar: Bar) -> Json:
    return {
        "t": rfc3339(bar.start_ns),
        "o": number(bar.open),
        "h": number(bar.high),
        "l": number(bar.low),
        "c": number(bar.close),
        "v": number(bar.volume),
        "n": bar.trades,
        "vw": number(bar.vwap),
    }


def market_clock(now_ns: int, now: datetime) -> Json:
    """Return the trading host's clock; the instants are written in New York's time."""
    today = session(now.astimezone(NEW_YORK).date())
    following = next_session(now.astimezone(NEW_YORK).date())
    next_open = today if today and now_ns < today.open_ns else following
    next_close = today if today and now_ns < today.close_ns else following
    return {
        "timestamp": rfc3339_in(now_ns, NEW_YORK),
        "is_open": today is not None and today.open_ns <= now_ns < today.close_ns,
        "next_open": rfc3339_in(next_open.open_ns, NEW_YORK),
        "next_close": rfc3339_in(next_close.close_ns, NEW_YORK),
    }


def calendar_days(days: Sequence[Session]) -> list[Json]:
    """Return the trading host's calendar; an early close ends the late session early too."""
    return [
        {
            "date": one.day.isoformat(),
            "open": one.open.strftime("%H:%M"),
            "close": one.close.strftime("%H:%M"),
            "session_open": "0400",
            "session_close": _late_close(one),
            "settlement_date": settlement_day(one.day).isoformat(),
        }
        for one in days
    ]


def _late_close(one: Session) -> str:
    return (datetime.combine(one.day, one.close) + timedelta(hours=4)).strftime("%H%M")


def _quote(trade: Trade) -> tuple[Decimal, Decimal]:
    half = max(_CENT, (trade.price * _SPREAD).quantize(_CENT))
    return max(trade.price - half, Decimal(0)), trade.price + half


def _whole(size: Decimal) -> int:
    return max(1, min(int(size), _UINT32_MAX))
