"""Migrations on a loaded system: who reads and who takes snapshots does not notice them."""

import asyncio
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from services.api_gateway import queries as gateway_queries
from services.api_gateway.performance import Buckets
from services.snapshotter import queries as snapshotter_queries
from shared import database as databases
from shared.clock import last_boundary, utc_now
from shared.database import Database, SchemaMissing
from shared.freshness import market_moment
from shared.market_hours import MarketHours
from tests.conftest import ROOT
from tests.servers import Servers
from tests.waiting import eventually

REVISIONS = sorted(re.findall(r"^(\d{4})_", "\n".join(os.listdir(ROOT / "migrations/versions")), re.M))
HELD_UP_SECONDS_MAX = {"current": 0.1, "chart": 0.1, "snapshot": 0.1, "order": 1.0}
"""Beside what the machine holds up by itself. Triggers keep writers out until the revision commits; nobody else."""
USERS, POSITIONS_EACH = 2_500, 25
SHARDS = 100
PAUSE_SECONDS = 0.01

# What a migration would look like that needs the strongest lock there is, and one that builds an index.
STRONGEST = """
from alembic import op

revision, down_revision, branch_labels, depends_on = "9001", "{last}", None, None


def upgrade() -> None:
    op.execute("ALTER TABLE users ADD COLUMN note TEXT")
    op.execute("ALTER TABLE positions ADD COLUMN note TEXT")
    op.execute("ALTER TABLE portfolio_snapshots ADD COLUMN note TEXT")
"""
CONCURRENT = """
from alembic import op

revision, down_revision, branch_labels, depends_on = "9002", "9001", None, None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS positions_cost_basis_idx")
        op.execute("CREATE INDEX CONCURRENTLY positions_cost_basis_idx ON positions (cost_basis)")
        op.execute("RESET lock_timeout")
"""


