"""The history's SQL: room for what comes, rollups of what is old, and the end of what is expired.

Every step is one short transaction that records its own progress: a kill at any point loses nothing but the step
under way, and two replicas at once do each step once.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from services.snapshotter import queries
from shared.database import Connection, Database

ROLL_UP_USERS = 1_000
"""Users of one step, so that no transaction is long: about half a second."""
STEP_TIMEOUT_SECONDS = 30.0
LOCK_TIMEOUT = "500ms"
"""Less than `deadlock_timeout`: who deletes several users at once wins against a step that holds some of them."""
DROP_LOCK_TIMEOUT, DROP_TIMEOUT = "40ms", "80ms"
"""Readers queue behind a drop while it waits for a lock, of which it needs several: in all less than 100 ms."""
INDEX_TIMEOUT_SECONDS = 120.0
CLOCK_STEP_BACK_MAX, CLOCK_STEP_AHEAD_MAX = timedelta(hours=1), timedelta(days=7)


@dataclass(frozen=True)
class Rollup:
    """A coarser copy of old snapshots: for each bucket the last snapshot inside it, as it is."""

    tier: str
    source: str
    """The tier that it is made from; what is last in a bucket of the source is last in the bucket of both."""
    width: timedelta | None
    """None: a bucket is a market date."""

    @property
    def table(self) -> str:
        return f"portfolio_rollups_{self.tier}"


ROLLUPS = (
    Rollup("30m", "raw", timedelta(minutes=30)),
    Rollup("1h", "30m", timedelta(hours=1)),
    Rollup("3h", "1h", timedelta(hours=3)),
    Rollup("1d", "raw", None),
)


@dataclass(frozen=True)
class Step:
    """One step of a rollup: rows written for some of the users of one day."""

    rows: int
    complete_until: datetime | None
    """Set when the day is done for all users."""


# The row is held by a statement of its own, so that the next one sees what was committed until then.
_HOLD_TIER = "SELECT TRUE FROM history_tiers WHERE tier = $1 FOR UPDATE SKIP LOCKED"

# A unit of work is a day, of UTC or of the market, for it holds whole buckets of every width. Time without a
# partition of snapshots holds none, be it a month of being off or years that a clock leapt: it is passed over.
_UNIT = """
SELECT
    starts_at,
    ends_at,
    CASE WHEN starts_at = complete_until THEN users_done ELSE 0 END AS users_done,
    (SELECT NULLIF(complete_until, '-infinity') FROM history_tiers WHERE tier = $3) AS source_until
FROM (
    SELECT
        complete_until,
        users_done,
        greatest(complete_until, (
            SELECT min(starts_at) FROM history_partitions('raw') WHERE ends_at > complete_until
        )) AT TIME ZONE $2 AS local
    FROM history_tiers
    WHERE tier = $1
) AS progress
CROSS JOIN LATERAL (
    SELECT
        local::date::timestamp AT TIME ZONE $2 AS starts_at,
        (local::date + 1)::timestamp AT TIME ZONE $2 AS ends_at
) AS unit
WHERE local > '-infinity'
"""

# For each user and bucket one probe of the source's key. The users are held, so that none is deleted meanwhile.
_ROLL_UP = """
WITH chunk AS MATERIALIZED (
    SELECT id FROM users WHERE id > $1 ORDER BY id LIMIT $2 FOR KEY SHARE
),
rolled AS (
    INSERT INTO {table} (
        bucket, timestamp, user_id, unpriced_positions, simulated,
        total_value, cash_balance, investment_value
    )
    SELECT
        bucket.starts_at, last.timestamp, chunk.id, last.unpriced_positions, last.simulated,
        last.total_value, last.cash_balance, last.investment_value
    FROM chunk
    CROSS JOIN ({buckets}) AS bucket
    CROSS JOIN LATERAL (
        SELECT *
        FROM {source}
        WHERE user_id = chunk.id AND {time} >= bucket.starts_at AND {time} < bucket.ends_at
        ORDER BY {time} DESC
        LIMIT 1
    ) AS last
    ORDER BY chunk.id, bucket.starts_at
    {on_conflict}
    RETURNING 1
)
SELECT count(*) AS users, max(id) AS last_user, (SELECT count(*) FROM rolled) AS rows
FROM chunk
"""
# Looking for a conflict costs a third more, and there is one in history that was reopened alone.
_ON_CONFLICT = """
    ON CONFLICT (user_id, bucket) DO UPDATE
    SET timestamp = EXCLUDED.timestamp,
        unpriced_positions = EXCLUDED.unpriced_positions,
        simulated = EXCLUDED.simulated,
        total_value = EXCLUDED.total_value,
        cash_balance = EXCLUDED.cash_balance,
        investment_value = EXCLUDED.investment_value
    WHERE {table}.timestamp < EXCLUDED.timestamp
        OR {table}.timestamp = EXCLUDED.timestamp AND {table} IS DISTINCT FROM EXCLUDED
