"""Reads from a real streaming replica: which are, how late it may be, and what the gateway does without it."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import aiohttp
import asyncpg
import psutil
import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr
from structlog.testing import capture_logs

from local.servers import Server, postgres, replica_of
from services.api_gateway import replica
from services.api_gateway.admission import Admission
from services.api_gateway.charts import Asked, Charts, News
from services.api_gateway.performance import Timeframe
from services.api_gateway.replica import Reads
from services.api_gateway.settings import Settings
from shared import database as databases
from shared.clock import last_boundary, utc_now
from shared.database import Database, DatabaseUnavailable
from shared.messages import SNAPSHOTS_TAKEN, SnapshotsTaken
from tests.conftest import ROOT
from tests.factories import add_snapshot, create_user
from tests.gateway import SECRET, Gateway, running
from tests.integration.test_api_gateway_faults import CURRENT, frozen, unavailable
from tests.integration.test_api_gateway_process import started
from tests.servers import chosen_backend
from tests.waiting import eventually

FAR = 60.0
"""A bound that a replica whose replay is paused for the time of a test stays within."""


@pytest.fixture(scope="module")
def primary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A migrated PostgreSQL of this module's own, with replicas and to be mistreated."""
    if chosen_backend(request.config.getoption("backend")) != "local":
        pytest.skip("a primary and a replica of the test's own are needed: backend local")
    with postgres(tmp_path_factory.mktemp("primary")) as server:
        subprocess.run(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": server.url},
            check=True,
            capture_output=True,
        )
        yield server


