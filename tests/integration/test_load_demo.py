"""`make load-demo`: users with a history, on a real database."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from local import load
from local.load import LoadRefused
from services.snapshotter import history, upkeep
from services.snapshotter.upkeep import Upkeep
from shared import database as databases
from shared.clock import last_boundary, utc_now
from shared.database import Database
from tests.factories import create_user, set_price

DAYS = 3
POLICY = Upkeep(
    interval=timedelta(minutes=5),
    market_timezone="America/New_York",
    snapshots_for=timedelta(days=2),
    positions_for=timedelta(days=1),
    rollups_for=timedelta(days=92),
)


async def loaded(
    database_url: str, folder: Path, *, users: int = 4, days: int = DAYS
) -> tuple[int, list[float]]:
    """Load; return the snapshots stored and the progress reported."""
    parts: list[float] = []
    filled = await load.load(
        database_url,
        POLICY,
        utc_now(),
        users=users,
        days=days,
        disk=folder,
        progress=lambda _, part: parts.append(part),
    )
    return filled.snapshots, parts


def test_slots_are_as_dense_as_they_are_kept() -> None:
    now = datetime(2026, 3, 2, 15, 2, tzinfo=UTC)
    slots = list(load.history_slots(now, timedelta(days=95), POLICY))
    assert slots == sorted(set(slots))
    assert slots[0] == datetime(2025, 11, 28, tzinfo=UTC)  # a midnight, 94 days before
    assert slots[-1] == datetime(2026, 3, 2, 14, 55, tzinfo=UTC)  # 15:00 is the snapshotter's own slot
    # 575 of five minutes in two days, 90 x 24 of hours before, and midnights of the days before those
    assert len(slots) == 575 + 90 * 24 + 3


async def test_history_ends_where_the_live_values_begin(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    for number, price in enumerate(("10", "175.25", "0.5", "41000")):
        await set_price(database, f"S{number}", price)
    await create_user(database, "another", cash="7")
    stored, parts = await loaded(database_url, tmp_path)
    slots = list(load.history_slots(utc_now(), timedelta(days=DAYS), POLICY))
    assert abs(stored - 4 * len(slots)) <= 4  # a slot may have begun meanwhile
    assert parts[-1] == 1
    newest = await database.fetch(
        """
        SELECT snapshot.total_value, valuation.total_value AS live, snapshot.simulated
        FROM portfolio_valuations AS valuation
        CROSS JOIN LATERAL (
            SELECT * FROM portfolio_snapshots WHERE user_id = valuation.user_id ORDER BY timestamp DESC LIMIT 1
        ) AS snapshot
        WHERE starts_with(subject, 'load-')
        """
    )
    assert len(newest) == 4
    for row in newest:
        assert row["simulated"]
        assert abs(row["total_value"] / row["live"] - 1) < Decimal("0.05")  # minutes apart, at 30 % a year
    assert (
        await database.fetch_value(
            "SELECT count(*) FROM portfolio_snapshots AS s JOIN users ON id = user_id WHERE subject = 'another'"
        )
        == 0
    )
    wrong = """
        SELECT count(*)
        FROM portfolio_snapshots AS snapshot
        JOIN LATERAL (
            SELECT sum(current_value) AS value, count(*) AS positions
            FROM position_snapshots AS detail
            WHERE detail.user_id = snapshot.user_id AND detail.timestamp = snapshot.timestamp
        ) AS details ON positions > 0
        WHERE value <> investment_value
    """
    assert await database.fetch_value(wrong) == 0
    assert await database.fetch_value("SELECT count(DISTINCT timestamp) FROM position_snapshots") >= 287
    whole_day = last_boundary(utc_now(), timedelta(days=1)) - timedelta(
        days=2
    )  # yesterday may not be settled yet
    hours = "SELECT count(*) FROM portfolio_rollups_1h WHERE bucket BETWEEN $1 AND $2"
    assert await database.fetch_value(hours, whole_day, whole_day + timedelta(hours=23)) == 4 * 24


async def test_retention_meanwhile_loses_nothing_of_what_is_filled(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    """A snapshotter is running: after each week it rolls up, and drops all that is older than two days."""
    await set_price(database, "AAPL", "10")
    now = utc_now()
    await history.steady_since(database, now)
    await database.fetch("UPDATE history_clock SET steady_since = $1", now - upkeep.STEADY_FOR)
    dropped = []

    async def snapshotters_round() -> None:
        async with databases.connect(database_url, application_name="snapshotter", connections_max=1) as own:
            dropped.append((await upkeep.keep(own, POLICY, now, asyncio.Event())).dropped)

    with ThreadPoolExecutor(max_workers=1) as thread:

        def meanwhile(doing: str, _: float) -> None:
            if doing != "rollups":
                thread.submit(asyncio.run, snapshotters_round()).result(timeout=60)

        filled = await load.load(
            database_url,
            POLICY,
            now,
            users=2,
            days=24,
            disk=tmp_path,
            progress=meanwhile,
        )
    slots = list(load.history_slots(now, timedelta(days=24), POLICY))
    assert sum(dropped[:3]) >= 2  # weeks, and before the last of at least four was filled
    assert await database.fetch_value("SELECT min(timestamp) FROM portfolio_snapshots") > slots[0]
    assert filled.snapshots == 2 * len(slots)
    assert filled.begins_at == slots[0]
    zone = ZoneInfo(POLICY.market_timezone)
    today = (now - timedelta(minutes=20)).astimezone(zone).date()
    last = {slot.astimezone(zone).date(): slot for slot in slots}
    for user_id in [row["id"] for row in await database.fetch("SELECT id FROM users")]:
        days = await database.fetch(
            "SELECT bucket, timestamp FROM portfolio_rollups_1d WHERE user_id = $1", user_id
        )
        assert {row["bucket"].astimezone(zone).date(): row["timestamp"] for row in days} == {
            day: slot for day, slot in last.items() if day < today
        }
        hours = await database.fetch(
            "SELECT bucket FROM portfolio_rollups_1h WHERE user_id = $1 AND bucket < $2",
            *(user_id, last_boundary(now, timedelta(days=1)) - timedelta(days=1)),
        )
        assert {row["bucket"] for row in hours} == {
            last_boundary(slot, timedelta(hours=1))
            for slot in slots
            if slot < last_boundary(now, timedelta(days=1)) - timedelta(days=1)
        }


async def test_history_begins_where_it_is_still_kept(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    await set_price(database, "AAPL", "10")
    now = utc_now()
    kept_from = last_boundary(now, timedelta(days=1)) - timedelta(days=now.weekday() + 7)  # a Monday
    await database.fetch("UPDATE history_tiers SET kept_from = $1 WHERE tier = 'raw'", kept_from)
    filled = await load.load(
        database_url, POLICY, now, users=1, days=24, disk=tmp_path, progress=lambda *_: None
    )
    assert filled.begins_at == kept_from
    assert await database.fetch_value("SELECT min(timestamp) FROM portfolio_snapshots") == kept_from


async def test_second_load_is_refused_until_the_first_is_deleted(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    await set_price(database, "AAPL", "10")
    await create_user(database, "another", cash="7")
    await loaded(database_url, tmp_path, users=1, days=1)
    with pytest.raises(LoadRefused, match="such users already"):
        await loaded(database_url, tmp_path)
    assert await load.unload(database_url, lambda *_: None) == 1
    assert await database.fetch_value("SELECT string_agg(subject, ' ') FROM users") == "another"
    for table in (
        "portfolio_snapshots",
        "position_snapshots",
        "portfolio_rollups_30m",
        "portfolio_rollups_1d",
    ):
        assert await database.fetch_value(f"SELECT count(*) FROM {table}") == 0, table  # noqa: S608
    assert await load.unload(database_url, lambda *_: None) == 0


async def test_without_prices_or_room_nothing_is_made(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadRefused, match="no symbol has a price"):
        await loaded(database_url, tmp_path)
    with pytest.raises(LoadRefused, match="there is no room"):
        await loaded(database_url, tmp_path, users=999_999, days=36_000)
    assert await database.fetch_value("SELECT count(*) FROM users") == 0
