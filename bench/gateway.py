"""`/current` with 10 positions, authentication and metrics on, beside bare aiohttp: server CPU per request."""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import median

import psutil

from bench.figures import Figure
from local.settings import ROOT, free_port, service_environment
from services.admin.settings import TokenSettings
from services.admin.tokens import minted_token
from shared.clock import utc_now

CONNECTIONS = 64
REQUESTS = 6_000
RUNS = 3
REQUESTS_PER_CPU_SECOND_MIN = 1_000
START_SECONDS_MAX = 30.0
_SECRET = "the benchmark's own secret, long enough"  # noqa: S105


async def measure(database_url: str, nats_url: str) -> list[Figure]:
    port, bare_port = free_port(), free_port()
    token = minted_token(
        TokenSettings.model_validate({"jwt_secret": _SECRET}),
        "user7",
        now=utc_now(),
        lifetime=timedelta(hours=1),
    )
    environment = service_environment(
        {
            "DATABASE_URL": database_url,
            "NATS_URL": nats_url,
            "JWT_SECRET": _SECRET,
            "GATEWAY_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "HEALTH_HOST": "127.0.0.1",
            "HEALTH_PORT": str(free_port()),
        }
    )
    with (
        _process(["services.api_gateway"], environment) as gateway,
        _process(["bench.bare_server", str(bare_port), database_url], environment) as bare,
    ):
        current = await _cpu_ms(gateway, port, "/api/portfolio/current", token)
        query = await _cpu_ms(bare, bare_port, "/query")
        constant = await _cpu_ms(bare, bare_port, "/constant")
        memory_mb = gateway.memory_info().rss / 1_000_000
    per_second = 1000 / current
    return [
        Figure(
            "/current, 10 positions, per core",
            f"{per_second:,.0f} requests/s ({current:.3f} ms CPU)",
            f"> {REQUESTS_PER_CPU_SECOND_MIN:,}/s",
            per_second > REQUESTS_PER_CPU_SECOND_MIN,
        ),
        Figure(
            "  against bare aiohttp with one trivial query",
            f"{query / current:.2f} of the limit ({query:.3f} ms)",
            ">= 0.4",
            query / current >= 0.4,
        ),
        Figure(
            "  against bare aiohttp, constant answer",
            f"{constant / current:.2f} ({constant:.3f} ms)",
            "-",
            True,
        ),
        Figure("memory of the gateway under load", f"{memory_mb:.0f} MB", "< 120 MB", memory_mb < 120),
    ]


@contextmanager
def _process(module: list[str], environment: dict[str, str]) -> Iterator[psutil.Process]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(15)


async def _cpu_ms(server: psutil.Process, port: int, path: str, token: str = "") -> float:
    """Return the median CPU milliseconds that the server spends on a request, in user and kernel mode."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    request += f"Authorization: Bearer {token}\r\n\r\n" if token else "\r\n"
    await _wait_for(port)
    await _load(port, request.encode(), REQUESTS // 4)
    spent = []
    for _ in range(RUNS):
        before = server.cpu_times()
        await _load(port, request.encode(), REQUESTS)
        after = server.cpu_times()
        spent.append((after.user + after.system - before.user - before.system) * 1000 / REQUESTS)
    return median(spent)


async def _wait_for(port: int) -> None:
    async with asyncio.timeout(START_SECONDS_MAX):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return


async def _load(port: int, request: bytes, requests: int) -> None:
    """Send the request over 64 connections that are kept open, one at a time on each."""
    await asyncio.gather(*(_client(port, request, requests // CONNECTIONS) for _ in range(CONNECTIONS)))


async def _client(port: int, request: bytes, requests: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()
