"""What a user and slot costs on disk and in the write-ahead log: the seed's literal schema, and ours."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from bench.data import DAY, POSITIONS
from bench.figures import Figure, Measured, middle
from bench.progress import progress, say
from bench.rollups import roll_up_all
from bench.server import Databases, connected
from bench.sizes import Size
from bench.snapshots import first_slots, kept_portfolios
from services.snapshotter import history, queries
from services.snapshotter.settings import Settings
from shared import database as databases

CHECKPOINTS = 5
SLOTS_PER_DAY = 288
_DAYS_PER_YEAR = 365.25
_YEARS = tuple(10 ** (exponent / 10) for exponent in range(-15, 11))
_ROWS_PER_SLOT = {"30m": 1 / 6, "1h": 1 / 12, "3h": 1 / 36, "1d": 1 / 288}
_TABLES = ("portfolio_snapshots", "position_snapshots")

# Slots and details as the loop would write them, in the order of users, without what its commits cost: less than it.
_TAKE_SEED_LIKE = """
WITH priced AS (
    SELECT
        user_id, ticker, shares, cost_basis, price AS price_per_share, round(shares * price, 2) AS current_value
    FROM positions JOIN asset_prices ON symbol = ticker
),
taken AS (
    INSERT INTO portfolio_snapshots (user_id, total_value, cash_balance, investment_value, timestamp)
    SELECT id, cash_balance + sum(current_value), cash_balance, sum(current_value), $1
    FROM users JOIN priced ON user_id = users.id
    GROUP BY users.id
    ORDER BY users.id
    RETURNING id, user_id
)
INSERT INTO position_snapshots
    (portfolio_snapshot_id, ticker, shares, cost_basis, current_value, price_per_share)
SELECT taken.id, ticker, shares, cost_basis, current_value, price_per_share
FROM taken JOIN priced USING (user_id)
ORDER BY taken.id
"""
# With their indexes; a partitioned table itself occupies nothing, its partitions do.
_BYTES = """
SELECT sum(
    pg_total_relation_size(name::regclass)
    + COALESCE((SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree(name::regclass) WHERE isleaf), 0)
)::bigint
FROM unnest($1::text[]) AS name
"""

Take = Callable[[datetime], Awaitable[object]]


@dataclass(frozen=True)
class _Costs:
    """Bytes per user and slot."""

    wal: float
    wal_after_checkpoint: float
    disk: float
    portfolio_disk: float
    """Of it, without the details of positions."""


async def measure(server: Databases, size: Size) -> Measured:
    slots = first_slots(size.storage_slots + 2 * CHECKPOINTS)
    say(f"  {size.storage_users} users, {size.storage_slots} slots, both schemas")
    ours_name = await kept_portfolios(server, size.storage_users, seed_like=False)
    seed_name = await kept_portfolios(server, size.storage_users, seed_like=True)
    async with (
        server.copy(ours_name) as url,
        databases.connect(
            url, application_name="bench", connections_max=1, server_settings=queries.SERVER_SETTINGS
        ) as database,
        connected(url) as connection,
    ):
        await connection.execute("SELECT make_history_partitions($1, $2)", slots[0], slots[-1])
        ours = await _costs(
            connection, size, slots, lambda slot: queries.take_snapshots(database, slot, 0, 1), "ours"
        )
        await roll_up_all(database, slots[0] + 2 * DAY)
        rollup_rows = {rollup.tier: await _row_bytes(connection, rollup.table) for rollup in history.ROLLUPS}
    async with server.copy(seed_name) as url, connected(url) as connection:
        seed = await _costs(
            connection, size, slots, lambda slot: connection.execute(_TAKE_SEED_LIKE, slot), "seed-like"
        )
    rollups = sum(bytes_ * _ROWS_PER_SLOT[tier] for tier, bytes_ in rollup_rows.items())
    return Measured(
        [
            Figure(
                f"WAL per user and slot, {POSITIONS} positions", "bytes", ours.wal, seed.wal, below_min=0.3
            ),
            Figure(
                "  right after a checkpoint (whole pages)",
                "bytes",
                ours.wal_after_checkpoint,
                seed.wal_after_checkpoint,
            ),
            Figure("disk per user and slot, with details", "bytes", ours.disk, seed.disk, below_min=0.3),
            Figure(
                "  and with its share of the rollups", "bytes", ours.disk + rollups, seed.disk, below_min=0.3
            ),
            Figure("  without details, without rollups", "bytes", ours.portfolio_disk, seed.portfolio_disk),
        ],
        {
            "ours": [(years, _kept_bytes(ours, rollup_rows, years)) for years in _YEARS],
            "seed": [(years, seed.disk * SLOTS_PER_DAY * _DAYS_PER_YEAR * years) for years in _YEARS],
        },
    )


def _kept_bytes(costs: _Costs, rollup_rows: dict[str, float], years: float) -> float:
    """Return the bytes that a user occupies after so many years of snapshots, with the default retention."""
    upkeep = Settings.model_construct().upkeep
    days = years * _DAYS_PER_YEAR

    def slots(kept: timedelta | None) -> float:
        return SLOTS_PER_DAY * (days if kept is None else min(days, kept / DAY))

    return (
        slots(upkeep.positions_for) * (costs.disk - costs.portfolio_disk)
        + slots(upkeep.snapshots_for) * costs.portfolio_disk
        + sum(
            slots(upkeep.kept_for.get(tier)) * _ROWS_PER_SLOT[tier] * bytes_
            for tier, bytes_ in rollup_rows.items()
        )
    )


async def _costs(
    connection: "asyncpg.Connection[asyncpg.Record]", size: Size, slots: list[datetime], take: Take, what: str
) -> _Costs:
    steady, checkpointed = [], []
    filling = slots[: size.storage_slots]
    for slot in progress(f"storage, {what}", filling, total=len(filling), unit="slots"):
        steady.append(await _wal_bytes(connection, take, slot))
    disk = await connection.fetchval(_BYTES, _TABLES)
    portfolio_disk = await connection.fetchval(_BYTES, _TABLES[:1])
    for slot in slots[size.storage_slots :: 2]:
        await connection.execute("CHECKPOINT")
        checkpointed.append(await _wal_bytes(connection, take, slot))
    rows = size.storage_users * size.storage_slots
    last = steady[len(steady) // 2 :]  # the first ones extend empty tables
    return _Costs(
        middle(last) / size.storage_users,
        middle(checkpointed) / size.storage_users,
        disk / rows,
        portfolio_disk / rows,
    )


async def _row_bytes(connection: "asyncpg.Connection[asyncpg.Record]", table: str) -> float:
    rows: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
    size: int = await connection.fetchval(_BYTES, [table])
    return size / max(rows, 1)


async def _wal_bytes(connection: "asyncpg.Connection[asyncpg.Record]", take: Take, slot: datetime) -> float:
    before = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
    await take(slot)
    return float(
        await connection.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1::pg_lsn)", before)
    )
