"""A replica is promoted after its primary died or froze, and everybody follows by himself."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil
import pytest

from local.servers import Server, joined_url, postgres, promote, replica_of, replicate_synchronously
from shared import database as databases
from shared.database import Database, DatabaseUnavailable
from shared.hosts import Address, Hosts, ServerConnection, addresses
from tests.conftest import ROOT
from tests.factories import create_user
from tests.gateway import running
from tests.integration.test_api_gateway_faults import CURRENT, frozen
from tests.integration.test_notifications import Heard
from tests.metrics import sample
from tests.servers import chosen_backend
from tests.waiting import eventually

FOLLOWED_SECONDS_MAX = 5.0
"""What may pass from the promotion until writes, reads and notifications go on."""

LONG = "SELECT 7 FROM pg_sleep(1)"


@dataclass(frozen=True)
class Pair:
    """A primary, its synchronous replica, and the URL that names both."""

    primary: Server
    replica: Server
    url: str


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    if chosen_backend(request.config.getoption("backend")) != "local":
        pytest.skip("a primary and a replica of the test's own are needed: backend local")
    with ExitStack() as stack:
        primary = stack.enter_context(postgres(tmp_path / "primary"))
        migrated(primary.url)
        replica = stack.enter_context(replica_of(primary, tmp_path / "replica"))
        replicate_synchronously(primary)
        yield Pair(primary, replica, joined_url(primary, replica))
        kill(primary)  # at its end it would wait for a replica that follows it no more


def migrated(url: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        check=True,
        capture_output=True,
    )


def kill(server: Server) -> None:
    """End the server as a loss of power would."""
    if server.process.poll() is None:
        backends = psutil.Process(server.process.pid).children()
        server.process.kill()
        for backend in backends:
            with suppress(psutil.NoSuchProcess):
                backend.kill()
        server.process.wait(10)


class Writer:
    """Creates one user after another, and knows who was acknowledged."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.acknowledged: list[str] = []
        self.last_at = 0.0

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            try:
                await create_user(self._database, f"user-{number}")
            except DatabaseUnavailable:
                await asyncio.sleep(0.01)
            except asyncpg.UniqueViolationError:
                pass  # it was stored, and its acknowledgement lost
            else:
                self.acknowledged.append(f"user-{number}")
                self.last_at = time.monotonic()


@dataclass
class Following:
    writes: Database
    reads: Database
    writer: Writer
    heard: Heard

    async def follow_since(self, promoted_at: float) -> None:
        """Expect that writes, reads and notifications go on soon after the promotion."""

        async def writes_go_on() -> bool:
            return self.writer.last_at > promoted_at

        async def reads_go_on() -> bool:
            with suppress(DatabaseUnavailable):
                return bool(await self.reads.fetch_value("SELECT NOT pg_is_in_recovery()"))
            return False

        async def notifications_go_on() -> bool:
            return self.heard.is_heard and self.heard.interruptions > 0

        for goes_on in (writes_go_on, reads_go_on, notifications_go_on):
            await eventually(goes_on, timeout=promoted_at + FOLLOWED_SECONDS_MAX - time.monotonic())
        user_id = await create_user(self.writes, "heard")
        self.heard.payloads.clear()
        await self.writes.fetch("UPDATE users SET cash_balance = 5 WHERE id = $1", user_id)

        async def is_heard() -> bool:
            return self.heard.payloads == [str(user_id)]

        await eventually(is_heard)
        assert await self.writes.check() is None
        assert await self.reads.check() is None

    async def lost(self) -> set[str]:
        acknowledged = set(self.writer.acknowledged)  # which goes on writing meanwhile
        stored = {row["subject"] for row in await self.reads.fetch("SELECT subject FROM users")}
        return acknowledged - stored


@asynccontextmanager
async def following(url: str) -> AsyncIterator[Following]:
    heard, stop = Heard(), asyncio.Event()
    async with (
        databases.connect(url, application_name="writes", connections_max=3) as writes,
        databases.connect(url, application_name="reads", connections_max=3, reads_only=True) as reads,
        asyncio.TaskGroup() as tasks,
    ):
        writer = Writer(writes)
        writing = tasks.create_task(writer.run())
        tasks.create_task(databases.listen(url, "portfolios", heard, stop, application_name="listens"))
        # Several connections, all of which the failover makes worthless.
        await asyncio.gather(
            *(each.fetch("SELECT pg_sleep(0.1)") for each in (writes, reads) for _ in range(3))
        )

        async def all_is_well() -> bool:
            return heard.is_heard and len(writer.acknowledged) > 20

        await eventually(all_is_well)
        try:
            yield Following(writes, reads, writer, heard)
        finally:
            writing.cancel()
            stop.set()


async def test_all_follow_when_the_primary_is_killed(pair: Pair) -> None:
    async with following(pair.url) as followers, running(pair.url) as gateway:
        await create_user(followers.writes)
        assert (await gateway.get(CURRENT)).status == 200
        kill(pair.primary)
        assert (await gateway.get(CURRENT)).status == 503

        async def is_noticed() -> bool:
            problem = str(await followers.reads.check())
            return problem.startswith("no primary: ") and problem.endswith("is a replica")

        await eventually(is_noticed)
        await asyncio.to_thread(promote, pair.replica)
        await followers.follow_since(time.monotonic())
        assert not await followers.lost()
        assert (await gateway.get(CURRENT)).status == 200
    await asyncio.to_thread(migrated, pair.url)
    admin = [sys.executable, "-m", "services.admin", "create-user", "carol", "--cash", "5"]
    await asyncio.to_thread(
        subprocess.run, admin, cwd=ROOT, env=os.environ | {"DATABASE_URL": pair.url}, check=True
    )


