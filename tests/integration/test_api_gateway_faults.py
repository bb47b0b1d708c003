"""The gateway without its database: stopped, frozen, killed, empty; and how it heals."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from local.servers import Server, postgres
from shared import database as databases
from shared.database import Database
from tests.conftest import ROOT
from tests.factories import create_user
from tests.gateway import Answer, Gateway, running
from tests.waiting import eventually

CURRENT = "/api/portfolio/current"
CHART = "/api/portfolio/performance"


@pytest.fixture(scope="module")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A migrated PostgreSQL of this module's own, to be mistreated."""
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        subprocess.run(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": server.url},
            check=True,
            capture_output=True,
        )
        yield server


@pytest.fixture
async def gateway(own_postgres: Server) -> AsyncIterator[Gateway]:
    async with databases.connect(own_postgres.url, application_name="tests", connections_max=1) as database:
        await database.fetch("TRUNCATE users CASCADE")
        await create_user(database, cash="7")
    async with running(own_postgres.url) as started:
        yield started


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Stop every process of the server where it is, without closing a connection."""
    parent = psutil.Process(server.process.pid)
    processes = [parent]
    try:
        # First the one that starts the others, so that none is missed. A connection that was just closed may still be
        # among them, and end by itself.
        parent.suspend()
        while parent.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
        processes += parent.children(recursive=True)
        for process in processes[1:]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def busy_tasks() -> list[str]:
    """Return the tasks, but for the one that each idle HTTP connection has."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name != "RequestHandler.start"]


def unavailable(answer: Answer) -> bool:
    """Check that the answer is a well-formed 503."""
    assert answer.status == 503, answer.text
    assert answer.problem().type in (
        "urn:foliotick:problem:database-unavailable",
        "urn:foliotick:problem:deadline-exceeded",
    )
    assert answer.headers["Retry-After"] == "2"
    assert answer.headers["Cache-Control"] == "no-store"
    return True


async def is_served(gateway: Gateway) -> bool:
    return (await gateway.get(CURRENT)).status == 200


async def test_frozen_database_gives_503_by_the_deadline_and_no_pile(
    gateway: Gateway, own_postgres: Server
) -> None:
    assert await is_served(gateway)
    tasks_before = len(busy_tasks())
    with frozen(own_postgres):
        for _ in range(2):
            started = time.monotonic()
            answers = await asyncio.gather(
                *(gateway.get(path) for path in (CURRENT, CHART) for _ in range(20))
            )
            assert all(unavailable(answer) for answer in answers)
            assert time.monotonic() - started < 6.5  # the deadline is 5 s
        assert (await gateway.get("/healthz", None)).status == 200
        ready = await gateway.get("/readyz", None)
        assert ready.status == 503
        assert ready.json()["checks"]["postgres"] == "failed"  # and nothing of why: anybody may ask
        port = urlsplit(own_postgres.url).port
        connections = psutil.Process().net_connections("tcp")
        clients = [each for each in connections if getattr(each.raddr, "port", None) == port]
        assert len(clients) <= 20  # ten, and those being cancelled

    async def is_settled() -> bool:
        answer = await gateway.get(CURRENT)
        return answer.status == 200 and len(busy_tasks()) <= tasks_before

    await eventually(is_settled, timeout=10)


async def test_deadline_holds_whatever_the_statement_does(database: Database, database_url: str) -> None:
    await create_user(database)
    async with (
        running(database_url, request_timeout_seconds=0.3) as gateway,
        database.transaction() as connection,
    ):
        await connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        answer = await gateway.get(CURRENT)
        assert time.monotonic() - started < 1.5
        assert unavailable(answer)
        assert answer.problem().type == "urn:foliotick:problem:deadline-exceeded"


async def test_lost_connections_are_not_noticed_by_anyone(database: Database, database_url: str) -> None:
    await create_user(database)
    async with running(database_url) as gateway:
        for _ in range(3):
            assert await is_served(gateway)
            ended = await database.fetch(
                """
                SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()
                """
            )
            assert len(ended) >= 1
            assert await is_served(gateway)


async def test_killed_database_recovers_and_so_does_the_gateway(
    gateway: Gateway, own_postgres: Server
) -> None:
    assert await is_served(gateway)
    backend = next(
        process
        for process in psutil.Process(own_postgres.process.pid).children()
        if "foliotick" in " ".join(process.cmdline())
    )
    backend.kill()  # PostgreSQL ends all others and recovers

    async def is_served_again() -> bool:
        answer = await gateway.get(CURRENT)
        return answer.status == 200 or not unavailable(answer)

    await eventually(is_served_again, timeout=20)


async def test_database_that_is_not_there_gives_503_at_once() -> None:
    async with running("postgresql://nobody:secret@127.0.0.1:9/none", hears=False) as gateway:
        started = time.monotonic()
        answer = await gateway.get(CURRENT)
        assert time.monotonic() - started < 2
        assert unavailable(answer)
        assert "secret" not in answer.text
        assert (await gateway.get("/healthz", None)).status == 200
        assert (await gateway.get("/readyz", None)).status == 503


async def test_database_stopped_and_started_again_is_found_again(tmp_path: Path) -> None:
    with postgres(tmp_path) as server:
        port = urlsplit(server.url).port
        subprocess.run(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": server.url},
            check=True,
            capture_output=True,
        )
        async with databases.connect(server.url, application_name="tests", connections_max=1) as database:
            await create_user(database)
        async with running(server.url) as gateway:
            assert await is_served(gateway)
            server.process.send_signal(signal.SIGINT)  # a fast shutdown
            await asyncio.to_thread(server.process.wait, 15)
            assert unavailable(await gateway.get(CURRENT))
            assert unavailable(await gateway.get(CHART))
            with postgres(tmp_path, port=port):
                await eventually(lambda: is_served(gateway), timeout=10)


async def test_database_without_the_tables_gives_503(database: Database, database_url: str) -> None:
    await database.fetch("DROP VIEW portfolio_valuations")
    async with running(database_url) as gateway:
        for path in (CURRENT, CHART):
            assert unavailable(await gateway.get(path))


@pytest.mark.parametrize("reads_only", [False, True])
async def test_connections_are_served_in_order_of_arrival(database_url: str, reads_only: bool) -> None:
    """The driver's pool alone would let newcomers overtake those who wait, some of them until they time out."""
    served: list[int] = []
    async with databases.connect(
        database_url, application_name="tests", connections_max=1, reads_only=reads_only
    ) as database:

        async def ask(number: int) -> None:
            await database.fetch_value("SELECT 1")
            served.append(number)

        asking = []
        for number in range(300):
            asking.append(asyncio.create_task(ask(number)))
            await asyncio.sleep(0)  # one newcomer in each turn of the loop
        await asyncio.gather(*asking)
    assert served == list(range(300))


async def test_the_gateways_connections_cannot_write(database_url: str) -> None:
    async with databases.connect(
        database_url, application_name="tests", connections_max=1, reads_only=True
    ) as database:
        with pytest.raises(databases.DatabaseUnavailable, match="read-only transaction"):
            await database.fetch("DELETE FROM users")
