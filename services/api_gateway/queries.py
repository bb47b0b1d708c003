"""The gateway's SQL. PostgreSQL writes the JSON, so that every amount stays as exact as it is stored."""

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal

import asyncpg

from shared.database import Database

# Planning costs more than running these statements, and no plan of theirs depends on a parameter's value.
SERVER_SETTINGS = {"plan_cache_mode": "force_generic_plan"}

# `/current` in one statement. Both views are filtered by index: the valuation by subject, the positions by user.
# Amounts keep their cents; a price shows two to four decimals, a quantity as many as it has.
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
        ) AS unpriced
    FROM priced_positions AS position
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
            CASE WHEN position.updated_at > $3 THEN 'live' ELSE 'stale' END AS price_status,
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
        COALESCE(valuation.oldest_price_at > $3, valuation.unpriced_positions = 0) AS price_fresh,
        held.unpriced,
        valuation.simulated
) AS answer
WHERE valuation.subject = $1
"""

LIVE_VALUE = """
SELECT user_id, is_active, total_value, simulated
FROM portfolio_valuations
WHERE subject = $1
"""

# A series: for each bucket its last snapshot, found by one probe of the index on (user_id, timestamp), so that the
# work follows the points and not the snapshots behind them.
_SERIES = """
SELECT
    string_agg(
        '{{"timestamp":"' || to_char(bucket.starts_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
            || '","value":' || last.total_value
            || CASE WHEN last.unpriced_positions > 0 THEN ',"partial":true}}' ELSE '}}' END,
        ',' ORDER BY bucket.starts_at
    ) AS points,
    (array_agg(last.total_value ORDER BY bucket.starts_at))[1] AS first_value,
    bool_or(last.simulated) AS simulated
FROM ({buckets}) AS bucket
CROSS JOIN LATERAL (
    SELECT total_value, unpriced_positions, simulated
    FROM portfolio_snapshots
    WHERE user_id = $1 AND timestamp >= bucket.starts_at AND timestamp < bucket.ends_at
    ORDER BY timestamp DESC
    LIMIT 1
) AS last
"""

SERIES = _SERIES.format(
    buckets="""
    SELECT starts_at, starts_at + $4::interval AS ends_at
    FROM generate_series($2::timestamptz, $3::timestamptz, $4::interval) AS starts_at
"""
)

# A day is a market date: from local midnight to the next, 23 or 25 hours later when the clock changes.
DAILY_SERIES = _SERIES.format(
    buckets="""
    SELECT day AT TIME ZONE $4 AS starts_at, (day + interval '1 day') AT TIME ZONE $4 AS ends_at
    FROM generate_series(
        COALESCE(
            $2::date,
            (
                SELECT (timestamp AT TIME ZONE $4)::date
                FROM portfolio_snapshots
                WHERE user_id = $1
                ORDER BY timestamp
                LIMIT 1
            )
        )::timestamp,
        $3::date::timestamp,
        interval '1 day'
    ) AS day
"""
)


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
class Series:
    points: str
    """The points as JSON objects with commas between, oldest first."""
    first_value: Decimal | None
    simulated: bool


async def current_portfolio(
    database: Database, subject: str, now: datetime, fresh_since: datetime
) -> CurrentPortfolio | None:
    """Return the portfolio valued at the last known prices; None when nobody has this subject."""
    row = await database.fetch_row(CURRENT, subject, now, fresh_since)
    return CurrentPortfolio(**row) if row else None


async def live_value(database: Database, subject: str) -> LiveValue | None:
    """Return the total of `current_portfolio` alone; None when nobody has this subject."""
    row = await database.fetch_row(LIVE_VALUE, subject)
    return LiveValue(**row) if row else None


async def series(
    database: Database, user_id: int, first: datetime, last: datetime, width: timedelta
) -> Series:
    """Return the last snapshot of each bucket; buckets start at `first`, every `width`, until `last`."""
    return _series(await database.fetch_row(SERIES, user_id, first, last, width))


async def daily_series(
    database: Database, user_id: int, first: date | None, last: date, timezone: str
) -> Series:
    """Return the last snapshot of each market date; without `first`, from the user's first snapshot."""
    return _series(await database.fetch_row(DAILY_SERIES, user_id, first, last, timezone))


def _series(row: asyncpg.Record | None) -> Series:
    assert row is not None  # an aggregate without GROUP BY always has one row
    return Series(row["points"] or "", row["first_value"], row["simulated"] or False)
