"""`make load-demo`: many users with a long history, for whoever wants to see how the system does with them.

Prices walk at random back from the present ones, so that the history ends where the live values begin. Snapshots are
as dense as they are kept, and the snapshotter's own upkeep makes the rollups of them.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from pathlib import Path

from services.snapshotter import upkeep
from services.snapshotter.upkeep import Upkeep
from shared import database as databases
from shared.clock import last_boundary
from shared.database import Connection, Database

SUBJECT_PREFIX = "load-"
COUNT_MAX = 999_999
"""Of users, and of days."""
DETAILS_REACH = timedelta(days=1)
"""Positions are stored for so long only: they would be ten times the rest."""
ROWS_AT_ONCE = 200_000
USERS_DELETED_AT_ONCE = 50
ROUNDS_MAX = 100
SNAPSHOT_BYTES = 135
"""Of one row with its index and its share of the rollups."""
TIMEOUT_SECONDS = 600.0

Progress = Callable[[str, float], None]
"""Is told what is being done, and how much of it is done, from 0 to 1."""


@dataclass(frozen=True)
class Loaded:
    """What has been filled in."""

    snapshots: int
    begins_at: datetime
    """The first slot; later than asked for where what is older has been dropped already."""


class LoadRefused(Exception):
    """The history cannot be filled; the text says why."""


async def load(
    database_url: str, policy: Upkeep, now: datetime, *, users: int, days: int, disk: Path, progress: Progress
) -> Loaded:
    """Add users with a history of so many days, except for what is older than history is still kept.

    Raises LoadRefused when there is no price yet, no room, or when such users are there already.
    """
    slots = list(history_slots(now, timedelta(days=days), policy))
    needed = len(slots) * users * SNAPSHOT_BYTES
    if shutil.disk_usage(disk).free < 2 * needed:
        raise LoadRefused(
            f"there is no room: it takes about {needed / 1e9:.1f} GB, and as much should stay free"
        )
    async with _connected(database_url) as database:
        kept_from = await database.fetch_value(_KEPT_FROM)
        slots = [slot for slot in slots if kept_from is None or slot >= kept_from]
        if not slots:
            raise LoadRefused("all of that time has been dropped already")
        await _create_users(database, users)
        await _walk_prices(database, slots)
        # What is there already stays until it has been rolled up together with what comes.
        await database.fetch("SELECT reopen_history($1)", slots[0])
        stored, begins_at = 0, slots[-1]
        for _, week in groupby(slots, week_of):
            batch = list(week)
            rows = await _store_week(database, batch, now - DETAILS_REACH, max(1, ROWS_AT_ONCE // users))
            stored += rows
            begins_at = min(begins_at, batch[0]) if rows else begins_at
            progress(f"snapshots of {users:,} users", stored / (len(slots) * users))
    async with _connected(database_url, connections_max=2) as database:
        await _roll_up(database, policy, now, slots[0], progress)
        for table in (
            "portfolio_snapshots",
            *(f"portfolio_rollups_{tier}" for tier in ("30m", "1h", "3h", "1d")),
        ):
            await database.fetch(f"VACUUM (ANALYZE) {table}", timeout=TIMEOUT_SECONDS)
    return Loaded(stored, begins_at)


async def unload(database_url: str, progress: Progress) -> int:
    """Delete the users that `load` made, with all that is theirs; return how many there were."""
    async with _connected(database_url) as database:
        ids = [
            row["id"]
            for row in await database.fetch(
                "SELECT id FROM users WHERE starts_with(subject, $1)", SUBJECT_PREFIX
            )
        ]
        for start in range(0, len(ids), USERS_DELETED_AT_ONCE):
            some = ids[start : start + USERS_DELETED_AT_ONCE]
            await database.fetch("DELETE FROM users WHERE id = ANY ($1)", some, timeout=TIMEOUT_SECONDS)
            progress("deleting users", (start + len(some)) / len(ids))
    return len(ids)


def history_slots(now: datetime, reach: timedelta, policy: Upkeep) -> Iterator[datetime]:
    """Yield the slots before the current one, oldest first: all that are kept, then those of hours, then of days."""
    ages = (
        (timedelta(minutes=5), min(reach, policy.snapshots_for)),
        (timedelta(hours=1), min(reach, policy.rollups_for)),
        (timedelta(days=1), reach),
    )
    slots: set[datetime] = set()
    for width, age in ages:
        at = last_boundary(now, width)
        while at >= now - age:
            slots.add(at)
            at -= width
    slots.discard(last_boundary(now, ages[0][0]))  # the snapshotter's own
    yield from sorted(slots)


def _connected(database_url: str, *, connections_max: int = 1) -> AbstractAsyncContextManager[Database]:
    # With one connection a temporary table is there for every statement.
    return databases.connect(
        database_url,
        application_name="load_demo",
        connections_max=connections_max,
        statement_timeout_seconds=TIMEOUT_SECONDS,
        server_settings={"work_mem": "64MB"},
    )


async def _create_users(database: Database, users: int) -> None:
    """Between 3 and 17 positions each, in symbols that have a price, worth some thousands each."""
    if await database.fetch_value(
        "SELECT EXISTS (SELECT FROM users WHERE starts_with(subject, $1))", SUBJECT_PREFIX
    ):
        raise LoadRefused("there are such users already; `make load-demo USERS=0` deletes them")
    if not await database.fetch_value("SELECT EXISTS (SELECT FROM asset_prices)"):
        raise LoadRefused("no symbol has a price yet")
    await database.fetch(
        """
        WITH made AS (
            INSERT INTO users (subject, cash_balance)
            SELECT $1 || lpad(n::text, 6, '0'), round((random() * 5000)::numeric, 2)
            FROM generate_series(1, $2::integer) AS n
            RETURNING id
        )
        INSERT INTO positions (user_id, ticker, shares, cost_basis)
        SELECT id, symbol, shares, round(shares * price * (0.6 + 0.6 * random())::numeric, 2)
        FROM made
        CROSS JOIN LATERAL (
            SELECT symbol, price, round((1500 * exp(1.0 * random_normal()) / price)::numeric + 0.01, 2) AS shares
            FROM asset_prices
            WHERE made.id > 0
            ORDER BY random()
            LIMIT 3 + floor(15 * random())::integer
        ) AS held
        """,
        SUBJECT_PREFIX,
        users,
        timeout=TIMEOUT_SECONDS,
    )


async def _walk_prices(database: Database, slots: list[datetime]) -> None:
    """Let each price walk back at random, by 30 percent a year, with a rise of 8 percent a year."""
    await database.fetch(
        "CREATE TEMPORARY TABLE past_prices (symbol TEXT, at TIMESTAMPTZ, price NUMERIC(15, 4))"
    )
    await database.fetch(
        """
        INSERT INTO past_prices (symbol, at, price)
        SELECT
            symbol,
            at,
            GREATEST(round(price * exp(sum(0.3 * sqrt(years) * random_normal() - 0.08 * years) OVER (
                PARTITION BY symbol ORDER BY at DESC
            ))::numeric, 4), 0.0001)
        FROM asset_prices
        CROSS JOIN (
            SELECT at, extract(epoch FROM lead(at, 1, now()) OVER (ORDER BY at) - at)::float / 31557600 AS years
            FROM unnest($1::timestamptz[]) AS at
        ) AS steps
        """,
        slots,
        timeout=TIMEOUT_SECONDS,
    )
    await database.fetch("CREATE INDEX ON past_prices (at)", timeout=TIMEOUT_SECONDS)
    await database.fetch("ANALYZE past_prices", timeout=TIMEOUT_SECONDS)


_KEPT_FROM = "SELECT NULLIF(kept_from, '-infinity') FROM history_tiers WHERE tier = 'raw'"


def week_of(slot: datetime) -> date:
    """Return the Monday, UTC, at which the partition of the slot begins."""
    day = slot.astimezone(UTC).date()
    return day - timedelta(days=day.weekday())


async def _store_week(
    database: Database, slots: list[datetime], details_since: datetime, slots_at_once: int
) -> int:
    """Store slots of one week; return how many snapshots, none when the week has been dropped already.

    A running snapshotter rolls up what it sees and drops what is expired then, as some of this is. So it sees a
    week's partition when the week is complete, and never finds it rolled up before.
    """
    stored = 0
    async with database.transaction() as connection:
        # From here to the commit nobody rolls anything up or drops anything.
        await connection.execute("SELECT reopen_history($1)", slots[0], timeout=TIMEOUT_SECONDS)
        kept_from = await connection.fetchval(_KEPT_FROM)
        if kept_from is not None and slots[0] < kept_from:
            return 0
        for start in range(0, len(slots), slots_at_once):
            some = slots[start : start + slots_at_once]
            stored += await _store(connection, some[0], some[-1], details_since)
    return stored


async def _store(connection: Connection, first: datetime, last: datetime, details_since: datetime) -> int:
    """Value the portfolios at past prices as the snapshotter values them at current ones."""
    details_from = max(first, details_since)
    await connection.execute(
        "SELECT make_history_partitions($1, $2, '{raw}')", first, last, timeout=TIMEOUT_SECONDS
    )
    if details_from <= last:
        await connection.execute(
            "SELECT make_history_partitions($1, $2, '{details}')", details_from, last, timeout=TIMEOUT_SECONDS
        )
    stored: int = await connection.fetchval(
        """
        WITH valued AS MATERIALIZED (
            SELECT at, users.id AS user_id, cash_balance, ticker, shares, cost_basis, price,
                round(shares * price, 2) AS current_value
            FROM users
            JOIN positions ON positions.user_id = users.id
            JOIN past_prices ON past_prices.symbol = ticker
            WHERE starts_with(subject, $1) AND at BETWEEN $2 AND $3
        ),
        stored AS (
            INSERT INTO portfolio_snapshots
                (timestamp, user_id, simulated, total_value, cash_balance, investment_value)
            SELECT at, user_id, TRUE, cash_balance + sum(current_value), cash_balance, sum(current_value)
            FROM valued
            GROUP BY at, user_id, cash_balance
            ORDER BY at, user_id
            ON CONFLICT (user_id, timestamp) DO NOTHING
            RETURNING timestamp, user_id
        ),
        detailed AS (
            INSERT INTO position_snapshots
                (timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share)
            SELECT at, user_id, ticker, shares, cost_basis, current_value, price
            FROM valued
            JOIN stored USING (user_id)
            WHERE at = timestamp AND at >= $4
            ORDER BY at, user_id
        )
        SELECT count(*) FROM stored
        """,
        SUBJECT_PREFIX,
        first,
        last,
        details_from,
        timeout=TIMEOUT_SECONDS,
    )
    return stored


async def _roll_up(
    database: Database, policy: Upkeep, now: datetime, first: datetime, progress: Progress
) -> None:
    """Do the upkeep until the rollups are complete; a running snapshotter does its share."""
    going = asyncio.Event()
    for _ in range(ROUNDS_MAX):
        work = asyncio.create_task(upkeep.keep(database, policy, now, going))
        while not work.done():
            await asyncio.wait({work}, timeout=1.0)
            behind = await _behind(database, now, first)
            progress("rollups", 1 - behind / (now - first))
        await work
        # What is not due: a date of the market, which may have 25 hours, and what is not settled.
        if behind <= timedelta(hours=25) + policy.interval + upkeep.SETTLED_AFTER:
            break
    progress("rollups", 1)


async def _behind(database: Database, now: datetime, first: datetime) -> timedelta:
    behind: timedelta = await database.fetch_value(
        """
        SELECT $1 - min(greatest(complete_until, $2))
        FROM history_tiers
        WHERE tier NOT IN ('raw', 'details')
        """,
        now,
        first,
    )
    return behind
