"""When a price counts as fresh."""

from datetime import datetime, timedelta

PRICE_FRESH_FOR = timedelta(minutes=5)
"""A price that the feed confirmed within this time is `live`; an older one is `stale`."""


def is_price_fresh(confirmed_at: datetime, now: datetime) -> bool:
    """Tell whether a price confirmed at `confirmed_at` (`asset_prices.updated_at`) is fresh at `now`."""
    return now - confirmed_at < PRICE_FRESH_FOR
