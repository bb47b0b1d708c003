"""`make load-demo`: users with a history, on a real database."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from local import load
from local.load import LoadRefused
from services.snapshotter.upkeep import Upkeep
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
    stored = await load.load(
        database_url,
        POLICY,
        utc_now(),
        users=users,
        days=days,
        disk=folder,
        progress=lambda _, part: parts.append(part),
    )
    return stored, parts


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
    assert parts[-1] == pytest.approx(1, abs=0.5)
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
    yesterday = last_boundary(utc_now(), timedelta(days=1)) - timedelta(days=1)
    hours = "SELECT count(*) FROM portfolio_rollups_1h WHERE bucket BETWEEN $1 AND $2"
    assert await database.fetch_value(hours, yesterday, yesterday + timedelta(hours=23)) == 4 * 24


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
