"""What the migration to history by time makes of a database of before."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from services.snapshotter import history, queries
from shared import database as databases
from shared.database import Database
from tests.conftest import ROOT
from tests.servers import Servers

MONDAY = datetime(2026, 3, 2, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
async def old_url(servers: Servers) -> AsyncIterator[str]:
    """The URL of an empty database at the revision before."""
    name = f"foliotick_old_{os.getpid()}"
    administrator = await asyncpg.connect(servers.database_url, timeout=10)
    await administrator.execute(f"CREATE DATABASE {name}")
    url = urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
    migrate(url, "0001")
    yield url
    await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await administrator.close()


def migrate(url: str, revision: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", revision],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        check=True,
        capture_output=True,
    )


@pytest.fixture
async def old(old_url: str) -> AsyncIterator[Database]:
    async with databases.connect(old_url, application_name="tests", connections_max=2) as connected:
        yield connected


async def fill(database: Database) -> None:
    """Three users, one of them deactivated; a snapshot of each every day for four months, and details of two."""
    await database.fetch(
        """
        INSERT INTO users (id, subject, cash_balance, is_active)
        VALUES (3, 'first', 1, TRUE), (1000000, 'second', 2.50, TRUE), (2147483647, 'last', 0, FALSE)
        """
    )
    await database.fetch("INSERT INTO positions SELECT id, 'AAPL', 1.5, 10 FROM users")
    await database.fetch("INSERT INTO asset_prices VALUES ('AAPL', 10, now(), now(), now(), 'iex')")
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots
            (user_id, timestamp, total_value, cash_balance, investment_value, unpriced_positions, simulated)
        SELECT id, day, 100 + id % 7 + extract(day FROM day), cash_balance, 99, id % 3, id = 3
        FROM users CROSS JOIN generate_series($1::timestamptz, $1::timestamptz + interval '119 days', '1 day') AS day
        """,
        MONDAY,
    )
    await database.fetch(
        """
        INSERT INTO position_snapshots
            (portfolio_snapshot_id, timestamp, ticker, shares, cost_basis, current_value, price_per_share)
        SELECT id, timestamp, ticker, 1.000000001, 2.01, 3.02, 4.0003
        FROM portfolio_snapshots CROSS JOIN (VALUES ('AAPL'), ('BRK.B')) AS held (ticker)
        WHERE user_id <> 3
        """
    )


SNAPSHOTS = """
SELECT user_id::bigint, timestamp, total_value, cash_balance, investment_value, unpriced_positions, simulated
FROM portfolio_snapshots ORDER BY user_id, timestamp
"""
OLD_DETAILS = """
SELECT user_id::bigint, detail.timestamp, ticker, shares, cost_basis, current_value, price_per_share
FROM position_snapshots AS detail JOIN portfolio_snapshots AS snapshot ON snapshot.id = portfolio_snapshot_id
ORDER BY user_id, timestamp, ticker
"""
DETAILS = """
SELECT user_id::bigint, timestamp, ticker, shares, cost_basis, current_value, price_per_share
FROM position_snapshots ORDER BY user_id, timestamp, ticker
"""
OTHERS = (
    "SELECT id::bigint, subject, cash_balance, is_active, created_at FROM users ORDER BY id",
    "SELECT user_id::bigint, ticker, shares, cost_basis FROM positions ORDER BY user_id",
    "SELECT * FROM asset_prices",
    "SELECT * FROM portfolio_valuations ORDER BY user_id",
    "SELECT * FROM priced_positions ORDER BY user_id",
)


async def test_everything_stays_as_it_was(old: Database, old_url: str) -> None:
    await fill(old)
    before = [await old.fetch(statement) for statement in (SNAPSHOTS, OLD_DETAILS, *OTHERS)]
    assert [len(rows) for rows in before[:3]] == [360, 480, 3]
    migrate(old_url, "0002")
    async with databases.connect(old_url, application_name="tests", connections_max=1) as migrated:
        after = [await migrated.fetch(statement) for statement in (SNAPSHOTS, DETAILS, *OTHERS)]
    assert after == before


async def test_what_was_there_is_deleted_rolled_up_and_added_to_as_anything_else(
    old: Database, old_url: str
) -> None:
    await fill(old)
    migrate(old_url, "0002")
    async with databases.connect(old_url, application_name="tests", connections_max=2) as migrated:
        for rollup in history.ROLLUPS:
            while await history.roll_up(migrated, rollup, MONDAY + 200 * DAY, "UTC"):
                pass
            rows = await migrated.fetch_value(f"SELECT count(*) FROM {rollup.table}")  # noqa: S608
            assert rows == 360
        # Of the two active users, who have no snapshot of this slot.
        taken = await queries.take_snapshots(migrated, MONDAY + timedelta(minutes=5), 0, 1)
        assert (taken.added, taken.positions) == (2, 2)
        await migrated.fetch("DELETE FROM users WHERE id = 1000000")
        for table, left in (
            ("portfolio_snapshots", 2 * 120 + 1),
            ("position_snapshots", 240 + 1),
            ("portfolio_rollups_1d", 240),
            ("positions", 2),
        ):
            assert await migrated.fetch_value(f"SELECT count(*) FROM {table}") == left, table  # noqa: S608


async def test_row_of_a_clock_that_was_wrong_makes_no_thousands_of_tables(
    old: Database, old_url: str
) -> None:
    await fill(old)
    for year in (1970, 2099):
        await old.fetch(
            """
            INSERT INTO portfolio_snapshots (user_id, timestamp, total_value, cash_balance, investment_value)
            VALUES (3, $1, 1, 1, 0)
            """,
            datetime(year, 1, 1, tzinfo=UTC),
        )
    migrate(old_url, "0002")
    async with databases.connect(old_url, application_name="tests", connections_max=1) as migrated:
        assert await migrated.fetch_value("SELECT count(*) FROM portfolio_snapshots") == 362
        # 120 days from a Monday are 18 weeks; the two odd ones, and those of now.
        assert await migrated.fetch_value("SELECT count(*) FROM history_partitions('raw')") <= 18 + 2 + 2


async def test_next_users_id_goes_on_from_the_last(old: Database, old_url: str) -> None:
    for subject in ("first", "second"):
        await old.fetch("INSERT INTO users (subject) VALUES ($1)", subject)
    migrate(old_url, "head")
    async with databases.connect(old_url, application_name="tests", connections_max=1) as migrated:
        assert await migrated.fetch_value("INSERT INTO users (subject) VALUES ('third') RETURNING id") == 3
        assert await migrated.check_schema() is None


async def test_id_that_does_not_fit_changes_nothing(old: Database, old_url: str) -> None:
    await fill(old)
    await old.fetch("INSERT INTO users (id, subject) VALUES (2147483648, 'too far')")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        migrate(old_url, "0002")
    assert b"integer out of range" in failed.value.stdout + failed.value.stderr
    assert len(await old.fetch(OLD_DETAILS)) == 480
