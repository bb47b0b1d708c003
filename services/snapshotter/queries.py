"""The snapshotter's SQL: take the snapshots of a shard, or the one that a user asks for."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from shared import refreshes
from shared.database import Connection, Database, DatabaseUnavailable
from shared.messages import SnapshotTaken
from shared.refreshes import Kind
from shared.requests import Refused

# For the one large statement: room to sort in memory, and a plan for the very shard.
SERVER_SETTINGS = {"work_mem": "64MB", "plan_cache_mode": "force_custom_plan"}

TAKE_TIMEOUT_SECONDS = 120.0
TAKE_ATTEMPTS_MAX = 5
COUNT_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class ShardTaken:
    """What is stored for a shard's slot, and what this call added to it."""

    portfolios: int
    positions: int
    unpriced: int
    added: int
    """Portfolios that had no snapshot of the slot before this call."""


# One statement values and stores everything from one view of the data: parent rows, details and counts agree.
#
# due       whose turn it is. They are held FOR KEY SHARE, so that none is deleted before this commits; one whose
#           deletion has begun is left out. `$3 = 1 OR` lets the planner see that a single shard is everybody.
# priced    every position, valued once, in the order of users: what BRIN needs of the rows written.
#           OFFSET 0 keeps the join apart from the sort, which the planner else replaces by a slow ordered join.
# valued    the sums, as in portfolio_valuations (a test compares the two).
#
# A conflict with the unique key (user, slot) undoes it all, so it must come before the details are written:
# `stored` is counted first.
_TAKE_SNAPSHOTS = """
WITH due AS MATERIALIZED (
    SELECT id AS user_id, cash_balance
    FROM users
    WHERE is_active AND {whose}
    ORDER BY id
    FOR KEY SHARE SKIP LOCKED
),
priced AS MATERIALIZED (
    SELECT user_id, ticker, shares, cost_basis, current_value, price_per_share, feed
    FROM (
        SELECT
            due.user_id, position.ticker, position.shares, position.cost_basis,
            position.current_value, position.price_per_share, position.feed
        FROM due
        JOIN priced_positions AS position ON position.user_id = due.user_id
        OFFSET 0
    ) AS held
    ORDER BY user_id
),
valued AS MATERIALIZED (
    SELECT
        user_id,
        sum(current_value) AS investment_value,
        count(current_value) AS priced,
        count(*) AS held,
        bool_or(feed = 'simulated') FILTER (WHERE current_value IS NOT NULL) AS simulated
    FROM priced
    GROUP BY user_id
),
stored AS (
    INSERT INTO portfolio_snapshots
        (timestamp, user_id, unpriced_positions, simulated, total_value, cash_balance, investment_value)
    SELECT
        $1,
        due.user_id,
        LEAST(COALESCE(valued.held - valued.priced, 0), 32767),
        COALESCE(valued.simulated, FALSE),
        due.cash_balance + COALESCE(valued.investment_value, 0.00),
        due.cash_balance,
        COALESCE(valued.investment_value, 0.00)
    FROM due
    LEFT JOIN valued USING (user_id)
    ORDER BY due.user_id
    RETURNING unpriced_positions
),
totals AS MATERIALIZED (
    SELECT count(*) AS portfolios, COALESCE(sum(unpriced_positions), 0) AS unpriced FROM stored
),
detailed AS (
    INSERT INTO position_snapshots
        (timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share)
    SELECT $1, user_id, ticker, shares, cost_basis, current_value, price_per_share
    FROM priced
    WHERE current_value IS NOT NULL AND (SELECT portfolios FROM totals) > 0
),
reopened AS (
    SELECT reopen_history($1)
    WHERE EXISTS (SELECT FROM history_tiers WHERE complete_until > $1)
)
SELECT
    totals.portfolios,
    (SELECT COALESCE(sum(priced), 0)::bigint FROM valued) AS positions,
    totals.unpriced
FROM totals
LEFT JOIN reopened ON TRUE
"""

TAKE_SNAPSHOTS = _TAKE_SNAPSHOTS.format(whose="($3 = 1 OR id % $3 = $2)")

TAKE_ONE_SNAPSHOT = _TAKE_SNAPSHOTS.format(whose="id = $2")

# By probes of the key: the planner would rather read the whole week.
TAKE_MISSING_SNAPSHOTS = _TAKE_SNAPSHOTS.format(
    whose="""($3 = 1 OR id % $3 = $2)
        AND NOT EXISTS (
            SELECT FROM portfolio_snapshots WHERE user_id = users.id AND timestamp = $1 OFFSET 0
        )
"""
)

COUNT_SNAPSHOTS = """
SELECT count(*) AS portfolios, COALESCE(sum(snapshot.unpriced_positions), 0) AS unpriced,
    (
        SELECT count(*)
        FROM position_snapshots
        WHERE timestamp = $1 AND ($3 = 1 OR user_id % $3 = $2)
    ) AS positions
FROM users
CROSS JOIN LATERAL (
    SELECT unpriced_positions
    FROM portfolio_snapshots
    WHERE user_id = users.id AND timestamp = $1
    OFFSET 0
) AS snapshot
WHERE $3 = 1 OR users.id % $3 = $2
"""


