"""The data that everything is measured on: portfolios in 500 symbols, and histories that end at a fixed instant.

A value is a function of the user and the slot alone, so that both schemas hold the same history and a rollup can be
written without reading what it is a rollup of. Rows are inserted slot by slot, as time would have written them.
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import asyncpg

from bench.progress import progress
from bench.seed_like.models import Base
from bench.seed_like.sessions import engine
from bench.server import connected
from bench.sizes import Size

SYMBOLS = 500
POSITIONS = 10
SLOT = timedelta(minutes=5)
DAY = timedelta(days=1)
YEAR = timedelta(days=365.25)
MARKET_TIMEZONE = "America/New_York"

HISTORY_END = datetime(2026, 11, 20, 20, tzinfo=UTC)
"""The `now` of every chart that is asked of the database itself; the last slot is there."""
COMPLETE_UNTIL = HISTORY_END.replace(hour=0)
RAW_KEPT_FROM = COMPLETE_UNTIL - timedelta(days=100)
ROLLUPS_KEPT_FROM = COMPLETE_UNTIL - timedelta(days=400)
ROLLUPS = {"30m": "30 minutes", "1h": "1 hour", "3h": "3 hours"}

_INSERT_PRICES_OF_OURS = f"""
INSERT INTO asset_prices (symbol, price, traded_at, received_at, updated_at, feed)
SELECT 'S' || n, 10 + n * 1.37, now(), now(), now(), 'iex' FROM generate_series(1, {SYMBOLS}) AS n
"""
_INSERT_PRICES_OF_SEED = f"""
INSERT INTO asset_prices (symbol, price, updated_at)
SELECT 'S' || n, 10 + n * 1.37, now() FROM generate_series(1, {SYMBOLS}) AS n
"""
_INSERT_USERS = """
INSERT INTO users (id, subject, cash_balance, is_active)
SELECT n, 'user' || n, n % 1000 * 10, TRUE FROM generate_series(1, $1::integer) AS n
"""
_INSERT_POSITIONS = f"""
INSERT INTO positions (user_id, ticker, shares, cost_basis)
SELECT user_id, 'S' || (1 + (user_id * 7 + n * 13) % {SYMBOLS}), 10.5 + n, 1000 + n
FROM generate_series(1, $1::integer) AS user_id CROSS JOIN generate_series(1, {POSITIONS}) AS n
"""

# From 100,000 dollars on, another value every five minutes.
_VALUES = """
SELECT
    *,
    user_id % 1000 * 10 AS cash_balance,
    total_value - user_id % 1000 * 10 AS investment_value
FROM (
    SELECT
        *,
        (
            10000000 + user_id % 1000 * 1000
            + (extract(epoch FROM timestamp)::bigint / 300 * 7919 + user_id * 104729) % 1000000
        ) * 0.01 AS total_value
    FROM ({rows}) AS rows
) AS valued
"""
_SLOTS = _VALUES.format(
    rows="""
    SELECT timestamp, user_id
    FROM generate_series($1::timestamptz, $2::timestamptz - interval '1 second', interval '5 minutes') AS timestamp
    JOIN lives ON since <= timestamp
    ORDER BY timestamp, user_id
    """
)
_INSERT_SLOTS_OF_OURS = f"""
INSERT INTO portfolio_snapshots
    (timestamp, user_id, unpriced_positions, simulated, total_value, cash_balance, investment_value)
SELECT timestamp, user_id, 0, FALSE, total_value, cash_balance, investment_value FROM ({_SLOTS}) AS slots
"""
_INSERT_SLOTS_OF_SEED = f"""
INSERT INTO portfolio_snapshots (user_id, total_value, cash_balance, investment_value, timestamp)
SELECT user_id, total_value, cash_balance, investment_value, timestamp FROM ({_SLOTS}) AS slots
"""
_INSERT_ROLLUP = """
INSERT INTO portfolio_rollups_{tier}
    (bucket, timestamp, user_id, unpriced_positions, simulated, total_value, cash_balance, investment_value)
SELECT bucket, timestamp, user_id, 0, FALSE, total_value, cash_balance, investment_value FROM ({values}) AS rollup
"""
_BUCKETS = """
SELECT bucket, bucket + interval '{width}' - interval '5 minutes' AS timestamp, user_id
FROM generate_series($1::timestamptz, $2::timestamptz - interval '1 second', interval '{width}') AS bucket
JOIN lives ON since <= bucket + interval '{width}' - interval '5 minutes'
ORDER BY bucket, user_id
"""
_MARKET_DATES = f"""
SELECT
    day AT TIME ZONE '{MARKET_TIMEZONE}' AS bucket,
    (day + interval '1 day') AT TIME ZONE '{MARKET_TIMEZONE}' - interval '5 minutes' AS timestamp,
    user_id
