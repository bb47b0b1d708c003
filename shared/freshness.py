"""When a price counts as fresh, and what a reader is told of its age. Pure."""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from shared.market_hours import MarketHours, is_session_bound

PRICE_FRESH_FOR = timedelta(minutes=5)
"""A price that the feed confirmed within this time is `live`; an older one is `stale`."""


class PriceStatus(StrEnum):
    LIVE = "live"
    """Confirmed less than five minutes ago."""
    CLOSED = "closed"
    """The market is closed, and the price was confirmed when it closed or since: it is the session's last."""
    STALE = "stale"
    """Neither: the feed is behind."""


class MarketMoment(NamedTuple):
    """What an instant means for prices: the instants to compare with."""

    fresh_since: datetime
    """What was confirmed later is live."""
    closed_since: datetime | None
    """What is bound to the session and was confirmed later is closed; None while the market is open."""
    next_open: datetime
    next_close: datetime
    """The close of the session under way, else of the next one."""

    @property
    def is_open(self) -> bool:
        return self.closed_since is None


def market_moment(hours: MarketHours, now: datetime) -> MarketMoment:
    """Return what `now` is for equities."""
    last, following = hours.last_session(now), hours.next_session(now)
    is_open = now < last.closes_at
    return MarketMoment(
        fresh_since=now - PRICE_FRESH_FOR,
        closed_since=None if is_open else last.closes_at - PRICE_FRESH_FOR,
        next_open=following.opens_at,
        next_close=(last if is_open else following).closes_at,
    )


def price_status(symbol: str, feed: str, confirmed_at: datetime, moment: MarketMoment) -> PriceStatus:
    """Return the status of a price that was confirmed at `confirmed_at` (`asset_prices.updated_at`).

    The gateway's statement of the current portfolio has the same rule in SQL.
    """
    if moment.closed_since is not None and is_session_bound(symbol, feed):
        return PriceStatus.CLOSED if confirmed_at > moment.closed_since else PriceStatus.STALE
    return PriceStatus.LIVE if confirmed_at > moment.fresh_since else PriceStatus.STALE


def is_price_fresh(confirmed_at: datetime, now: datetime) -> bool:
    """Tell whether a price confirmed at `confirmed_at` (`asset_prices.updated_at`) is fresh at `now`."""
    return now - confirmed_at < PRICE_FRESH_FOR