STORED_SNAPSHOT = """
SELECT user_id, timestamp, total_value, cash_balance, investment_value, unpriced_positions, simulated
FROM portfolio_snapshots
WHERE user_id = $1 AND timestamp = $2
"""


async def take_snapshots(
    database: Database,
    scheduled_at: datetime,
    shard: int,
    shards: int,
    *,
    again: bool = False,
    timeout: float = TAKE_TIMEOUT_SECONDS,
) -> ShardTaken:
    """Value and store every active portfolio of the shard for the slot, committed when this returns.

    A portfolio that has its snapshot already is left as it is, which makes every call after the first harmless;
    `again` says that there may be such, and saves an attempt. Raises DatabaseUnavailable or SchemaMissing;
    nothing of the shard is stored then, or all of it.
    """
    was_without_partition = False
    for _ in range(TAKE_ATTEMPTS_MAX):
        statement = TAKE_MISSING_SNAPSHOTS if again else TAKE_SNAPSHOTS
        try:
            taken = await database.fetch_row(statement, scheduled_at, shard, shards, timeout=timeout)
        except asyncpg.UniqueViolationError:
            again = True
        except asyncpg.CheckViolationError:
            # There is no partition for the slot: after a long rest, or with a wrong clock.
            if was_without_partition:
                raise  # it is something else
            was_without_partition = True
            await make_partitions(database, scheduled_at, scheduled_at)
        else:
            assert taken is not None
            added = taken["portfolios"]
            if again:  # not the first call: tell what all of them stored
                taken = await database.fetch_row(
                    COUNT_SNAPSHOTS, scheduled_at, shard, shards, timeout=timeout
                )
                assert taken is not None
            return ShardTaken(taken["portfolios"], taken["positions"], taken["unpriced"], added)
    raise DatabaseUnavailable("others stored snapshots of the slot all the while")


async def stored_snapshots(
    database: Database, scheduled_at: datetime, shard: int, shards: int
) -> ShardTaken | None:
    """Return what is stored for a shard's slot; None when nothing is. Raises DatabaseUnavailable or SchemaMissing."""
    found = await database.fetch_row(
        COUNT_SNAPSHOTS, scheduled_at, shard, shards, timeout=COUNT_TIMEOUT_SECONDS
    )
    assert found is not None
    if not found["portfolios"]:
        return None
    return ShardTaken(found["portfolios"], found["positions"], found["unpriced"], added=0)


async def take_requested_snapshot(
    database: Database, user_id: int, requested_at: datetime, cooldown: timedelta
) -> tuple[SnapshotTaken, bool]:
    """Value and store one portfolio, committed when this returns; tell whether this call stored it.

    The same request again finds what the first one stored. Raises Refused for an unknown or deactivated user and for a
    request within `cooldown` of the last one, DatabaseUnavailable or SchemaMissing; nothing is stored or counted then.
    """

    async def take(connection: Connection) -> tuple[SnapshotTaken, bool]:
        await refreshes.grant(connection, Kind.SNAPSHOT, user_id, requested_at, cooldown)
        stored = await connection.fetchrow(STORED_SNAPSHOT, user_id, requested_at)
        added = stored is None
        if stored is None:
            await connection.fetchrow(TAKE_ONE_SNAPSHOT, requested_at, user_id)
            stored = await connection.fetchrow(STORED_SNAPSHOT, user_id, requested_at)
        if stored is None:
            raise Refused(403, "the user is deactivated")  # a moment ago
        return SnapshotTaken(**stored), added

    was_without_partition = False
    for _ in range(TAKE_ATTEMPTS_MAX):
        try:
            return await database.transact(take)
        except asyncpg.UniqueViolationError:  # a slot's snapshot of the same microsecond came between
            continue
        except asyncpg.CheckViolationError:
            if was_without_partition:
                raise  # it is something else
            was_without_partition = True
            await make_partitions(database, requested_at, requested_at)
    raise DatabaseUnavailable("others stored this snapshot all the while")


async def make_partitions(database: Database, first: datetime, last: datetime) -> int:
    """Make the partitions that snapshots and rollups from `first` to `last` need; return how many were missing."""
    made: int = await database.fetch_value(
        "SELECT make_history_partitions($1, $2)", first, last, timeout=TAKE_TIMEOUT_SECONDS
    )
    return made


async def insert_else_merge(
    connection: Connection, insert: str, merge: str, *args: object, timeout: float
) -> asyncpg.Record | None:
    """Run `insert` inside the transaction, and `merge` in its place when a row of its key is there already."""
    try:
        async with connection.transaction():
            return await connection.fetchrow(insert, *args, timeout=timeout)
    except asyncpg.UniqueViolationError:
        return await connection.fetchrow(merge, *args, timeout=timeout)
