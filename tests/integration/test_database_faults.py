"""The pool while its server is frozen, restarted, killed, read-only or without room."""

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from prometheus_client import REGISTRY

from local.servers import Server, postgres
from shared import database as databases
from shared.database import Connection, Database, DatabaseUnavailable
from tests.integration.test_api_gateway_faults import frozen
from tests.metrics import sample
from tests.servers import chosen_backend
from tests.waiting import eventually

HEALED_SECONDS_MAX = 2.0
ENDED_SECONDS_MAX = databases.CONNECT_TIMEOUT_SECONDS + databases.STATEMENT_TIMEOUT_SECONDS + 0.5
"""What a statement may take in all, which is less than a request to the gateway may, and some for the machine."""


@pytest.fixture(scope="module")
def own_postgres(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """An empty PostgreSQL of this module's own, to be mistreated."""
    needs_own_server(request)
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


def needs_own_server(request: pytest.FixtureRequest) -> None:
    if chosen_backend(request.config.getoption("backend")) != "local":
        pytest.skip("a server of the test's own is needed: backend local")


@asynccontextmanager
async def connected(
    server: Server, *, connections_max: int = 10, reads_only: bool = False
) -> AsyncIterator[Database]:
    """Yield a pool all of whose connections are open."""
    async with databases.connect(
        server.url, application_name="faults", connections_max=connections_max, reads_only=reads_only
    ) as database:
        await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.1)") for _ in range(connections_max)))
        assert database.connections_open == connections_max
        yield database


def sockets_to(server: Server) -> int:
    port = urlsplit(server.url).port
    return sum(getattr(each.raddr, "port", None) == port for each in psutil.Process().net_connections("tcp"))


def counted(reason: str) -> float:
    return sample("database_unavailable_total", pool="faults", reason=reason)


async def is_well(database: Database) -> bool:
    return await database.check() is None


# ---- frozen ----------------------------------------------------------------------------------------


async def test_frozen_server_makes_no_pile(own_postgres: Server) -> None:
    async with connected(own_postgres) as writes, connected(own_postgres, reads_only=True) as reads:
        tasks_before, sockets_before = len(asyncio.all_tasks()), sockets_to(own_postgres)
        no_answer, no_turn = counted("no_answer"), counted("no_turn")

        async def ask(database: Database) -> float:
            began_at = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                await database.fetch_value("SELECT 1")
            return time.monotonic() - began_at

        with frozen(own_postgres):
            seconds = await asyncio.gather(
                *(ask(database) for database in (writes, reads) for _ in range(200))
            )
            assert max(seconds) < ENDED_SECONDS_MAX
            assert counted("no_answer") - no_answer + counted("no_turn") - no_turn == 400
            assert counted("no_turn") > no_turn

            async def nothing_is_left() -> bool:
                return len(asyncio.all_tasks()) <= tasks_before and sockets_to(own_postgres) == 0

            await eventually(nothing_is_left)
            assert await writes.check() is not None
        for database in (writes, reads):
            await healed(database)
            await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.1)") for _ in range(10)))
        assert sockets_to(own_postgres) == sockets_before


async def test_statement_that_is_cancelled_on_a_frozen_server_ends_at_once(own_postgres: Server) -> None:
    async with connected(own_postgres, connections_max=1) as database:
        with frozen(own_postgres):
            began_at = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await database.fetch_value("SELECT 1")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), database.transaction():
                    pass
            assert time.monotonic() - began_at < 1
        await healed(database)


async def test_transaction_that_is_cut_off_is_undone(own_postgres: Server) -> None:
    async with connected(own_postgres, connections_max=1) as database:
        await database.fetch("CREATE TABLE cut_off (number INTEGER)")

        async def cut_off() -> None:
            async with asyncio.timeout(0.1), database.transaction() as connection:
                await connection.execute("INSERT INTO cut_off VALUES (1)")
                await connection.execute("SELECT pg_sleep(10)")

        for _ in range(2):  # nothing of the first is left on the only connection
            with pytest.raises(TimeoutError):
                await cut_off()
        assert await database.fetch_value("SELECT count(*) FROM cut_off") == 0


async def healed(database: Database) -> None:
    """Expect the pool to serve soon, now that its server is back."""
    back_at = time.monotonic()
    await eventually(lambda: is_well(database))
    assert time.monotonic() - back_at < HEALED_SECONDS_MAX


# ---- a backend terminated --------------------------------------------------------------------------


