"""The price feeder as a process of its own."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.conftest import ROOT
from tests.waiting import eventually


@dataclass
class Process:
    process: asyncio.subprocess.Process
    health_url: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    async def wait_for(self, event: str, count: int = 1) -> None:
        async def is_logged() -> bool:
            assert self.process.returncode is None, self.lines[-3:] + self.errors
            return len(self.logged(event)) >= count

        await eventually(is_logged, timeout=20)

    async def terminate(self) -> tuple[int, float]:
        """Send SIGTERM; return the exit code and how many seconds it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(self.process.wait(), 15)
        return code, time.monotonic() - started


@asynccontextmanager
async def price_feeder(
    database_url: str, nats_url: str, market_url: str, port: int, **settings: str
) -> AsyncIterator[Process]:
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database_url,
        "NATS_URL": nats_url,
        "ALPACA_API_KEY": "key",
        "ALPACA_SECRET_KEY": "very-secret",
        "ALPACA_DATA_URL": market_url,
        "ALPACA_BASE_URL": market_url,
        "PRICE_STREAM_ENABLED": "false",
        "PRICE_CLOSED_INTERVAL_SECONDS": "0.5",
        "PRICE_UPDATE_INTERVAL_SECONDS": "0.5",
        "HEALTH_HOST": "127.0.0.1",
        "HEALTH_PORT": str(port),
        **settings,
    }
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.price_feeder",
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert started.stdout
    assert started.stderr
    running = Process(started, f"http://127.0.0.1:{port}")

    async def read_lines(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            assert b"very-secret" not in line
            running.lines.append(json.loads(line))

    async def read_errors(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            running.errors.append(line.decode())

    reading = asyncio.gather(read_lines(started.stdout), read_errors(started.stderr))
    try:
        yield running
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        await reading
