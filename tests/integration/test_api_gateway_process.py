"""The real process: `python -m services.api_gateway`, from start to exit."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
import pytest

from shared.clock import utc_now
from shared.database import Database
from tests.conftest import ROOT
from tests.factories import add_snapshot, create_user, set_price
from tests.gateway import SECRET, Answer, Gateway, bearer
from tests.waiting import eventually

CURRENT = "/api/portfolio/current"
NOWHERE = "nats://127.0.0.1:9"
CHECKS = (
    "postgres",
    "schema",
    "nats",
    "clock",
    "notifications",
    "load",
    "connections",
    "user_rates",
    "streams",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Process:
    running: asyncio.subprocess.Process
    gateway: Gateway
    health: Gateway
    output: bytes = b""

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask the process to stop, and return its exit code."""
        self.running.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        async with asyncio.timeout(15):
            assert self.running.stdout is not None
            self.output += await self.running.stdout.read()
            return await self.running.wait()

    def lines(self) -> list[dict[str, Any]]:
        """Return the log; every line of it is one JSON object."""
        return [json.loads(line) for line in self.output.decode().splitlines()]


@asynccontextmanager
async def started(database_url: str, nats_url: str, **environment: str) -> AsyncIterator[Process]:
    ports = {"GATEWAY_PORT": str(free_port()), "HEALTH_PORT": str(free_port())}
    hosts = {"GATEWAY_HOST": "127.0.0.1", "HEALTH_HOST": "127.0.0.1"}
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    wanted = inherited | ports | hosts | {"DATABASE_URL": database_url, "NATS_URL": nats_url}
    wanted |= {"JWT_SECRET": SECRET, "GATEWAY_DRAIN_SECONDS": "0"} | environment
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.api_gateway",
        cwd=ROOT,
        env=wanted,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield Process(
            process,
            Gateway(int(wanted["GATEWAY_PORT"]), session),
            Gateway(int(wanted["HEALTH_PORT"]), session),
        )
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def listening(process: Process) -> bool:
    with suppress(aiohttp.ClientError):
        return (await process.gateway.get("/healthz", None)).status == 200
    return False


async def test_process_starts_answers_everything_and_ends_with_0(
    database: Database, database_url: str, nats_url: str
) -> None:
    user_id = await create_user(database, cash="1", positions={"IBM": ("2", "3")})
    await set_price(database, "IBM", "4")
    await add_snapshot(database, user_id, utc_now(), "9")
    async with started(database_url, nats_url) as process:
        await eventually(lambda: listening(process), timeout=20)

        async def is_well() -> bool:
            ready = (await process.gateway.get("/readyz", None)).json()
            return bool(ready["checks"] == dict.fromkeys(CHECKS, "ok"))

        await eventually(is_well)
        assert (await process.health.get("/readyz", None)).status == 200
        assert (await process.gateway.get(CURRENT)).text.startswith('{"total_value":9.00,')
        assert (await process.gateway.get("/api/portfolio/performance?timeframe=ALL")).json()[
            "data_available"
        ]
        assert (await process.gateway.get("/api/openapi.json", None)).json()["openapi"] == "3.1.0"
        assert (await process.gateway.get(CURRENT, None)).status == 401
        metrics = (await process.health.get("/metrics", None)).text
        assert f'gateway_request_seconds_count{{route="{CURRENT}",status="200"}} 1.0' in metrics
        assert 'database_connections{pool="api_gateway",state="idle"} ' in metrics
        assert "\nfoliotick_event_loop_lag_seconds " in metrics
        assert psutil.Process(process.running.pid).memory_info().rss < 120 * 1024 * 1024
        assert await process.stop() == 0
    served = [line for line in process.lines() if line["event"] == "request_served"]
    assert {"method", "route", "status", "duration_ms", "request_id"} <= served[0].keys()
    assert {line["level"] for line in process.lines()} <= {"info", "warning"}
    assert bearer()["Authorization"].split(".")[0] not in process.output.decode()


async def test_request_under_way_is_finished_before_the_end(
    database: Database, database_url: str, nats_url: str
) -> None:
    await create_user(database)
    async with started(database_url, nats_url) as process:
        await eventually(lambda: listening(process), timeout=20)
        async with database.transaction() as connection:
            await connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            under_way = asyncio.ensure_future(process.gateway.get(CURRENT))
            await eventually(lambda: is_waiting(database))
            process.running.send_signal(signal.SIGTERM)

            async def is_refusing() -> bool:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", process.gateway.port)
                    writer.close()
                    return False
                return True

            await eventually(is_refusing)
            assert not under_way.done()
        answer: Answer = await under_way
        assert answer.status == 200
        assert await process.ended() == 0


async def is_waiting(database: Database) -> bool:
    waiting = await database.fetch_value(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'api_gateway' AND wait_event_type = 'Lock'"
    )
    return bool(waiting)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_process_starts_and_ends_without_its_servers(number: signal.Signals) -> None:
    async with started("postgresql://nobody:secret@127.0.0.1:9/none", NOWHERE) as process:
        await eventually(lambda: listening(process), timeout=20)
        answer = await process.gateway.get(CURRENT)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
        ready = await process.health.get("/readyz", None)
        assert ready.status == 503
        checks = ready.json()["checks"]
        assert "ok" not in [checks[name] for name in ("postgres", "schema", "nats", "notifications")]
        assert await process.stop(number) == 0
    assert "Traceback" not in process.output.decode()
    assert not [line for line in process.lines() if "exception" in line]


async def test_answers_do_not_need_nats(database: Database, database_url: str) -> None:
    await create_user(database, cash="5")
    async with started(database_url, NOWHERE) as process:
        await eventually(lambda: listening(process), timeout=20)
        assert (await process.gateway.get(CURRENT)).status == 200
        assert (await process.gateway.get("/readyz", None)).json()["checks"]["nats"] == "failed"
        assert await process.stop() == 0


@pytest.mark.parametrize("name", ["GATEWAY_PORT", "HEALTH_PORT"])
async def test_taken_port_is_said_in_one_line(name: str, database_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with started(database_url, NOWHERE, **{name: str(port)}) as process:
            assert await process.ended() == 1
    errors = [line for line in process.lines() if line["level"] == "error"]
    assert len(errors) == 1
    assert f"{name} {port} cannot be used: " in errors[0]["error"]
    assert "address already in use" in errors[0]["error"].lower()
    assert "exception" not in errors[0]


async def test_wrong_settings_are_said_in_words() -> None:
    async with started("mysql://nobody@127.0.0.1/none", NOWHERE, JWT_SECRET="short") as process:
        assert await process.ended() == 2
    said = process.output.decode()
    assert said.startswith("api_gateway cannot start, its settings are wrong:\n")
    assert "DATABASE_URL must be" in said
    assert "JWT_SECRET must be at least 32 bytes long" in said
