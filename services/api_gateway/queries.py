"""The gateway's SQL. PostgreSQL writes the JSON, so that every amount stays as exact as it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Protocol, TypeAlias

import asyncpg

from services.api_gateway.performance import Buckets, MarketDays
from services.api_gateway.valuation import Holding, Holdings, market_text
from shared.database import Database, DatabaseUnavailable, NewConnection
from shared.freshness import MarketMoment
from shared.messages import CurrentPrice

# Planning costs more than running these statements, and no plan of theirs depends on a parameter's value.
SERVER_SETTINGS = {"plan_cache_mode": "force_generic_plan"}

# `/current` in one statement. Both views are filtered by index: the valuation by subject, the positions by user.
# Amounts keep their cents; a price shows two to four decimals, a quantity as many as it has.
# A price's status is that of `shared.freshness.price_status`: $3 is when a live price was confirmed at the earliest, $4
# the same of one bound to the session while the market is closed, and null while it is open. $5 is the market's JSON.
CURRENT = """
SELECT valuation.is_active, row_to_json(answer)::text AS answer
FROM portfolio_valuations AS valuation
CROSS JOIN LATERAL (
    SELECT
        COALESCE(
            json_agg(row_to_json(priced) ORDER BY position.ticker COLLATE "C")
                FILTER (WHERE position.current_value IS NOT NULL),
            '[]'
        ) AS positions,
        COALESCE(
            json_agg(row_to_json(missing) ORDER BY position.ticker COLLATE "C")
                FILTER (WHERE position.current_value IS NULL),
            '[]'
        ) AS unpriced,
        bool_and(position.updated_at > CASE WHEN judged.by_session THEN $4 ELSE $3 END)
            FILTER (WHERE position.current_value IS NOT NULL) AS all_fresh
    FROM priced_positions AS position
    CROSS JOIN LATERAL (
        SELECT
            $4::timestamptz IS NOT NULL
            AND strpos(position.ticker, '/') = 0
            AND position.feed NOT IN ('simulated', 'overnight', 'boats') AS by_session
    ) AS judged
    CROSS JOIN LATERAL (
        SELECT
            position.ticker,
            trim_scale(position.shares) AS shares,
            position.cost_basis,
            position.current_value,
            round(position.price_per_share, greatest(min_scale(position.price_per_share), 2))
                AS price_per_share,
            position.current_value - position.cost_basis AS unrealized_gain_loss,
            CASE
                WHEN position.cost_basis = 0 THEN 0.00
                ELSE round((position.current_value - position.cost_basis) * 100 / position.cost_basis, 2)
            END AS unrealized_gain_loss_percent,
            rtrim(rtrim(to_char(position.traded_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'), '0'), '.')
                || 'Z' AS price_as_of,
            CASE
                WHEN position.updated_at <= CASE WHEN judged.by_session THEN $4 ELSE $3 END THEN 'stale'
                WHEN judged.by_session THEN 'closed'
                ELSE 'live'
            END AS price_status,
            position.feed AS price_feed
    ) AS priced
    CROSS JOIN LATERAL (
        SELECT
            position.ticker,
            trim_scale(position.shares) AS shares,
            position.cost_basis,
            NULL AS current_value,
            NULL AS price_per_share,
            NULL AS unrealized_gain_loss,
            NULL AS unrealized_gain_loss_percent,
            'missing' AS price_status,
            CASE WHEN position.price_per_share IS NULL THEN 'no_price' ELSE 'value_out_of_range' END AS reason
    ) AS missing
    WHERE position.user_id = valuation.user_id
) AS held
CROSS JOIN LATERAL (
    SELECT
        valuation.total_value,
        valuation.investment_value,
        valuation.cash_balance,
        held.positions,
        rtrim(rtrim(to_char(
            COALESCE(valuation.newest_price_at, $2) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'
        ), '0'), '.') || 'Z' AS last_updated,
        COALESCE(held.all_fresh, valuation.unpriced_positions = 0) AS price_fresh,
        held.unpriced,
        valuation.simulated,
        $5::json AS market
) AS answer
WHERE valuation.subject = $1
"""

LIVE_VALUE = """
SELECT user_id, is_active, total_value, simulated
FROM portfolio_valuations
WHERE subject = $1
"""

USER = "SELECT id, is_active FROM users WHERE subject = $1"

# What a watched portfolio is made of; its prices come from the bus. As arrays, so that it is one row.
HOLDINGS = """
SELECT users.id AS user_id, users.is_active, users.cash_balance, held.tickers, held.shares, held.cost_bases
FROM users
CROSS JOIN LATERAL (
    SELECT array_agg(ticker) AS tickers, array_agg(shares) AS shares, array_agg(cost_basis) AS cost_bases
    FROM (
        SELECT ticker, shares, cost_basis
        FROM positions
        WHERE user_id = users.id AND shares > 0
        ORDER BY ticker COLLATE "C"
    ) AS position
) AS held
WHERE users.subject = $1
"""

PRICES = """
SELECT
    array_agg(symbol) AS symbols,
    array_agg(price) AS prices,
    array_agg(traded_at) AS traded_ats,
    array_agg(received_at) AS received_ats,
    array_agg(updated_at) AS updated_ats,
    array_agg(feed) AS feeds,
    array_agg(sequence) AS sequences
FROM asset_prices
WHERE symbol = ANY ($1::text[])
"""

# A chart: the live value and, as its points, the last snapshot of each bucket. Up to `rolled_until` a rollup has just
# that row, read in order from its key alone; after it comes at most a day or two of snapshots, by one probe for each
# bucket. What a tier does not hold any more comes from the next coarser one. So the work follows the points, whatever
# is stored. The window's bounds stand apart from those of the tiers, so that partitions are left out before the start.
_CHART = """
SELECT
    live.user_id, live.is_active, live.total_value, live.simulated AS live_simulated,
    series.points, series.first_value, series.simulated
FROM portfolio_valuations AS live
CROSS JOIN LATERAL (
    WITH reach AS MATERIALIZED ({reach})
    SELECT
        string_agg(
            '{{"timestamp":"' || replace((bucket AT TIME ZONE 'UTC')::text, ' ', 'T')
                || 'Z","value":' || total_value
                || CASE WHEN unpriced_positions > 0 THEN ',"partial":true}}' ELSE '}}' END,
            ','
        ) AS points,
        (array_agg(total_value))[1] AS first_value,
        bool_or(simulated) AS simulated
    FROM (
        SELECT *
        FROM ({points}) AS points
        ORDER BY bucket
    ) AS point
) AS series
WHERE live.subject = $1
"""
_REACH = """
    SELECT
        max(complete_until) FILTER (WHERE tier = '{tier}') AS rolled_until,
        max(kept_from) FILTER (WHERE tier = '{tier}') AS kept_from,
        LEAST(
            max(kept_from) FILTER (WHERE tier = '{tier}'), max(kept_from) FILTER (WHERE tier = '{coarser}')
        ) AS coarser_kept_from,
        '-infinity'::timestamptz AS beginning
    FROM history_tiers
"""
_ROLLED = """
    SELECT bucket, total_value, unpriced_positions, simulated
    FROM portfolio_rollups_{tier}
    WHERE user_id = live.user_id AND bucket >= $2 AND bucket < $3::timestamptz + $4::interval
        AND bucket >= (SELECT kept_from FROM reach) AND bucket < (SELECT rolled_until FROM reach)
"""
# A coarser row stands where its snapshot lies, so that a value stays at its time when finer rows are dropped. A market
# date may end after the window, after the time that the finer tier is kept from, or in the next one's first bucket.
_COARSER = """
    SELECT DISTINCT ON (bucket) bucket, total_value, unpriced_positions, simulated
    FROM (
        SELECT date_bin($4, timestamp, 'epoch') AS bucket, timestamp, total_value, unpriced_positions, simulated
        FROM portfolio_rollups_{tier}
        WHERE user_id = live.user_id AND bucket >= $2 AND bucket < $3::timestamptz + $4::interval
            AND timestamp < $3::timestamptz + $4::interval
            AND bucket >= (SELECT {since} FROM reach)
            AND bucket < (SELECT {until} FROM reach) AND timestamp < (SELECT {until} FROM reach)
    ) AS rows
    ORDER BY bucket, timestamp DESC
"""
# Each snapshot of the last day is a point, or nearly: they are read in order instead of probed for.
_RAW = """
    SELECT DISTINCT ON (bucket) bucket, total_value, unpriced_positions, simulated
    FROM (
        SELECT date_bin($4, timestamp, 'epoch') AS bucket, timestamp, total_value, unpriced_positions, simulated
        FROM portfolio_snapshots
        WHERE user_id = live.user_id AND timestamp >= $2 AND timestamp < $3::timestamptz + $4::interval
            AND timestamp >= (SELECT kept_from FROM reach)
        ORDER BY timestamp
    ) AS snapshots
    ORDER BY bucket, timestamp DESC
"""
_TAIL = """
    SELECT bucket, last.total_value, last.unpriced_positions, last.simulated
    FROM generate_series(
        GREATEST($2::timestamptz, (SELECT GREATEST(rolled_until, kept_from) FROM reach)), $3::timestamptz, $4::interval
    ) AS bucket
    CROSS JOIN LATERAL (
        SELECT total_value, unpriced_positions, simulated
        FROM portfolio_snapshots
        WHERE user_id = live.user_id AND timestamp >= bucket AND timestamp < bucket + $4::interval
            AND timestamp >= $2 AND timestamp < $3::timestamptz + $4::interval
        ORDER BY timestamp DESC
        LIMIT 1
    ) AS last
"""


def _chart_statement(tier: str, *coarser: str) -> str:
    """Compose the statement of one bucket width: its own tier, and what is left of older times."""
    own = [_RAW] if tier == "raw" else [_ROLLED.format(tier=tier), _TAIL]
    borders = pairwise(("kept_from", "coarser_kept_from", "beginning"))
    older = [
        _COARSER.format(tier=name, since=since, until=until)
        for name, (until, since) in zip(coarser, borders, strict=False)
    ]
    return _CHART.format(
        reach=_REACH.format(tier=tier, coarser=coarser[0]),
        points=" UNION ALL ".join(f"({leg})" for leg in (*own, *older)),
    )


CHARTS = {
    timedelta(minutes=5): _chart_statement("raw", "1h", "1d"),
    timedelta(minutes=30): _chart_statement("30m", "1h", "1d"),
    timedelta(hours=1): _chart_statement("1h", "1d"),
    timedelta(hours=3): _chart_statement("3h", "1d"),
}

# A day is a market date: from local midnight to the next, 23 or 25 hours later when the clock changes.
DAILY_CHART = _CHART.format(
    reach="""
    SELECT
        rolled_day,
        rolled_day::timestamp AT TIME ZONE $4 AS rolled_until,
        COALESCE($2::date::timestamp AT TIME ZONE $4, '-infinity') AS starts_at,
        ($3::date + 1)::timestamp AT TIME ZONE $4 AS ends_at
    FROM (SELECT (complete_until AT TIME ZONE $4)::date AS rolled_day FROM history_tiers WHERE tier = '1d') AS tier
""",
    points="""
    SELECT bucket, total_value, unpriced_positions, simulated
    FROM portfolio_rollups_1d
    WHERE user_id = live.user_id
        AND bucket >= (SELECT starts_at FROM reach)
        AND bucket < (SELECT LEAST(ends_at, rolled_until) FROM reach)
    UNION ALL
    SELECT day AT TIME ZONE $4, last.total_value, last.unpriced_positions, last.simulated
    FROM generate_series(
        COALESCE(
            NULLIF(GREATEST($2::date, (SELECT rolled_day FROM reach)), '-infinity'),
            (
                SELECT (timestamp AT TIME ZONE $4)::date
                FROM portfolio_snapshots
                WHERE user_id = live.user_id
                ORDER BY timestamp
                LIMIT 1
            )
        )::timestamp,
        $3::date::timestamp,
        interval '1 day'
    ) AS day
    CROSS JOIN LATERAL (
        SELECT total_value, unpriced_positions, simulated
        FROM portfolio_snapshots
        WHERE user_id = live.user_id
            AND timestamp >= day AT TIME ZONE $4 AND timestamp < (day + interval '1 day') AT TIME ZONE $4
        ORDER BY timestamp DESC
        LIMIT 1
    ) AS last
""",
)


# Where a server is in the log of its cluster. Positions of two timelines cannot be compared: after a failover the new
# primary and a replica of the old one have gone different ways. A timeline is in the names of the primary's log files;
# a replica has been on the one that it receives, and on those that its control file names.
PRIMARY_POSITION = """
SELECT
    (SELECT system_identifier FROM pg_control_system()) AS cluster,
    ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer AS timeline,
    (pg_current_wal_lsn() - '0/0')::bigint AS written
"""

REPLICA_POSITION = """
SELECT
    pg_is_in_recovery() AS is_replica,
    (SELECT system_identifier FROM pg_control_system()) AS cluster,
    greatest(
        (SELECT timeline_id FROM pg_control_checkpoint()),
        (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
        (SELECT received_tli FROM pg_stat_wal_receiver)
    ) AS timeline,
    COALESCE((pg_last_wal_replay_lsn() - '0/0')::bigint, 0) AS replayed,
    (SELECT max(version_num) FROM alembic_version) AS schema_revision
"""

REPLAYED = """
SELECT COALESCE((pg_last_wal_replay_lsn() - '0/0')::bigint, 0)
WHERE pg_is_in_recovery()
"""


Row: TypeAlias = asyncpg.Record


class Source(Protocol):
    """What the gateway reads from."""

    async def fetch_row(self, statement: str, *args: object) -> Row | None: ...


@dataclass(frozen=True)
class CurrentPortfolio:
    is_active: bool
    answer: str
    """The JSON text of the answer."""


@dataclass(frozen=True)
class LiveValue:
    user_id: int
    is_active: bool
    total_value: Decimal
    simulated: bool


@dataclass(frozen=True)
class User:
    id: int
    is_active: bool


@dataclass(frozen=True)
class PrimaryPosition:
    cluster: int
    timeline: int
    written: int
    """Bytes of the log; what others can see of a transaction is in them."""


@dataclass(frozen=True)
class ReplicaPosition:
    is_replica: bool
    """False of a server that has been promoted."""
    cluster: int
    timeline: int
    replayed: int
    """Bytes of the log that its readers see."""
    schema_revision: str | None


@dataclass(frozen=True)
class Series:
    points: str
    """The points as JSON objects with commas between, oldest first."""
    first_value: Decimal | None
    simulated: bool


async def current_portfolio(
    source: Source, subject: str, now: datetime, moment: MarketMoment
) -> CurrentPortfolio | None:
    """Return the portfolio valued at the last known prices; None when nobody has this subject."""
    row = await source.fetch_row(
        CURRENT, subject, now, moment.fresh_since, moment.closed_since, market_text(moment)
    )
    return CurrentPortfolio(**row) if row else None


async def user(source: Source, subject: str) -> User | None:
    """Return who has this subject, if anybody."""
    row = await source.fetch_row(USER, subject)
    return User(**row) if row else None


async def holdings(source: Source, subject: str) -> Holdings | None:
    """Return what the user holds; None when nobody has this subject."""
    row = await source.fetch_row(HOLDINGS, subject)
    if row is None:
        return None
    positions = zip(row["tickers"] or (), row["shares"] or (), row["cost_bases"] or (), strict=True)
    return Holdings(
        row["user_id"],
        row["is_active"],
        row["cash_balance"],
        tuple(Holding(ticker, shares, cost_basis) for ticker, shares, cost_basis in positions),
    )


async def prices(source: Source, symbols: Sequence[str]) -> list[CurrentPrice]:
    """Return the cached prices of those of `symbols` that have one."""
    row = await source.fetch_row(PRICES, symbols)
    if row is None or row["symbols"] is None:
        return []
    return [
        CurrentPrice.model_construct(
            symbol=symbol,
            price=price,
            traded_at=traded_at,
            received_at=received_at,
            confirmed_at=updated_at,
            feed=feed,
            sequence=sequence,
        )
        for symbol, price, traded_at, received_at, updated_at, feed, sequence in zip(
            *row.values(), strict=True
        )
    ]


async def live_value(source: Source, subject: str) -> LiveValue | None:
    """Return the total of `current_portfolio` alone; None when nobody has this subject."""
    row = await source.fetch_row(LIVE_VALUE, subject)
    return LiveValue(**row) if row else None


async def chart(
    source: Source, subject: str, window: Buckets | MarketDays, market_timezone: str
) -> tuple[LiveValue, Series] | None:
    """Return `live_value` and the last snapshot of each bucket of the window; None when nobody has this subject.

    Of times whose snapshots have been dropped there are coarser points. One statement costs half of what two do.
    """
    statement, arguments = _of_window(window, market_timezone)
    row = await source.fetch_row(statement, subject, *arguments)
    if row is None:
        return None
    return LiveValue(row["user_id"], row["is_active"], row["total_value"], row["live_simulated"]), _series(
        row
    )


def _of_window(window: Buckets | MarketDays, market_timezone: str) -> tuple[str, tuple[object, ...]]:
    """Return the statement of a chart, and what it needs beside the subject."""
    match window:
        case MarketDays(first, last):
            return DAILY_CHART, (first, last, market_timezone)
        case Buckets(first_starts_at, last_starts_at, width):
            return CHARTS[width], (first_starts_at, last_starts_at, width)


async def primary_position(database: Database) -> PrimaryPosition:
    """Return where the primary is; raises DatabaseUnavailable also when it is none."""
    return PrimaryPosition(**await _position(database, PRIMARY_POSITION))


async def replica_position(database: Database) -> ReplicaPosition:
    """Return where the replica is."""
    return ReplicaPosition(**await _position(database, REPLICA_POSITION))


async def replayed(connection: NewConnection) -> int | None:
    """Return what the server at the other end has replayed; None when it is no replica."""
    position: int | None = await connection.fetchval(REPLAYED)
    return position


async def _position(database: Database, statement: str) -> asyncpg.Record:
    try:
        row = await database.fetch_row(statement)
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseUnavailable(str(error)) from error
    assert row is not None
    return row


def _series(row: asyncpg.Record) -> Series:
    return Series(row["points"] or "", row["first_value"], row["simulated"] or False)