"""
_FIXED_BUCKETS = """
    SELECT starts_at, starts_at + $5::interval AS ends_at
    FROM generate_series($3::timestamptz, $4::timestamptz - $5::interval, $5::interval) AS starts_at
"""
_MARKET_DATE = "SELECT $3::timestamptz AS starts_at, $4::timestamptz AS ends_at"


async def roll_up(
    database: Database,
    rollup: Rollup,
    due_until: datetime,
    market_timezone: str,
    *,
    users_max: int = ROLL_UP_USERS,
) -> Step | None:
    """Roll up the next users of the next day that ends until `due_until`; None when there is nothing to do."""
    async with database.transaction() as connection:
        await _bound(connection, lock_timeout=LOCK_TIMEOUT)
        if not await connection.fetchval(_HOLD_TIER, rollup.tier):  # another replica is at it
            return None
        unit = await connection.fetchrow(
            _UNIT,
            rollup.tier,
            market_timezone if rollup.width is None else "UTC",
            rollup.source,
            timeout=STEP_TIMEOUT_SECONDS,
        )
        if unit is None:  # not even room for snapshots yet
            return None
        source_lags = rollup.source != "raw" and (
            unit["source_until"] is None or unit["source_until"] < unit["ends_at"]
        )
        if unit["ends_at"] > due_until or source_lags:
            return None
        await connection.execute(
            "SELECT make_history_partitions($1, $2, $3)",
            *(unit["starts_at"], unit["ends_at"], [rollup.tier]),
            timeout=STEP_TIMEOUT_SECONDS,
        )
        rolled = await queries.insert_else_merge(
            connection,
            _roll_up_statement(rollup),
            _roll_up_statement(rollup, on_conflict=_ON_CONFLICT.format(table=rollup.table)),
            unit["users_done"],
            users_max,
            unit["starts_at"],
            unit["ends_at"],
            *([rollup.width] if rollup.width else []),
            timeout=STEP_TIMEOUT_SECONDS,
        )
        assert rolled is not None
        done = rolled["users"] < users_max
        await connection.execute(
            "UPDATE history_tiers SET complete_until = $2, users_done = $3 WHERE tier = $1",
            rollup.tier,
            unit["ends_at"] if done else unit["starts_at"],
            0 if done else rolled["last_user"],
        )
        return Step(rolled["rows"], unit["ends_at"] if done else None)


def _roll_up_statement(rollup: Rollup, on_conflict: str = "") -> str:
    from_raw = rollup.source == "raw"
    return _ROLL_UP.format(
        table=rollup.table,
        source="portfolio_snapshots" if from_raw else f"portfolio_rollups_{rollup.source}",
        time="timestamp" if from_raw else "bucket",
        buckets=_FIXED_BUCKETS if rollup.width else _MARKET_DATE,
        on_conflict=on_conflict,
    )


async def complete_until(database: Database) -> dict[str, datetime | None]:
    """Return for each rollup until when it is complete; None before its first day."""
    rows = await database.fetch(
        """
        SELECT tier, NULLIF(complete_until, '-infinity') AS complete_until
        FROM history_tiers
        WHERE tier NOT IN ('raw', 'details')
        """
    )
    return {row["tier"]: row["complete_until"] for row in rows}


async def lacking_since(database: Database) -> dict[str, datetime]:
    """Return for each rollup since when it lacks something: before its first day, all that there is room for."""
    rows = await database.fetch(
        """
        SELECT
            tier,
            COALESCE(
                NULLIF(complete_until, '-infinity'), (SELECT min(starts_at) FROM history_partitions('raw'))
            ) AS since
        FROM history_tiers
        WHERE tier NOT IN ('raw', 'details')
        """
    )
    return {row["tier"]: row["since"] for row in rows if row["since"]}


async def steady_since(database: Database, now: datetime) -> datetime:
    """Record that it is `now`; return since when the clock has not leapt.

    A clock that is years ahead makes everything look expired. It leapt when it went back by more than an hour, or
    ahead by more than a week, which a system that was off for so long cannot tell from a leap.
    """
    since: datetime = await database.fetch_value(
        """
        INSERT INTO history_clock (seen_at, steady_since)
        VALUES ($1, $1)
        ON CONFLICT (id) DO UPDATE
        SET seen_at = $1,
            steady_since = CASE
                WHEN $1 BETWEEN history_clock.seen_at - $2::interval AND history_clock.seen_at + $3::interval
                THEN history_clock.steady_since
                ELSE $1
            END
        RETURNING steady_since
        """,
        now,
        CLOCK_STEP_BACK_MAX,
        CLOCK_STEP_AHEAD_MAX,
    )
    return since


# Positions go before their snapshots, and snapshots when every rollup has them.
_EXPIRED = """
SELECT name, ends_at
FROM history_partitions($1) AS part
WHERE ends_at <= $2
    AND ($1 = 'details' OR ends_at <= (
        SELECT min(complete_until) FROM history_tiers WHERE tier NOT IN ('raw', 'details', $1)
    ))
    AND ($1 <> 'raw' OR NOT EXISTS (
        SELECT FROM history_partitions('details') AS details WHERE details.starts_at < part.ends_at
    ))
