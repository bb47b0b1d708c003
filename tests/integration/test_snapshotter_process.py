"""The real process: `python -m services.snapshotter`, and what an operator sees of its troubles."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import nats
import pytest

from local.servers import NatsNode, nats_node
from local.settings import free_port
from shared.clock import utc_now
from shared.database import Database
from shared.lifecycle import STOP_GRACE_SECONDS
from shared.messages import SNAPSHOT_DUE, SnapshotDue
from tests.conftest import ROOT
from tests.factories import create_user
from tests.waiting import eventually


@dataclass
class Process:
    running: asyncio.subprocess.Process
    url: str
    session: aiohttp.ClientSession
    log: Path

    async def ready(self) -> tuple[int, dict[str, str]]:
        """Return the status of /readyz and what it says of each check; 0 while nothing answers."""
        with suppress(aiohttp.ClientError):
            async with self.session.get(f"{self.url}/readyz") as answer:
                return answer.status, (await answer.json())["checks"]
        return 0, {}

    async def metric(self, name: str) -> float | None:
        async with self.session.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), None)

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]


@asynccontextmanager
async def snapshotter(database_url: str, nats_url: str, log: Path) -> AsyncIterator[Process]:
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database_url,
        "NATS_URL": nats_url,
        "SNAPSHOT_INTERVAL_MINUTES": "0.5",
        "HEALTH_HOST": "127.0.0.1",
        "HEALTH_PORT": str(port),
    }
    with log.open("wb") as output:
        running = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.snapshotter",
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            yield Process(running, f"http://127.0.0.1:{port}", session, log)
    finally:
        with suppress(ProcessLookupError):
            running.kill()
        await running.wait()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NatsNode]:
    with nats_node(tmp_path / "nats") as started:
        yield started


async def test_troubles_are_seen_and_the_service_ends_in_time_while_a_slot_waits(
    database: Database, database_url: str, node: NatsNode, tmp_path: Path
) -> None:
    await create_user(database, cash="5")
    node.stop()  # whatever comes first
    async with snapshotter(database_url, node.url, tmp_path / "log") as process:

        async def lacks_nats() -> bool:
            status, checks = await process.ready()
            return status == 503 and checks["nats"] != "ok" and checks["postgres"] == "ok"

        await eventually(lacks_nats, timeout=30)
        assert process.logged("bus_problem")[0]["advice"].startswith("nothing listens there")
        node.start()

        async def is_well() -> bool:
            status, checks = await process.ready()
            return status == 200 and set(checks.values()) == {"ok"}

        await eventually(is_well, timeout=30)
        client = await nats.connect(node.url)
        await client.jetstream().publish(SNAPSHOT_DUE, b"{")

        async def has_a_dead_letter() -> bool:
            status, checks = await process.ready()
            return status == 200 and checks["dead_letters"].startswith("1 dead letter: `admin dead-letters`")

        await eventually(has_a_dead_letter, timeout=30)
        assert await process.metric("bus_dead_letters_kept") == 1
        assert process.logged("message_put_aside")[0]["level"] == "error"
        async with no_database(database_url):
            due = SnapshotDue(scheduled_at=utc_now())
            await client.jetstream().publish(SNAPSHOT_DUE, due.model_dump_json().encode())
            await client.close()

            async def waits() -> bool:
                status, checks = await process.ready()
                return status == 503 and checks["snapshots"].endswith("a slot waits: PostgreSQL is away")

            await eventually(waits, timeout=60)
            assert await process.metric("snapshot_shards_waiting") in (1, 2)  # a boundary may have passed
            began = time.monotonic()
            process.running.send_signal(signal.SIGTERM)
            code = await asyncio.wait_for(process.running.wait(), STOP_GRACE_SECONDS + 10)
        assert code == 0, process.log.read_text()[-2000:]
        assert time.monotonic() - began < STOP_GRACE_SECONDS
        assert process.logged("stopped")


@asynccontextmanager
async def no_database(url: str) -> AsyncIterator[None]:
    """Keep everybody out of a database."""
    server, name = url.rsplit("/", 1)
    administrator = await asyncpg.connect(f"{server}/postgres")
    try:
        await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await administrator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
        )
        yield
    finally:
        await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await administrator.close()
