"""One slot of all users: a loop over users, ours, and the limit (ready rows into the same tables)."""

import time
from datetime import UTC, datetime, timedelta
from statistics import median

from bench.data import TIMEOUT_SECONDS, USERS
from bench.figures import Figure
from services.snapshotter import queries
from shared import database as databases
from shared.database import Database

RUNS = 5
LOOPED_USERS = 500
SECONDS_MAX = 2.0
_FIRST_SLOT = datetime(2030, 1, 1, tzinfo=UTC)

_READY_ROWS = (
    "CREATE TEMPORARY TABLE ready_portfolios AS SELECT * FROM portfolio_snapshots WHERE timestamp = $1",
    "CREATE TEMPORARY TABLE ready_positions AS SELECT * FROM position_snapshots WHERE timestamp = $1",
)
_COPY_READY_ROWS = """
WITH portfolios AS (
    INSERT INTO portfolio_snapshots
        (user_id, timestamp, total_value, cash_balance, investment_value, unpriced_positions, simulated)
    SELECT user_id, $1, total_value, cash_balance, investment_value, unpriced_positions, simulated
    FROM ready_portfolios
)
INSERT INTO position_snapshots
    (portfolio_snapshot_id, timestamp, ticker, shares, cost_basis, current_value, price_per_share)
SELECT portfolio_snapshot_id, $1, ticker, shares, cost_basis, current_value, price_per_share
FROM ready_positions
"""


async def measure(database_url: str) -> list[Figure]:
    async with databases.connect(
        database_url,
        application_name="bench",
        connections_max=1,
        server_settings=queries.SERVER_SETTINGS,
    ) as database:
        ours, limit = [], []
        for run in range(RUNS):
            ours.append(await _ours(database, _FIRST_SLOT + timedelta(hours=run)))
        for statement in _READY_ROWS:
            await database.fetch(
                statement.replace("$1", f"'{_FIRST_SLOT.isoformat()}'"), timeout=TIMEOUT_SECONDS
            )
        for run in range(RUNS):
            limit.append(await _ready_rows(database, _FIRST_SLOT + timedelta(days=1, hours=run)))
        looped = await _loop(database, _FIRST_SLOT + timedelta(days=2))
    seconds, limit_seconds = median(ours), median(limit)
    return [
        Figure(
            f"snapshot of {USERS:,} users x 10 positions",
            f"{seconds:.2f} s",
            f"< {SECONDS_MAX:g} s",
            seconds < SECONDS_MAX,
        ),
        Figure(
            "  against a loop over users (asyncpg)",
            f"{looped / seconds:.1f} times faster",
            "> 5 times",
            looped / seconds > 5,
        ),
        Figure(
            "  against INSERT ... SELECT of ready rows",
            f"{limit_seconds / seconds:.2f} of the limit",
            ">= 0.3",
            limit_seconds / seconds >= 0.3,
        ),
    ]


async def _ours(database: Database, at: datetime) -> float:
    began = time.perf_counter()
    taken = await queries.take_snapshots(database, at, 0, 1)
    seconds = time.perf_counter() - began
    assert taken.added == USERS
    return seconds


async def _ready_rows(database: Database, at: datetime) -> float:
    began = time.perf_counter()
    await database.fetch(_COPY_READY_ROWS, at, timeout=TIMEOUT_SECONDS)
    return time.perf_counter() - began


async def _loop(database: Database, at: datetime) -> float:
    """A transaction for each user, with the arithmetic in Python; scaled up from a part of the users."""
    users = await database.fetch(
        "SELECT id, cash_balance FROM users WHERE is_active ORDER BY id LIMIT $1", LOOPED_USERS
    )
    began = time.perf_counter()
    for user in users:
        async with database.transaction() as connection:
            positions = await connection.fetch(
                "SELECT ticker, shares, cost_basis FROM positions WHERE user_id = $1 AND shares > 0",
                user["id"],
            )
            priced = await connection.fetch(
                "SELECT symbol, price FROM asset_prices WHERE symbol = ANY($1)",
                [position["ticker"] for position in positions],
            )
            prices = {row["symbol"]: row["price"] for row in priced}
            values = {p["ticker"]: round(p["shares"] * prices[p["ticker"]], 2) for p in positions}
            invested = sum(values.values())
            snapshot_id = await connection.fetchval(
                """
                INSERT INTO portfolio_snapshots
                    (user_id, timestamp, total_value, cash_balance, investment_value)
                VALUES ($1, $2, $3, $4, $5) RETURNING id
                """,
                *(user["id"], at, user["cash_balance"] + invested, user["cash_balance"], invested),
            )
            await connection.executemany(
                """
                INSERT INTO position_snapshots (portfolio_snapshot_id, timestamp, ticker, shares, cost_basis,
                    current_value, price_per_share) VALUES ($1, $2, $3, $4, $5, $6, $7)
                """,
                [
                    (
                        snapshot_id,
                        at,
                        p["ticker"],
                        p["shares"],
                        p["cost_basis"],
                        values[p["ticker"]],
                        prices[p["ticker"]],
                    )
                    for p in positions
                ],
            )
    return (time.perf_counter() - began) * USERS / LOOPED_USERS
