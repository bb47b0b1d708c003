"""The status of a price, against cases that are worked by hand."""

from datetime import datetime, timedelta

import pytest

from shared.freshness import market_moment, price_status
from shared.market_hours import MarketHours


def instant(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}Z")


@pytest.mark.parametrize(
    ("now", "symbol", "feed", "confirmed_at", "status"),
    [
        # in the session: five minutes
        ("2026-11-27T15:00", "IBM", "iex", "2026-11-27T14:55:00.000001", "live"),
        ("2026-11-27T15:00", "IBM", "iex", "2026-11-27T14:55", "stale"),
        # just opened: what was confirmed before the open counts as long as it is young
        ("2026-11-27T14:30", "IBM", "iex", "2026-11-27T14:26", "live"),
        ("2026-11-27T14:30", "IBM", "iex", "2026-11-27T14:25", "stale"),
        ("2026-11-27T14:30", "IBM", "iex", "2026-11-25T21:00", "stale"),
        # the half day is over at 13:00, 18:00 in UTC
        ("2026-11-27T17:59:59", "IBM", "iex", "2026-11-27T17:55", "live"),
        ("2026-11-27T18:00", "IBM", "iex", "2026-11-27T17:55:01", "closed"),
        ("2026-11-27T18:00", "IBM", "iex", "2026-11-27T17:55", "stale"),
        ("2026-11-27T20:59", "IBM", "sip", "2026-11-27T18:00", "closed"),
        # a weekend and a night
        ("2026-11-29T12:00", "BRK.B", "iex", "2026-11-27T18:10", "closed"),
        ("2026-11-29T12:00", "BRK.B", "iex", "2026-11-27T17:50", "stale"),
        ("2026-11-29T12:00", "BRK.B", "iex", "2026-11-29T11:59", "closed"),
        ("2026-12-01T03:00", "IBM", "iex", "2026-11-30T20:56", "closed"),
        # whatever is not bound to the session
        ("2026-11-29T12:00", "BTC/USD", "us", "2026-11-29T11:56", "live"),
        ("2026-11-29T12:00", "BTC/USD", "us", "2026-11-29T11:55", "stale"),
        ("2026-11-29T12:00", "IBM", "simulated", "2026-11-29T11:56", "live"),
        ("2026-11-29T12:00", "IBM", "simulated", "2026-11-27T18:10", "stale"),
        ("2026-11-29T12:00", "IBM", "overnight", "2026-11-29T11:56", "live"),
        ("2026-11-29T12:00", "IBM", "boats", "2026-11-29T11:50", "stale"),
    ],
)
def test_price_status(now: str, symbol: str, feed: str, confirmed_at: str, status: str) -> None:
    moment = market_moment(MarketHours(), instant(now))
    assert price_status(symbol, feed, instant(confirmed_at), moment) == status


@pytest.mark.parametrize(
    ("now", "is_open", "next_open", "next_close"),
    [
        ("2026-11-27T14:29:59", False, "2026-11-27T14:30", "2026-11-27T18:00"),
        ("2026-11-27T14:30", True, "2026-11-30T14:30", "2026-11-27T18:00"),
        ("2026-11-27T18:00", False, "2026-11-30T14:30", "2026-11-30T21:00"),
        ("2026-12-24T18:00", False, "2026-12-28T14:30", "2026-12-28T21:00"),
    ],
)
def test_moment_says_when_the_market_opens_and_closes_next(
    now: str, is_open: bool, next_open: str, next_close: str
) -> None:
    moment = market_moment(MarketHours(), instant(now))
    assert (moment.is_open, moment.next_open, moment.next_close) == (
        is_open,
        instant(next_open),
        instant(next_close),
    )
    assert moment.fresh_since == instant(now) - timedelta(minutes=5)