@pytest.fixture(scope="module")
def follower(primary: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A replica of the primary, that tests leave as they found it."""
    with replica_of(primary, tmp_path_factory.mktemp("replica")) as server:
        yield server


@pytest.fixture
async def writer(primary: Server) -> AsyncIterator[Database]:
    """The primary as those see it who write, with one user whose cash is 1."""
    async with databases.connect(primary.url, application_name="tests", connections_max=2) as database:
        await database.fetch("TRUNCATE users CASCADE")
        await create_user(database, cash="1")
        yield database


def settings(primary: Server, follower: Server, lag_seconds_max: float) -> Settings:
    return Settings(
        database_url=SecretStr(primary.url),
        database_read_url=SecretStr(follower.url),
        read_replica_lag_seconds_max=lag_seconds_max,
        jwt_secret=SecretStr(SECRET),
    )


@asynccontextmanager
async def reading(
    primary: Server, follower: Server, *, lag_seconds_max: float = FAR, used: bool = True
) -> AsyncIterator[Reads]:
    """Read from the replica, once it is in use."""
    async with (
        databases.connect(
            primary.url, application_name="tests", connections_max=4, reads_only=True
        ) as database,
        replica.reading(settings(primary, follower, lag_seconds_max), database) as source,
    ):
        assert isinstance(source, Reads)
        if used:
            await eventually(near(source))
        yield source


@asynccontextmanager
async def gateway_of(
    primary: Server, follower: Server, *, lag_seconds_max: float = FAR
) -> AsyncIterator[Gateway]:
    """Run a gateway, once it reads from the replica."""
    async with running(
        primary.url,
        database_read_url=SecretStr(follower.url),
        read_replica_lag_seconds_max=lag_seconds_max,
    ) as gateway:
        await eventually(using_replica(gateway), timeout=20)
        yield gateway


def near(source: Reads) -> Callable[[], Awaitable[bool]]:
    async def is_near() -> bool:
        return source.is_near()

    return is_near


def using_replica(gateway: Gateway) -> Callable[[], Awaitable[bool]]:
    async def is_used() -> bool:
        return await replica_state(gateway) == "ok"

    return is_used


async def replica_state(gateway: Gateway) -> str:
    """Return what is said of the replica; without it the gateway is ready as well."""
    answer = await gateway.get("/readyz", None)
    assert answer.status == 200, answer.text
    if gateway.served is not None:
        return await gateway.says("read_replica")
    state: str = answer.json()["checks"]["read_replica"]
    return state


async def execute(server: Server, statement: str) -> Any:
    connection = await asyncpg.connect(server.url, timeout=10)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def paused(follower: Server) -> AsyncIterator[None]:
    """Let the replica receive and not replay, so that it shows what was."""
    await execute(follower, "SELECT pg_wal_replay_pause()")

    async def is_paused() -> bool:
        return str(await execute(follower, "SELECT pg_get_wal_replay_pause_state()")) == "paused"

    await eventually(is_paused)
    try:
        yield
    finally:
        await execute(follower, "SELECT pg_wal_replay_resume()")


@contextmanager
def killed(server: Server) -> Iterator[Callable[[], None]]:
    """Kill the server, and yield what starts it again on its port until the end of the block."""
    postmaster = psutil.Process(server.process.pid)
    for process in (postmaster, *postmaster.children(recursive=True)):
        process.kill()
    server.process.wait()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with server.log.open("ab") as log:
            started.append(subprocess.Popen(server.process.args, stdout=log, stderr=log, cwd="/"))

    try:
        yield start
    finally:
        for again in started:
            again.send_signal(signal.SIGINT)
            again.wait(20)


async def cash(gateway: Gateway) -> str:
    answer = await gateway.get(CURRENT)
    assert answer.status == 200, answer.text
    return str(answer.json()["cash_balance"])


async def set_cash(writer: Database, amount: int) -> None:
    await writer.fetch(f"UPDATE users SET cash_balance = {amount}")  # noqa: S608


def reads_from(server: str) -> float:
    return REGISTRY.get_sample_value("gateway_reads_total", {"from": server}) or 0.0


def lag_metric() -> float:
    value = REGISTRY.get_sample_value("gateway_read_replica_lag_seconds")
    assert value is not None
    return value


def events(logs: list[Any]) -> list[str]:
    return [entry["event"] for entry in logs if entry["event"].startswith("read_replica")]


# ---- which reads -----------------------------------------------------------------------------------


async def test_reads_come_from_the_replica(primary: Server, follower: Server, writer: Database) -> None:
    async with gateway_of(primary, follower) as gateway:
        assert await cash(gateway) == "1.00"
        names = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'api_gateway_reads'"
        assert await execute(follower, names) >= 1
        assert await execute(primary, names) == 0
        async with paused(follower):
            await set_cash(writer, 2)
            before = reads_from("primary"), reads_from("replica")
            assert await cash(gateway) == "1.00"
            assert (reads_from("primary"), reads_from("replica")) == (before[0], before[1] + 1)

        async def is_shown() -> bool:
            return await cash(gateway) == "2.00"

        await eventually(is_shown)


async def test_who_is_not_on_the_replica_yet_is_looked_for_on_the_primary(
    primary: Server, follower: Server, writer: Database
) -> None:
    async with gateway_of(primary, follower) as gateway, paused(follower):
        await create_user(writer, "new", cash="3")
        answer = await gateway.get(CURRENT, "new")
        assert answer.status == 200
        assert str(answer.json()["cash_balance"]) == "3.00"
        assert (await gateway.get(CURRENT, "nobody")).status == 404


async def test_nothing_can_be_written_through_the_reads(
    primary: Server, follower: Server, writer: Database
) -> None:
    async with reading(primary, follower) as source:
        with pytest.raises(DatabaseUnavailable, match="read-only"):
            await source.fetch_row("UPDATE users SET cash_balance = 9 RETURNING id")
    assert await writer.fetch_value("SELECT max(cash_balance)::integer FROM users") == 1


# ---- how late --------------------------------------------------------------------------------------


async def test_reads_move_to_the_primary_within_the_bound_and_return(
    primary: Server, follower: Server, writer: Database
) -> None:
    with capture_logs() as logs:
        async with gateway_of(primary, follower, lag_seconds_max=2) as gateway:
            async with paused(follower):
                written_at = time.monotonic()
                await set_cash(writer, 2)

                async def is_shown() -> bool:
                    return await cash(gateway) == "2.00"

                await eventually(is_shown)
                assert time.monotonic() - written_at < 2 + 0.5  # the bound, and what the last reads took

                async def is_said() -> bool:
                    return "behind" in await replica_state(gateway)

                await eventually(is_said)
                assert lag_metric() > 2
                before = reads_from("replica")
                assert await cash(gateway) == "2.00"
                assert reads_from("replica") == before
            await eventually(using_replica(gateway))
            assert lag_metric() < 2
    assert events(logs) == ["read_replica_used", "read_replica_left", "read_replica_used"]
    assert all("password" not in str(entry) and SECRET not in str(entry) for entry in logs)


@pytest.mark.usefixtures("writer")
async def test_replica_of_an_idle_primary_stays_in_use(primary: Server, follower: Server) -> None:
    async with reading(primary, follower, lag_seconds_max=2) as source:
        until = time.monotonic() + 5

        async def is_over() -> bool:
            if not source.is_near():
                raise RuntimeError(f"left, {source.lag_seconds()} s behind")
            return time.monotonic() > until

        await eventually(is_over)


async def test_chart_has_the_announced_snapshot_although_the_replica_has_it_not(
    primary: Server, follower: Server, writer: Database
) -> None:
    now = utc_now()
    slot = last_boundary(now, timedelta(minutes=5))
    user_id = await writer.fetch_value("SELECT id FROM users")
    await add_snapshot(writer, user_id, slot - timedelta(minutes=5), "10")
    news = News()
    news.resumed()
    async with reading(primary, follower) as source:
        charts = Charts(
            source,
            ZoneInfo("America/New_York"),
            news,
            Admission(4),
            bytes_max=1_000_000,
            reading_seconds_max=5,
        )
        asked = Asked("demo", Timeframe.ONE_DAY)

        async def shows_all() -> bool:
            return replica.showing(source, news.announced_at) is source

        async with paused(follower):
            await add_snapshot(writer, user_id, slot, "11")
            taken = SnapshotsTaken(
                scheduled_at=slot, shard=0, shards=1, portfolios=1, positions=0, unpriced=0
            )
            news.heard(SNAPSHOTS_TAKEN, taken.model_dump_json().encode())
            assert not await shows_all()
            answer = (await charts.answer(asked, now)).body.decode()
            assert '"value":10.00' in answer
            assert '"value":11.00' in answer
            later = (await charts.answer(asked, now + timedelta(seconds=2))).body.decode()
            assert '"value":11.00' in later
            stored = f"SELECT count(*) FROM portfolio_snapshots WHERE user_id = {user_id}"  # noqa: S608
            assert await execute(primary, stored) == 2
            assert await execute(follower, stored) == 1
        await eventually(shows_all)  # and the next chart comes from the replica again
        await charts.close()


# ---- without the replica ---------------------------------------------------------------------------


async def test_killed_replica_costs_no_request_and_is_used_again(
    primary: Server, writer: Database, tmp_path: Path
) -> None:
    with replica_of(primary, tmp_path) as follower:
        async with gateway_of(primary, follower) as gateway:
            asking = [asyncio.create_task(cash(gateway)) for _ in range(50)]
            with killed(follower) as start_again:
                assert set(await asyncio.gather(*asking)) == {"1.00"}
                assert await cash(gateway) == "1.00"

                async def is_left() -> bool:
                    return "not used" in await replica_state(gateway)

                await eventually(is_left)
                await set_cash(writer, 2)
                assert await cash(gateway) == "2.00"
                start_again()
                await eventually(using_replica(gateway), timeout=20)
                before = reads_from("replica")
                assert await cash(gateway) == "2.00"
                assert reads_from("replica") == before + 1


@pytest.mark.usefixtures("writer")
async def test_frozen_replica_costs_a_short_wait_and_then_none(primary: Server, follower: Server) -> None:
    with capture_logs() as logs:
        async with gateway_of(primary, follower) as gateway:
            with frozen(follower):
                began = time.monotonic()
                answers = await asyncio.gather(*(gateway.get(CURRENT) for _ in range(30)))
                assert time.monotonic() - began < replica.ANSWER_SECONDS_MAX + 1.5
                assert {answer.status for answer in answers} == {200}
                began = time.monotonic()
                for _ in range(10):
                    assert await cash(gateway) == "1.00"
                assert time.monotonic() - began < replica.ANSWER_SECONDS_MAX

                async def is_left() -> bool:  # said at once, and remembered by `/readyz` for a second
                    return "not used" in await replica_state(gateway)

                await eventually(is_left)
            await eventually(using_replica(gateway), timeout=30)
    assert events(logs) == ["read_replica_used", "read_replica_left", "read_replica_used"]


@pytest.mark.usefixtures("writer")
async def test_process_ends_in_time_while_the_replica_is_frozen(
    primary: Server, follower: Server, nats_url: str
) -> None:
    reads = {"DATABASE_READ_URL": follower.url, "READ_REPLICA_LAG_SECONDS_MAX": "30"}
    async with started(primary.url, nats_url, **reads) as process:

        async def is_used() -> bool:
            with suppress(aiohttp.ClientError):
                return await replica_state(process.health) == "ok"
            return False

        await eventually(is_used, timeout=20)
        with frozen(follower):
            assert await cash(process.gateway) == "1.00"
            assert await process.stop() == 0
        assert "read_replica_left" in [line["event"] for line in process.lines()]


# ---- without the primary ---------------------------------------------------------------------------


@pytest.mark.usefixtures("writer")
async def test_without_the_primary_the_replica_answers_within_the_bound_and_then_nobody(
    primary: Server, follower: Server
) -> None:
    async with gateway_of(primary, follower, lag_seconds_max=3) as gateway:
        with frozen(primary):
            began = time.monotonic()
            assert await cash(gateway) == "1.00"
            assert time.monotonic() - began < 1  # nothing of it waited for the primary

            async def is_refused() -> bool:
                return (await gateway.get(CURRENT)).status == 503

            await eventually(is_refused)
            assert unavailable(await gateway.get(CURRENT))
            assert lag_metric() > 3
            assert (await gateway.get("/readyz", None)).status == 503

        async def is_ready() -> bool:
            return (await gateway.get("/readyz", None)).status == 200

        await eventually(is_ready)
        await eventually(using_replica(gateway))
        assert await cash(gateway) == "1.00"


# ---- another server than was thought ---------------------------------------------------------------


async def test_promoted_replica_is_left(primary: Server, writer: Database, tmp_path: Path) -> None:
    with replica_of(primary, tmp_path) as follower:
        async with gateway_of(primary, follower) as gateway:
            assert await execute(follower, "SELECT pg_promote()")
            await execute(follower, "UPDATE users SET cash_balance = 666")

            async def is_left() -> bool:
                return "promoted" in await replica_state(gateway)

            await eventually(is_left)
            assert lag_metric() == math.inf
            assert await cash(gateway) == "1.00"
            # Its own log grows past what the primary has written, and makes it no better.
            await execute(follower, "CREATE TABLE ballast AS SELECT generate_series(1, 100000) AS number")
            before = reads_from("replica")
            await set_cash(writer, 2)
            assert await cash(gateway) == "2.00"
            assert reads_from("replica") == before


async def test_after_a_failover_a_replica_of_the_old_primary_is_not_taken_for_a_current_one(
    primary: Server, writer: Database, tmp_path: Path
) -> None:
    with (
        replica_of(primary, tmp_path / "left") as left_behind,
        replica_of(primary, tmp_path / "next") as next_primary,
        replica_of(next_primary, tmp_path / "turned") as turned,
    ):
        assert await execute(next_primary, "SELECT pg_promote()")
        await writer.fetch("CREATE TABLE ballast AS SELECT generate_series(1, 100000) AS number")
        await writer.fetch("DROP TABLE ballast")

        async def is_ahead() -> bool:
            position = await execute(left_behind, "SELECT pg_last_wal_replay_lsn() - '0/0'")
            return bool(position > await execute(next_primary, "SELECT pg_current_wal_lsn() - '0/0'"))

        await eventually(is_ahead)
        async with reading(next_primary, left_behind, used=False) as source:

            async def is_refused() -> bool:
                return "on timeline 1, the primary on 2" in str(await source.check())

            await eventually(is_refused)
            assert not source.is_near()
        async with reading(next_primary, turned, used=False) as source:
            await eventually(near(source), timeout=20)


@pytest.mark.usefixtures("writer")
async def test_connection_to_a_server_that_has_less_is_refused(primary: Server, follower: Server) -> None:
    async with reading(primary, follower) as source:
        for server in (follower, primary):
            connection = await asyncpg.connect(server.url)
            try:
                await source.admit(connection)
                assert server is follower
            except DatabaseUnavailable:
                assert server is primary  # it replays nothing
                assert not source.is_near()
            finally:
                await connection.close()
        await eventually(near(source))  # the next look learns it anew