FROM generate_series(
    date_trunc('day', $1::timestamptz, '{MARKET_TIMEZONE}') AT TIME ZONE '{MARKET_TIMEZONE}',
    $2::timestamptz AT TIME ZONE '{MARKET_TIMEZONE}' - interval '1 second',
    interval '1 day'
) AS day
JOIN lives ON since <= (day + interval '1 day') AT TIME ZONE '{MARKET_TIMEZONE}' - interval '5 minutes'
WHERE day AT TIME ZONE '{MARKET_TIMEZONE}' >= $1
ORDER BY day, user_id
"""

# The seed's indexes are built after its rows, which gives it the densest indexes that it can have.
_SEED_CONSTRAINTS = {
    "portfolio_snapshots_pkey": "PRIMARY KEY (id)",
    "portfolio_snapshots_user_id_timestamp_key": "UNIQUE (user_id, timestamp)",
    "portfolio_snapshots_user_id_fkey": "FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE",
}

Span = tuple[datetime, datetime]
_Connection = asyncpg.Connection


# ---- portfolios ----------------------------------------------------------------------------------


async def portfolios_of_ours(url: str, users: int) -> None:
    """Fill the project's schema with users, prices and positions."""
    await _insert_portfolios(url, users, _INSERT_PRICES_OF_OURS)


async def portfolios_of_seed(url: str, users: int) -> None:
    """Make the seed's literal schema and fill in the same users, prices and positions."""
    own = engine(url)
    async with own.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await own.dispose()
    await _insert_portfolios(url, users, _INSERT_PRICES_OF_SEED)


async def _insert_portfolios(url: str, users: int, insert_prices: str) -> None:
    async with connected(url) as connection:
        await connection.execute(insert_prices)
        await connection.execute(_INSERT_USERS, users)
        await connection.execute(_INSERT_POSITIONS, users)
        await connection.execute("VACUUM (ANALYZE, FREEZE)")


async def refresh_prices(url: str) -> None:
    """Make the prices of a kept database fresh for the hours to come."""
    async with connected(url) as connection:
        await connection.execute("UPDATE asset_prices SET updated_at = now() + interval '6 hours'")
        await connection.execute("VACUUM (ANALYZE) asset_prices")


# ---- histories -----------------------------------------------------------------------------------


def lengths(size: Size) -> dict[int, timedelta]:
    """Return how long each user's history is, by user id: many of some months, then one of each of `size.years`."""
    many = dict.fromkeys(range(1, size.chart_users + 1), size.chart_days * DAY)
    return many | {size.chart_users + 1 + n: years * YEAR for n, years in enumerate(size.years)}


async def history_of_ours(url: str, size: Size) -> None:
    """Fill in histories as retention leaves them: raw for 100 days, rollups for 400, market dates for ever."""
    lives = lengths(size)
    await portfolios_of_ours(url, len(lives))
    oldest = _slot_before(HISTORY_END - max(lives.values()))
    async with connected(url) as connection:
        await _make_lives(connection, lives)
        raw_from, rollups_from = max(oldest, RAW_KEPT_FROM), max(oldest, ROLLUPS_KEPT_FROM)
        await connection.execute("SELECT make_history_partitions($1, $2, '{raw}')", raw_from, HISTORY_END)
        await connection.execute("SELECT make_history_partitions($1, $2, '{30m}')", raw_from, HISTORY_END)
        await connection.execute(
            "SELECT make_history_partitions($1, $2, '{1h,3h}')", rollups_from, HISTORY_END
        )
        await _insert_chunks(
            connection, _INSERT_SLOTS_OF_OURS, "snapshots", (raw_from, HISTORY_END + SLOT), DAY
        )
        for tier, width in ROLLUPS.items():
            statement = _INSERT_ROLLUP.format(
                tier=tier, values=_VALUES.format(rows=_BUCKETS.format(width=width))
            )
            first = (raw_from if tier == "30m" else rollups_from).replace(hour=0, minute=0)
            await _insert_chunks(connection, statement, f"rollups {tier}", (first, COMPLETE_UNTIL), 10 * DAY)
        statement = _INSERT_ROLLUP.format(tier="1d", values=_VALUES.format(rows=_MARKET_DATES))
        await _insert_chunks(
            connection, statement, "rollups 1d", (oldest.replace(hour=0, minute=0), COMPLETE_UNTIL), 100 * DAY
        )
        await connection.execute(
            "UPDATE history_tiers SET complete_until = $1 WHERE tier IN ('30m', '1h', '3h', '1d')",
            COMPLETE_UNTIL,
        )
        await connection.execute(
            "UPDATE history_tiers SET kept_from = $1 WHERE tier IN ('raw', '30m')", RAW_KEPT_FROM
        )
        await connection.execute(
            "UPDATE history_tiers SET kept_from = $1 WHERE tier IN ('1h', '3h')", ROLLUPS_KEPT_FROM
        )
        await connection.execute("VACUUM (ANALYZE)")


