"""The snapshotter's SQL."""

from dataclasses import dataclass
from datetime import datetime

import asyncpg

from shared.database import Database, DatabaseUnavailable

# For the one large statement: room to sort in memory, and a plan for the very shard.
SERVER_SETTINGS = {"work_mem": "64MB", "plan_cache_mode": "force_custom_plan"}

TAKE_TIMEOUT_SECONDS = 120.0
DELETED_USERS_RETRIES_MAX = 5


@dataclass(frozen=True)
class ShardTaken:
    """What is stored for a shard's slot, and what this call added to it."""

    portfolios: int
    positions: int
    unpriced: int
    added: int
    """Portfolios that had no snapshot of the slot before this call."""


# One statement values and stores everything from one view of the data: parent rows, details and counts agree.
# A portfolio that has its snapshot already is left as it is, which makes every delivery after the first harmless.
# `$3 = 1 OR` lets the planner see that a single shard is everybody: it thinks little of a modulus.
TAKE_SNAPSHOTS = """
WITH taken AS (
    INSERT INTO portfolio_snapshots
        (user_id, timestamp, total_value, cash_balance, investment_value, unpriced_positions, simulated)
    SELECT user_id, $1, total_value, cash_balance, investment_value, unpriced_positions, simulated
    FROM portfolio_valuations
    WHERE is_active AND ($3 = 1 OR user_id % $3 = $2)
    ORDER BY user_id
    ON CONFLICT (user_id, timestamp) DO NOTHING
    RETURNING id, user_id, unpriced_positions
),
detailed AS (
    INSERT INTO position_snapshots
        (portfolio_snapshot_id, timestamp, ticker, shares, cost_basis, current_value, price_per_share)
    SELECT
        taken.id, $1, priced_positions.ticker, priced_positions.shares, priced_positions.cost_basis,
        priced_positions.current_value, priced_positions.price_per_share
    FROM taken
    JOIN priced_positions USING (user_id)
    WHERE priced_positions.current_value IS NOT NULL
    ORDER BY taken.id
    RETURNING 1
)
SELECT
    (SELECT count(*) FROM taken) AS portfolios,
    (SELECT count(*) FROM detailed) AS positions,
    (SELECT COALESCE(sum(unpriced_positions), 0) FROM taken) AS unpriced,
    (SELECT count(*) FROM users WHERE is_active AND ($3 = 1 OR id % $3 = $2)) AS due
"""

# By probes of the indexes on (user_id, timestamp) and (portfolio_snapshot_id, timestamp).
COUNT_SNAPSHOTS = """
SELECT
    count(*) AS portfolios,
    COALESCE(sum(detail.positions), 0) AS positions,
    COALESCE(sum(snapshot.unpriced_positions), 0) AS unpriced
FROM users
CROSS JOIN LATERAL (
    SELECT id, unpriced_positions
    FROM portfolio_snapshots
    WHERE user_id = users.id AND timestamp = $1
    OFFSET 0
) AS snapshot
CROSS JOIN LATERAL (
    SELECT count(*) AS positions
    FROM position_snapshots
    WHERE portfolio_snapshot_id = snapshot.id AND timestamp = $1
) AS detail
WHERE $3 = 1 OR users.id % $3 = $2
"""


async def take_snapshots(
    database: Database,
    scheduled_at: datetime,
    shard: int,
    shards: int,
    *,
    timeout: float = TAKE_TIMEOUT_SECONDS,
) -> ShardTaken:
    """Value and store every active portfolio of the shard for the slot, committed when this returns.

    Raises DatabaseUnavailable or SchemaMissing; nothing of the shard is stored then, or all of it.
    """
    taken = await _take(database, scheduled_at, shard, shards, timeout)
    added = taken["portfolios"]
    if added < taken["due"]:  # not the first delivery: tell what all of them stored
        stored = await database.fetch_row(COUNT_SNAPSHOTS, scheduled_at, shard, shards, timeout=timeout)
        assert stored is not None
        taken = stored
    return ShardTaken(taken["portfolios"], taken["positions"], taken["unpriced"], added)


async def _take(
    database: Database, scheduled_at: datetime, shard: int, shards: int, timeout: float
) -> asyncpg.Record:
    """Run the statement; again when a user was deleted while it ran, whom it does not see the next time."""
    for _ in range(DELETED_USERS_RETRIES_MAX):
        try:
            taken = await database.fetch_row(TAKE_SNAPSHOTS, scheduled_at, shard, shards, timeout=timeout)
        except asyncpg.ForeignKeyViolationError:
            continue
        assert taken is not None
        return taken
    raise DatabaseUnavailable("users were deleted all the while")