ORDER BY name
"""


async def expired_partitions(database: Database, tier: str, keep_from: datetime) -> list[str]:
    """Return the partitions, oldest first, that end until `keep_from` and that nothing else is made from any more."""
    return [row["name"] for row in await database.fetch(_EXPIRED, tier, keep_from)]


async def drop_partition(database: Database, tier: str, name: str, keep_from: datetime) -> bool:
    """Drop a partition that is expired; tell whether it still was when its turn came.

    Raises DatabaseUnavailable when readers or writers are in the way for longer than others may wait for this.
    """
    async with database.transaction() as connection:
        await _bound(connection, lock_timeout=DROP_LOCK_TIMEOUT)
        # Whoever reopens history waits for this row, or this for him.
        await connection.fetchval("SELECT TRUE FROM history_tiers WHERE tier = $1 FOR UPDATE", tier)
        expired = {row["name"]: row["ends_at"] for row in await connection.fetch(_EXPIRED, tier, keep_from)}
        if name not in expired:
            return False
        await connection.execute(
            "UPDATE history_tiers SET kept_from = greatest(kept_from, $2) WHERE tier = $1",
            tier,
            expired[name],
        )
        await _bound(connection, lock_timeout=DROP_LOCK_TIMEOUT, statement_timeout=DROP_TIMEOUT)
        await connection.execute(f'DROP TABLE "{name}"', timeout=STEP_TIMEOUT_SECONDS)
        return True


async def index_details(database: Database, now: datetime) -> None:
    """Bring the block ranges that have been filled until `now` into the indexes of positions.

    Vacuum would do it, but nothing else needs a vacuum of these tables. A partition is left alone once it was done
    a day after its end, unless history is reopened.
    """
    names = await database.fetch(
        """
        SELECT name
        FROM history_partitions('details')
        WHERE ends_at > (SELECT complete_until FROM history_tiers WHERE tier = 'details')
            AND starts_at <= $1
        ORDER BY name
        """,
        now,
    )
    for row in names:
        await database.fetch(
            """
            SELECT brin_summarize_new_values(indexrelid)
            FROM pg_index
            JOIN pg_class ON pg_class.oid = indexrelid
            JOIN pg_am ON pg_am.oid = relam
            WHERE indrelid = to_regclass($1) AND amname = 'brin'
            """,
            row["name"],
            timeout=INDEX_TIMEOUT_SECONDS,
        )
    await database.fetch(
        "UPDATE history_tiers SET complete_until = $1 WHERE tier = 'details' AND complete_until < $1",
        now - timedelta(days=1),
    )


async def _bound(connection: Connection, *, lock_timeout: str, statement_timeout: str | None = None) -> None:
    await connection.execute("SELECT set_config('lock_timeout', $1, TRUE)", lock_timeout)
    if statement_timeout:
        await connection.execute("SELECT set_config('statement_timeout', $1, TRUE)", statement_timeout)