async def history_of_seed(url: str, size: Size) -> None:
    """Fill in the same histories as the seed keeps them: every snapshot, for ever."""
    lives = lengths(size)
    await portfolios_of_seed(url, len(lives))
    oldest = _slot_before(HISTORY_END - max(lives.values()))
    recent = max(oldest, RAW_KEPT_FROM)
    async with connected(url) as connection:
        await _make_lives(connection, lives)
        await connection.execute(
            "ALTER TABLE position_snapshots DROP CONSTRAINT position_snapshots_portfolio_snapshot_id_fkey"
        )
        for name in _SEED_CONSTRAINTS:
            await connection.execute(f"ALTER TABLE portfolio_snapshots DROP CONSTRAINT {name}")
        await _insert_chunks(connection, _INSERT_SLOTS_OF_SEED, "seed, old", (oldest, recent), 30 * DAY)
        await _insert_chunks(
            connection, _INSERT_SLOTS_OF_SEED, "seed, snapshots", (recent, HISTORY_END + SLOT), DAY
        )
        constraints = _SEED_CONSTRAINTS.items()
        for name, definition in progress(
            "seed, indexes", constraints, total=len(constraints), unit="indexes"
        ):
            await connection.execute(f"ALTER TABLE portfolio_snapshots ADD CONSTRAINT {name} {definition}")
        await connection.execute(
            """
            ALTER TABLE position_snapshots ADD CONSTRAINT position_snapshots_portfolio_snapshot_id_fkey
            FOREIGN KEY (portfolio_snapshot_id) REFERENCES portfolio_snapshots (id) ON DELETE CASCADE
            """
        )
        await connection.execute("VACUUM (ANALYZE)")


async def recent_history(url: str, users: int, first: datetime, last: datetime, *, seed_like: bool) -> None:
    """Give each of the users a snapshot for every slot from `first` until before `last`."""
    async with connected(url) as connection:
        await _make_lives(connection, dict.fromkeys(range(1, users + 1), last - first), end=last)
        if not seed_like:
            await connection.execute("SELECT make_history_partitions($1, $2)", first, last)
        statement = _INSERT_SLOTS_OF_SEED if seed_like else _INSERT_SLOTS_OF_OURS
        what = f"the last {(last - first) / timedelta(hours=1):.0f} h{', seed-like' if seed_like else ''}"
        await _insert_chunks(connection, statement, what, (first, last), timedelta(hours=1))
        await connection.execute("VACUUM (ANALYZE) portfolio_snapshots")
        await connection.execute("CHECKPOINT")


async def _make_lives(
    connection: _Connection, lives: Mapping[int, timedelta], *, end: datetime = HISTORY_END
) -> None:
    await connection.execute("CREATE TEMPORARY TABLE lives (user_id INTEGER PRIMARY KEY, since TIMESTAMPTZ)")
    await connection.executemany(
        "INSERT INTO lives (user_id, since) VALUES ($1, $2)",
        [(user_id, _slot_before(end - length)) for user_id, length in lives.items()],
    )
    await connection.execute("ANALYZE lives")


async def _insert_chunks(
    connection: _Connection, statement: str, what: str, span: Span, width: timedelta
) -> None:
    """Run the statement for each chunk of `width` of the span, a commit each."""
    first, end = span
    starts = [first + n * width for n in range(-(-(end - first) // width))]
    for start in progress(what, starts, total=len(starts), unit="chunks"):
        await connection.execute(statement, start, min(start + width, end))
        await asyncio.sleep(0)


def _slot_before(instant: datetime) -> datetime:
    return datetime.fromtimestamp(instant.timestamp() // 300 * 300, UTC)