async def test_all_follow_when_the_primary_is_frozen_and_none_goes_back_to_it(pair: Pair) -> None:
    async with following(pair.url) as followers:
        long_one = asyncio.create_task(followers.writes.fetch_value(LONG, timeout=120))
        await eventually(lambda: is_running(pair.primary, LONG))
        with frozen(pair.primary):
            await asyncio.to_thread(promote, pair.replica)
            await followers.follow_since(time.monotonic())
            assert await asyncio.wait_for(long_one, 10) == 7  # on the new primary
            assert not await followers.lost()
        # The old primary is awake, and thinks that it still is one.
        assert await writable(pair.primary)
        assert await port_of(followers.reads) == addresses(pair.replica.url)[0].port
        with frozen(pair.replica):
            with pytest.raises(DatabaseUnavailable):
                await followers.reads.fetch_value("SELECT 1")

            async def old_one_is_refused() -> bool:
                return "is an old primary, on timeline 1" in str(await followers.reads.check())

            await eventually(old_one_is_refused)
        await eventually(lambda: is_well(followers.reads))
        async with databases.connect(pair.url, application_name="newcomer", connections_max=1) as newcomer:
            assert await port_of(newcomer) == addresses(pair.replica.url)[0].port


async def test_all_follow_although_the_primary_lives_on(pair: Pair) -> None:
    """Nobody shut it down, as its operator should have; it acknowledges nothing without its synchronous replica."""
    async with following(pair.url) as followers:
        await asyncio.to_thread(promote, pair.replica)
        promoted_at = time.monotonic()

        async def writes_go_on() -> bool:
            port = await port_of(followers.writes)
            return port == addresses(pair.replica.url)[0].port and followers.writer.last_at > promoted_at

        await eventually(writes_go_on, timeout=databases.STATEMENT_TIMEOUT_SECONDS + FOLLOWED_SECONDS_MAX)
        await followers.follow_since(time.monotonic())
        assert await port_of(followers.reads) == addresses(pair.replica.url)[0].port
        assert not await followers.lost()


class HungUp(asyncpg.Connection):
    """A connection whose server hangs up as soon as it has let us in, `times` times."""

    times = 0

    async def fetchrow(self, *args: Any, **options: Any) -> Any:
        if HungUp.times > 0:
            HungUp.times -= 1
            with suppress(asyncpg.PostgresConnectionError):
                await self.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return await super().fetchrow(*args, **options)


async def test_server_that_hangs_up_as_soon_as_it_has_let_us_in_is_asked_again(database_url: str) -> None:
    hosts = Hosts(of_two_names(database_url))

    async def connect() -> ServerConnection:
        return await hosts.connect(timeout=10, connection_class=HungUp)

    HungUp.times = 1
    with pytest.raises(ConnectionError, match="closed"):
        await connect()  # it was just found
    HungUp.times = 1
    connection = await connect()  # it was known: another is looked for
    assert HungUp.times == 0
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_server_that_lets_nobody_in_is_no_missing_primary(database_url: str) -> None:
    """Whoever reads `no primary` promotes a replica beside one that is well."""
    parts = urlsplit(of_two_names(database_url))
    wrong = urlunsplit(parts._replace(netloc=f"{parts.username}:wrong@{parts.netloc.rpartition('@')[2]}"))
    async with databases.connect(wrong, application_name="refused", connections_max=1) as database:
        for _ in range(2):
            before = sample("database_unavailable_total", pool="refused", reason="refused")
            with pytest.raises(DatabaseUnavailable, match="password authentication failed"):
                await database.fetch("SELECT 1")
            assert sample("database_unavailable_total", pool="refused", reason="refused") == before + 1


async def test_end_of_the_watch_does_not_stay_unseen(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "WATCH_SECONDS", None)  # a bug
    async with databases.connect(
        of_two_names(database_url), application_name="watched", connections_max=1
    ) as database:
        await asyncio.sleep(0)
        with pytest.raises(TypeError):
            await database.fetch_value("SELECT 1")


def of_two_names(url: str) -> str:
    """Return the URL with its server in it twice."""
    parts = urlsplit(url)
    account, _, server = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{account}@{server},localhost:{parts.port}"))


async def port_of(database: Database) -> int | None:
    """Return the port of the server that answers."""
    with suppress(DatabaseUnavailable):
        return int(await database.fetch_value("SHOW port"))
    return None


async def writable(server: Server) -> bool:
    connection = await asyncpg.connect(server.url, timeout=10)
    try:
        return not await connection.fetchval("SELECT pg_is_in_recovery()")
    finally:
        await connection.close()


async def is_running(server: Server, statement: str) -> bool:
    connection = await asyncpg.connect(server.url, timeout=10)
    try:
        count = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = $1", statement
        )
        return bool(count == 1)
    finally:
        await connection.close()


async def is_well(database: Database) -> bool:
    return await database.check() is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p@one/d", [("one", 5432)]),
        ("postgresql://u:p@one:1,two:2/d", [("one", 1), ("two", 2)]),
        ("postgresql://u:p,@one,two:2/d?sslmode=disable", [("one", 5432), ("two", 2)]),
        ("postgresql://u:p@[::1]:1,[fe80::2]/d", [("::1", 1), ("fe80::2", 5432)]),
        ("postgresql:///d?host=one,two&port=1,2", [("one", 1), ("two", 2)]),
        ("postgresql:///d?host=one,two&port=3", [("one", 3), ("two", 3)]),
        ("postgresql://u:p@%2Frun%2Fpostgresql/d", [("/run/postgresql", 5432)]),
    ],
)
def test_servers_of_a_url(url: str, expected: list[tuple[str, int]]) -> None:
    assert addresses(url) == tuple(Address(*each) for each in expected)
