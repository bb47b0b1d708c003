"""The gateway's statement and `shared.freshness` judge every price alike."""

import json
from datetime import datetime, timedelta

import pytest

from services.api_gateway import queries
from shared.database import Database
from shared.freshness import market_moment, price_status
from shared.market_hours import FEEDS_WITHOUT_SESSION, MarketHours
from tests.factories import create_user, set_price

PRICES = {
    "AAPL": "iex",
    "BRK.B": "sip",
    "LATE": "delayed_sip",
    "BTC/USD": "us",
    "ETH/USD": "simulated",
    **{feed.upper(): feed for feed in FEEDS_WITHOUT_SESSION},
}
MICROSECOND = timedelta(microseconds=1)
FIVE_MINUTES = timedelta(minutes=5)


@pytest.mark.parametrize(
    ("now", "close"),
    [
        ("2026-11-27T14:29:59Z", "2026-11-25T21:00Z"),  # about to open
        ("2026-11-27T14:30:00Z", "2026-11-25T21:00Z"),  # just opened
        ("2026-11-27T16:00:00Z", "2026-11-25T21:00Z"),  # open
        ("2026-11-27T18:00:00Z", "2026-11-27T18:00Z"),  # a half day, just closed
        ("2026-11-27T20:00:00Z", "2026-11-27T18:00Z"),  # closed, and on other days open
        ("2026-11-29T12:00:00Z", "2026-11-27T18:00Z"),  # a weekend
        ("2026-03-09T13:30:00Z", "2026-03-06T21:00Z"),  # open, an hour earlier than the Friday before
        ("2026-03-09T20:00:00Z", "2026-03-09T20:00Z"),
    ],
)
async def test_the_statement_and_the_function_agree(database: Database, now: str, close: str) -> None:
    at, closed_at = datetime.fromisoformat(now), datetime.fromisoformat(close)
    moment = market_moment(MarketHours(), at)
    await create_user(database, positions=dict.fromkeys(PRICES, ("1", "1")))
    for symbol, feed in PRICES.items():
        await set_price(database, symbol, "10", feed=feed)
    borders = (at - FIVE_MINUTES, closed_at - FIVE_MINUTES, closed_at, at)
    for confirmed_at in (
        border + off for border in borders for off in (-MICROSECOND, timedelta(0), MICROSECOND)
    ):
        await database.fetch("UPDATE asset_prices SET updated_at = $1", confirmed_at)
        found = await queries.current_portfolio(database, "demo", at, moment)
        assert found is not None
        answer = json.loads(found.answer)
        statuses = {position["ticker"]: position["price_status"] for position in answer["positions"]}
        expected = {
            symbol: price_status(symbol, feed, confirmed_at, moment).value for symbol, feed in PRICES.items()
        }
        assert statuses == expected
        assert answer["price_fresh"] is ("stale" not in expected.values())
