"""A service as a process of its own, as an operator runs it: `python -m services.<name>`."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.conftest import ROOT
from tests.waiting import eventually

SECRET = "very-secret"
"""What must never be written to the log."""


@dataclass
class Process:
    process: asyncio.subprocess.Process
    health_url: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    async def wait_for(self, event: str, count: int = 1, *, timeout: float = 20) -> None:
        async def is_logged() -> bool:
            assert self.process.returncode is None, self.lines[-3:] + self.errors
            return len(self.logged(event)) >= count

        await eventually(is_logged, timeout=timeout)

    async def ready(self) -> dict[str, Any] | None:
        """Return what `/readyz` says; None while it is not served."""
        try:
            async with aiohttp.ClientSession() as client, client.get(f"{self.health_url}/readyz") as answer:
                said: dict[str, Any] = await answer.json()
                assert (answer.status == 200) == (said["status"] != "not ready")
                return said
        except aiohttp.ClientConnectionError:
            return None

    async def metrics(self) -> dict[str, float]:
        """Return every sample by its name with labels."""
        async with aiohttp.ClientSession() as client, client.get(f"{self.health_url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    async def check_becomes(self, check: str, text: str, *, timeout: float = 20) -> None:
        """Wait until a check of `/readyz` begins with a text."""

        async def it_has() -> bool:
            said = await self.ready()
            assert said
            assert said["checks"][check].startswith(text), said
            return True

        await eventually(it_has, timeout=timeout, every=0.2)

    async def terminate(self) -> tuple[int, float]:
        """Send SIGTERM; return the exit code and how many seconds it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(self.process.wait(), 15)
        return code, time.monotonic() - started


@asynccontextmanager
async def service(name: str, port: int, settings: Mapping[str, str]) -> AsyncIterator[Process]:
    """Run a service while the block runs, with its health on `port`."""
    environment = {
        "PATH": os.environ["PATH"],
        "HEALTH_HOST": "127.0.0.1",
        "HEALTH_PORT": str(port),
        **settings,
    }
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"services.{name}",
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
            assert SECRET.encode() not in line
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
