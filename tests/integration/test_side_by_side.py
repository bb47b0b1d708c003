"""An older version and this one side by side on one database and one NATS, as in a rolling upgrade."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from local.settings import SIMULATED_KEYS, free_port
from shared.database import SCHEMA_REVISION, Database
from tests.conftest import ROOT
from tests.factories import create_user
from tests.gateway import SECRET, Gateway
from tests.waiting import eventually

SLOT = timedelta(seconds=1.5)
SLOTS = 4
PATHS = ("/api/portfolio/current", "/api/portfolio/performance?timeframe=1D")
REVISION = re.compile(r'^SCHEMA_REVISION = "(\d+)"$', re.M)
# What a statement says that does not fit the schema, and a bus that does not fit its streams.
MISFITS = ("relation", "column", "function", "schema", "alembic", "exists without the subject", "Traceback")


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


def revision_of(commit: str) -> str | None:
    found = REVISION.search(git("show", f"{commit}:shared/database.py").decode())
    return found and found[1]


def newest_older_version() -> str:
    """Return the last commit that needed an older schema; skip the test where the history does not tell."""
    try:
        needed_since = None
        for commit in git("log", "--format=%H", "--", "shared/database.py").decode().split():
            if revision_of(commit) != SCHEMA_REVISION:
                break
            needed_since = commit
        before = git("rev-parse", "--verify", f"{needed_since}^").decode().strip()
        if revision_of(before) != SCHEMA_REVISION:
            return before
    except (OSError, subprocess.CalledProcessError):
        pass
    pytest.skip("there is no git history here that reaches back to an older schema")


class Service:
    """A process of one of the versions, and what it logs."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, health: Gateway, api: Gateway) -> None:
        self.name = name
        self.process = process
        self.health, self.api = health, api
        self.said: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            self.said.append(line.decode())

    async def is_ready(self) -> bool:
        assert self.process.returncode is None, "".join(self.said)
        with suppress(aiohttp.ClientError):
            return (await self.health.get("/readyz", None)).status == 200
        return False

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.said) if line["event"] == event]

    def complaints(self) -> list[str]:
        """Return its errors, and what speaks of a misfit; slots are counted, and the first one comes before the bus."""
        return [
            line
            for line in self.said
            if any(word in line for word in MISFITS)
            or (json.loads(line)["level"] == "error" and json.loads(line)["event"] != "slot_missed")
        ]

    async def end(self) -> int:
        with suppress(ProcessLookupError):
            self.process.terminate()
        code = await asyncio.wait_for(self.process.wait(), 20)
        await self._reading
        return code


class Version:
    """The services of one version."""

    def __init__(self, tree: Path, environment: dict[str, str], session: aiohttp.ClientSession) -> None:
        self._tree, self._environment, self._session = tree, environment, session
        self.services: dict[str, Service] = {}

    async def start(self, *names: str) -> None:
        for name in names:
            health, api = free_port(), free_port()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"services.{name}"),
                cwd=self._tree,
                env=self._environment | {"HEALTH_PORT": str(health), "GATEWAY_PORT": str(api)},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            self.services[name] = Service(
                name, process, Gateway(health, self._session), Gateway(api, self._session)
            )
        for name in names:
            await eventually(self.services[name].is_ready, timeout=60)

    async def end(self) -> None:
        codes = await asyncio.gather(*(service.end() for service in self.services.values()))
        assert set(codes) <= {0}, {name: service.said[-3:] for name, service in self.services.items()}

    def complaints(self) -> dict[str, list[str]]:
        said = {name: service.complaints() for name, service in self.services.items()}
        return {name: lines for name, lines in said.items() if lines}


@asynccontextmanager
async def simulated_market() -> AsyncIterator[str]:
    """Run this version's market simulator, and yield its address."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.market_simulator"),
        cwd=ROOT,
        env=os.environ | {"SIMULATOR_PORT": str(port), "SIMULATOR_RATE_LIMIT": "10000"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


@pytest.fixture
async def environment(database_url: str, nats_url: str) -> AsyncIterator[dict[str, str]]:
    async with simulated_market() as market:
        yield {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": database_url,
            "NATS_URL": nats_url,
            "JWT_SECRET": SECRET,
            "HEALTH_HOST": "127.0.0.1",
            "GATEWAY_HOST": "127.0.0.1",
            **SIMULATED_KEYS,
            "ALPACA_DATA_URL": market,
            "ALPACA_BASE_URL": market,
            "ALPACA_STREAM_URL": market.replace("http", "ws", 1),
            "PRICE_UPDATE_INTERVAL_SECONDS": "1",
            "SNAPSHOT_INTERVAL_MINUTES": str(SLOT / timedelta(minutes=1)),
        }


async def test_older_services_work_beside_these(
    database: Database, environment: dict[str, str], tmp_path: Path
) -> None:
    commit = newest_older_version()
    archive = git("archive", commit, "shared", "services", "ops")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive, check=True)
    for subject in ("demo", "other"):
        await create_user(database, subject, cash="5", positions={"AAPL": ("2", "3"), "BTC/USD": ("1", "1")})
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))
        )
        old, new = Version(tmp_path, environment, session), Version(ROOT, environment, session)
        for version in (old, new):  # first the old ones, as they are there already
            stack.push_async_callback(version.end)
            await version.start("price_feeder", "snapshotter", "api_gateway")

        async def slots_of_each() -> bool:
            return all(
                len(version.services["snapshotter"].logged("snapshots_taken")) >= SLOTS
                for version in (old, new)
            )

        await eventually(slots_of_each, timeout=60)
        for version in (old, new):
            assert version.services["price_feeder"].logged("prices_updated")
            for path in PATHS:
                answer = await version.services["api_gateway"].api.get(path)
                assert answer.status == 200, answer.text
                assert answer.json().get("data_available", True)
        await old.end()
        taken = len(new.services["snapshotter"].logged("snapshots_taken"))

        async def new_ones_go_on() -> bool:
            return len(new.services["snapshotter"].logged("snapshots_taken")) >= taken + 2

        await eventually(new_ones_go_on, timeout=20)
    assert (old.complaints(), new.complaints()) == ({}, {})
    changed = [
        (line["stream"], tuple(line["changed"]))
        for version in (old, new)
        for service in version.services.values()
        for line in service.logged("bus_stream_updated")
    ]
    assert len(changed) == len(set(changed)), "the versions fight over a stream"
    slots = await database.fetch(
        "SELECT timestamp, count(*) AS users FROM portfolio_snapshots GROUP BY 1 ORDER BY 1"
    )
    assert {row["users"] for row in slots} == {2}
    assert [row["timestamp"] for row in slots] == [
        slots[0]["timestamp"] + number * SLOT for number in range(len(slots))
    ]
    assert len(slots) >= 2 * SLOTS
    details = await database.fetch(
        "SELECT count(*) AS positions FROM position_snapshots GROUP BY timestamp, user_id"
    )
    assert max(row["positions"] for row in details) == 2