async def test_statement_and_transaction_are_tried_again_when_their_backend_is_terminated(
    own_postgres: Server,
) -> None:
    async with connected(own_postgres, connections_max=2) as database, connected(own_postgres) as other:
        await database.fetch("CREATE TABLE tried (number INTEGER)")
        tries = 0

        async def work(connection: Connection) -> int:
            nonlocal tries
            tries += 1
            await connection.execute("INSERT INTO tried VALUES ($1)", tries)
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            if tries == 1:
                await other.fetch("SELECT pg_terminate_backend($1, 5000)", pid)
            number: int = await connection.fetchval("SELECT number FROM tried")
            return number

        assert await database.transact(work) == 2
        assert (tries, await database.fetch_value("SELECT count(*) FROM tried")) == (2, 1)

        asking = asyncio.create_task(database.fetch_value("SELECT 7 FROM pg_sleep(1)"))

        async def terminated() -> bool:
            return bool(
                await other.fetch(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT 7%'"
                )
            )

        await eventually(terminated)
        assert await asking == 7


async def test_transaction_begins_although_every_connection_has_been_ended(own_postgres: Server) -> None:
    async with connected(own_postgres, connections_max=2) as database, connected(own_postgres) as other:
        pids = await database.fetch(
            "SELECT pid FROM pg_stat_activity WHERE state = 'idle' AND application_name = 'faults'"
        )
        # In one turn of the loop, so that nobody has read that they are gone.
        ending = other.fetch(
            "SELECT pg_terminate_backend(pid, 5000) FROM unnest($1::int[]) AS pid",
            [row["pid"] for row in pids],
        )
        with suppress(DatabaseUnavailable):
            await ending
        async with database.transaction() as connection:
            assert await connection.fetchval("SELECT 1") == 1


# ---- restarted -------------------------------------------------------------------------------------


async def test_restarted_server_is_found_again(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    needs_own_server(request)
    with ExitStack() as stack:
        server = stack.enter_context(postgres(tmp_path))
        async with connected(server, connections_max=3) as database:
            await database.fetch("CREATE TABLE acknowledged (number INTEGER)")
            acknowledged: list[int] = []
            writing = asyncio.create_task(write(database, acknowledged))
            await eventually(growing(acknowledged, by=20))
            for fast_immediate_killed in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                server.process.send_signal(fast_immediate_killed)
                await asyncio.to_thread(server.process.wait, 15)
                with pytest.raises(DatabaseUnavailable):
                    await database.fetch("SELECT 1")
                server = stack.enter_context(postgres(tmp_path, port=urlsplit(server.url).port))
                back_at = time.monotonic()
                await eventually(growing(acknowledged, by=1))
                assert time.monotonic() - back_at < HEALED_SECONDS_MAX
            writing.cancel()
            await asyncio.wait([writing])
            assert writing.cancelled(), writing.exception()  # nothing but DatabaseUnavailable came out
            rows = await database.fetch("SELECT number FROM acknowledged")
            assert set(acknowledged) <= {row["number"] for row in rows}


async def write(database: Database, acknowledged: list[int]) -> None:
    number = 0
    while True:
        number += 1
        try:
            await database.fetch("INSERT INTO acknowledged VALUES ($1)", number)
        except DatabaseUnavailable:
            await asyncio.sleep(0.01)
        else:
            acknowledged.append(number)


def growing(numbers: list[int], by: int) -> Callable[[], Awaitable[bool]]:
    count = len(numbers) + by

    async def has_grown() -> bool:
        return len(numbers) >= count

    return has_grown


# ---- cannot write ----------------------------------------------------------------------------------


async def test_server_that_is_read_only_is_not_ready_and_heals(own_postgres: Server) -> None:
    async with connected(own_postgres, connections_max=2) as database, connected(own_postgres) as other:
        await database.fetch("CREATE TABLE written (number INTEGER)")
        await other.fetch("ALTER DATABASE foliotick SET default_transaction_read_only = on")
        try:
            await other.fetch(
                """
                SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE pid <> pg_backend_pid() AND datname = 'foliotick'
                """
            )
            with pytest.raises(DatabaseUnavailable, match="read-only"):
                await database.fetch("INSERT INTO written VALUES (1)")
            assert await database.check() == "cannot write: the server is read-only"
        finally:
            async with databases.connect(
                own_postgres.url,
                application_name="operator",
                connections_max=1,
                server_settings={"default_transaction_read_only": "off"},
            ) as operator:
                await operator.fetch("ALTER DATABASE foliotick RESET default_transaction_read_only")
        # Its sessions are still read-only: each is left as soon as that is found.
        await eventually(lambda: is_written(database))
        assert await database.check() is None


NO_ROOM = "DO $$ BEGIN RAISE 'could not extend file' USING ERRCODE = 'disk_full'; END $$"


async def test_what_failed_to_be_written_is_held_against_the_database_no_longer_than_it_lasts(
    own_postgres: Server,
) -> None:
    async with connected(own_postgres, connections_max=1) as database:
        with pytest.raises(DatabaseUnavailable, match="could not extend file"):
            await database.fetch(NO_ROOM)
        assert await database.check() is None
        assert await database.fetch_value("SELECT count(*) FROM pg_class WHERE relname = 'room'") == 0


async def test_role_without_temporary_tables_is_checked_as_well(own_postgres: Server) -> None:
    async with connected(own_postgres, connections_max=1) as database:
        await database.fetch("REVOKE TEMPORARY ON DATABASE foliotick FROM PUBLIC")
        await database.fetch("CREATE ROLE modest")
        async with databases.connect(
            own_postgres.url,
            application_name="faults",
            connections_max=1,
            server_settings={"role": "modest"},
        ) as modest:
            with pytest.raises(DatabaseUnavailable, match="could not extend file"):
                await modest.fetch(NO_ROOM)
            assert await modest.check() is None


async def is_written(database: Database) -> bool:
    with suppress(DatabaseUnavailable):
        await database.fetch("INSERT INTO written VALUES (1)")
        return True
    return False


LOGGED = "SELECT pg_logical_emit_message(FALSE, 'filler', repeat('x', 4000000))"


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a disk of that size, with a file `ballast` on it that takes nearly all of it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, leave_megabytes: int, name: str = "ballast") -> Path:
    ballast = disk / name
    free = shutil.disk_usage(disk).free - leave_megabytes * 1024 * 1024
    with ballast.open("wb") as file:
        if free > 0:
            os.posix_fallocate(file.fileno(), 0, free)
    return ballast


