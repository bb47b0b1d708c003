"""The demo portfolios' year of history."""

from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal

from local import demo
from services.market_simulator.synthetic import SyntheticMarket
from shared.database import Database

NOW = datetime(2026, 3, 2, 15, 2, 30, tzinfo=UTC)


def test_history_is_dense_where_charts_are_and_reaches_back_a_year() -> None:
    instants = list(demo.history_instants(NOW))
    assert instants == sorted(set(instants))
    assert instants[-1] == datetime(2026, 3, 2, 14, 55, tzinfo=UTC)  # 15:00 is the snapshotter's own slot
    assert NOW - instants[0] > timedelta(days=365)
    assert sum(at > NOW - timedelta(days=1) for at in instants) == 287
    assert len(instants) < 3_000


async def test_history_is_worth_what_the_market_was(database: Database) -> None:
    market = SyntheticMarket(1)
    made = await demo.fill(database, NOW, history=market)
    assert made == 3 * len(list(demo.history_instants(NOW)))
    at = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    # bob holds 18.5 QQQ, 60 JPM and 2,500.00 in cash
    parts = [Decimal("18.5") * market.price("QQQ", at), Decimal("60") * market.price("JPM", at)]
    expected = Decimal("2500.00") + sum(part.quantize(Decimal("0.01"), ROUND_HALF_UP) for part in parts)
    row = await database.fetch_row(
        """
        SELECT total_value, simulated, count(ticker) AS positions, sum(current_value) AS invested
        FROM portfolio_snapshots
        JOIN users ON users.id = user_id
        JOIN position_snapshots USING (user_id, timestamp)
        WHERE subject = 'bob' AND timestamp = $1
        GROUP BY total_value, simulated
        """,
        at,
    )
    assert row is not None
    assert tuple(row) == (expected, True, 2, expected - Decimal("2500.00"))


async def test_a_database_with_users_is_left_as_it_is(database: Database) -> None:
    await demo.fill(database, NOW, history=None)
    assert await database.fetch_value("SELECT count(*) FROM users") == 3
    assert await demo.fill(database, NOW, history=SyntheticMarket(1)) == 0
    assert await database.fetch_value("SELECT count(*) FROM portfolio_snapshots") == 0