class Migrator:
    """A process that migrates, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            self.said.append(line.decode())

    def waits(self) -> bool:
        return any("migration_waits" in line and "a table is in use" in line for line in self.said)

    async def waits_or_has_ended(self) -> bool:
        return self.waits() or self.process.returncode is not None

    async def ended(self) -> None:
        await asyncio.wait_for(self.process.wait(), 60)
        await self._reading
        assert self.process.returncode == 0, "".join(self.said)


async def migrator(url: str, revision: str, configuration: Path = ROOT / "alembic.ini") -> Migrator:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "alembic", "-c", str(configuration), "upgrade", revision),
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    return Migrator(process)


@asynccontextmanager
async def filled(servers: Servers, template_name: str, revision: str) -> AsyncIterator[str]:
    """Yield the URL of a database at that revision, with sixty thousand positions."""
    name = f"foliotick_migrated_{os.getpid()}"
    administrator = await asyncpg.connect(servers.database_url, timeout=10)
    is_last = revision == REVISIONS[-1]
    template = f"TEMPLATE {template_name}" if is_last else ""
    await administrator.execute(f"CREATE DATABASE {name} {template}")
    url = urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
    try:
        if not is_last:
            await (await migrator(url, revision)).ended()
        async with databases.connect(
            url, application_name="tests", connections_max=1, answer_seconds_max=60
        ) as one:
            await one.fetch(
                "INSERT INTO users (subject, cash_balance) SELECT n, 1 FROM generate_series(1, $1) AS n",
                USERS,
            )
            await one.fetch(
                """
                INSERT INTO positions (user_id, ticker, shares, cost_basis)
                SELECT id, 'S' || n, n, 1 FROM users CROSS JOIN generate_series(1, $1) AS n
                """,
                POSITIONS_EACH,
            )
            await one.fetch(
                """
                INSERT INTO asset_prices (symbol, price, traded_at, received_at, updated_at, feed)
                SELECT 'S' || n, n, now(), now(), now(), 'iex' FROM generate_series(1, $1) AS n
                """,
                POSITIONS_EACH,
            )
            await one.fetch("ANALYZE")
        yield url
    finally:
        await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await administrator.close()


class Load:
    """Reads and writes as the services make them, and the longest that one of each took."""

    def __init__(self, readers: Database, writers: Database) -> None:
        self._readers, self._writers = readers, writers
        self.longest: dict[str, float] = {}
        self._shard = 0
        self._slot = last_boundary(utc_now(), timedelta(minutes=5))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, work in (
                ("current", self._current),
                ("chart", self._chart),
                ("snapshot", self._snapshot),
                ("order", self._order),
            ):
                tasks.create_task(self._again_and_again(name, work))

    async def _again_and_again(self, name: str, work: Callable[[], Awaitable[object]]) -> None:
        while True:
            began_at = time.monotonic()
            with suppress(SchemaMissing):  # this code may be of a later revision than the database is yet
                await work()
            self.longest[name] = max(self.longest.get(name, 0), time.monotonic() - began_at)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _current(self) -> None:
        now = utc_now()
        assert await gateway_queries.current_portfolio(
            self._readers, "7", now, market_moment(MarketHours(), now)
        )

    async def _chart(self) -> None:
        five_minutes = timedelta(minutes=5)
        window = Buckets(self._slot - timedelta(days=1), self._slot, five_minutes)
        assert await gateway_queries.chart(self._readers, "7", window, "America/New_York")

    async def _snapshot(self) -> None:
        """Take the next shard of a slot: a hundredth of the users."""
        if self._shard == SHARDS:
            self._shard, self._slot = 0, self._slot - timedelta(minutes=5)
        await snapshotter_queries.take_snapshots(self._writers, self._slot, self._shard, SHARDS)
        self._shard += 1

    async def _order(self) -> None:
        await self._writers.fetch(
            "UPDATE positions SET shares = shares + 1 WHERE user_id = 7 AND ticker = 'S1'"
        )


@asynccontextmanager
async def loaded(url: str) -> AsyncIterator[Load]:
    async with (
        databases.connect(
            url, application_name="readers", connections_max=2, reads_only=True, answer_seconds_max=60
        ) as readers,
        databases.connect(
            url,
            application_name="writers",
            connections_max=2,
            server_settings=snapshotter_queries.SERVER_SETTINGS,
            answer_seconds_max=60,
        ) as writers,
    ):
        load = Load(readers, writers)
        running = asyncio.create_task(load.run())

        async def all_run() -> bool:
            return len(load.longest) == 4

        await eventually(all_run)
        try:
            yield load
        finally:
            running.cancel()
            await asyncio.wait([running])
            assert running.cancelled(), running.exception()


@asynccontextmanager
async def in_the_way(url: str) -> AsyncIterator[None]:
    """Hold all tables as a long report does, and a row as a long import does."""
    connection = await asyncpg.connect(url, timeout=10, server_settings={"application_name": "report"})
    try:
        await connection.execute(
            """
            BEGIN;
            SELECT count(*) FROM users, portfolio_snapshots, position_snapshots WHERE FALSE;
            UPDATE positions SET shares = 5 WHERE user_id = 8
            """
        )
        yield
        await connection.execute("ROLLBACK")
    finally:
        await connection.close()


async def held_up_by(load: Load, url: str, revision: str, configuration: Path) -> dict[str, float]:
    """Migrate while somebody is in the way, and return the longest hold-ups."""
    load.longest.clear()
    async with in_the_way(url):
        migrating = await migrator(url, revision, configuration)
        await eventually(migrating.waits_or_has_ended, timeout=60)
    await migrating.ended()
    return dict(load.longest)


async def expect_unnoticed(load: Load, url: str, before: str, after: str, configuration: Path) -> None:
    noise = await held_up_by(load, url, before, configuration)  # which does all but migrate
    held_up = await held_up_by(load, url, after, configuration)
    print(f"longest while migrating {held_up}, otherwise {noise}")  # noqa: T201 - to be seen with -s
    for name, seconds in held_up.items():
        # The longest of a few seconds is not always the same on a machine that does other things as well.
        assert seconds <= HELD_UP_SECONDS_MAX[name] + 2 * max(noise.values()), (name, held_up, noise)


@pytest.mark.parametrize(("before", "after"), [*pairwise(REVISIONS[1:])])
async def test_nobody_waits_for_a_migration(
    servers: Servers, template_name: str, before: str, after: str
) -> None:
    async with filled(servers, template_name, before) as url, loaded(url) as load:
        await expect_unnoticed(load, url, before, after, ROOT / "alembic.ini")


async def test_nobody_waits_for_a_migration_that_needs_every_table_to_itself(
    servers: Servers, template_name: str, tmp_path: Path
) -> None:
    last = REVISIONS[-1]
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
    (tmp_path / "migrations/versions/9001_strongest.py").write_text(STRONGEST.format(last=last))
    (tmp_path / "migrations/versions/9002_concurrent.py").write_text(CONCURRENT)
    configuration = tmp_path / "alembic.ini"
    async with filled(servers, template_name, last) as url, loaded(url) as load:
        await expect_unnoticed(load, url, last, "9001", configuration)
        async with in_the_way(url):
            both = [await migrator(url, "9002", configuration) for _ in range(2)]

            async def one_waits_for_the_other() -> bool:
                return any("another migrator" in line for each in both for line in each.said)

            await eventually(one_waits_for_the_other, timeout=60)
        for each in both:
            await each.ended()
        async with databases.connect(url, application_name="tests", connections_max=1) as one:
            assert await one.fetch_value(
                "SELECT indisvalid FROM pg_index WHERE indexrelid = 'positions_cost_basis_idx'::regclass"
            )
            assert await one.fetch_value("SELECT version_num FROM alembic_version") == "9002"