async def test_full_disk_loses_nothing_and_all_goes_on_when_there_is_room(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    needs_own_server(request)
    with small_disk(tmp_path / "disk", 80) as disk:
        folder = tmp_path / "postgres"
        with postgres(folder):
            pass
        shutil.move(folder / "data" / "pg_wal", disk / "pg_wal")
        (folder / "data" / "pg_wal").symlink_to(disk / "pg_wal")
        (disk / "tables").mkdir()
        shutil.chown(disk / "tables", (folder / "data").stat().st_uid)
        settings = {"max_wal_size": "1GB", "checkpoint_timeout": "1h", "wal_recycle": "off"}
        with postgres(folder, settings=settings) as server:
            async with connected(server, connections_max=2) as database:
                await database.fetch(f"CREATE TABLESPACE small LOCATION '{disk / 'tables'}'")
                await database.fetch("ALTER DATABASE foliotick SET temp_tablespaces = small")
                await database.fetch("CREATE TABLE acknowledged (number INTEGER)")
                await database.fetch("CREATE TABLE filler (text TEXT) TABLESPACE small")
                await database.fetch("ALTER TABLE filler ALTER text SET STORAGE EXTERNAL")
                ballast = fill(disk, leave_megabytes=9)
                more = fill(disk, leave_megabytes=1, name="more")

                # No room for the rows of a table.
                with pytest.raises(DatabaseUnavailable, match="No space left"):
                    await database.fetch(
                        "INSERT INTO filler SELECT repeat('x', 2000000) FROM generate_series(1, 2)"
                    )
                rest = fill(disk, leave_megabytes=0, name="rest")
                async with connected(server, connections_max=1) as seldom:
                    with pytest.raises(DatabaseUnavailable, match="No space left"):
                        await seldom.fetch("CREATE TEMPORARY TABLE few AS SELECT 1")
                    for _ in range(2):
                        assert "cannot write: could not extend file" in str(await seldom.check())
                    assert await seldom.fetch_value("SELECT 1") == 1
                    more.unlink()
                    rest.unlink()
                    assert await seldom.check() is None  # it need not wait for the next work
                assert await database.fetch_value("SELECT 1") == 1
                await database.fetch("INSERT INTO acknowledged VALUES (0)")

                # No room for the log.
                acknowledged: list[int] = []
                writing = asyncio.create_task(write(database, acknowledged))
                await eventually(growing(acknowledged, by=5))
                with pytest.raises(DatabaseUnavailable):
                    await asyncio.gather(*(database.fetch(LOGGED) for _ in range(20)))
                await asyncio.to_thread(server.process.wait, 30)
                assert "No space left" in server.log.read_text()
                with pytest.raises(DatabaseUnavailable):
                    await database.fetch("SELECT 1")

                ballast.unlink()
                with postgres(folder, settings=settings, port=urlsplit(server.url).port):
                    await eventually(growing(acknowledged, by=1))
                    writing.cancel()
                    await asyncio.wait([writing])
                    assert writing.cancelled(), writing.exception()
                    rows = await database.fetch("SELECT number FROM acknowledged")
                    assert set(acknowledged) <= {row["number"] for row in rows}
                    assert await database.check() is None


# ---- seen ------------------------------------------------------------------------------------------


async def test_connections_are_counted(own_postgres: Server) -> None:
    def connections(state: str) -> float | None:
        return REGISTRY.get_sample_value("database_connections", {"pool": "faults", "state": state})

    async with connected(own_postgres, connections_max=2) as database:
        async with database.transaction():
            assert (connections("in_use"), connections("idle")) == (1, 1)
        assert (connections("in_use"), connections("idle")) == (0, 2)
        assert sample("database_connections_max", pool="faults") == 2
    assert connections("idle") is None
