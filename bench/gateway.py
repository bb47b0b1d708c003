"""The API over HTTP: CPU that the server process spends on a request, the seed's stack, ours and bare aiohttp.

Elapsed time says more about the machine's other tenants and about the client, which shares it, than about the server.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle, islice

import psutil

from bench.data import POSITIONS, SLOT, recent_history, refresh_prices
from bench.figures import Figure, Measured, middle
from bench.processes import cpu_seconds, memory_mb, running, wait_for_port
from bench.progress import progress
from bench.server import Databases
from bench.sizes import Size
from bench.snapshots import kept_portfolios
from local.settings import free_port
from services.admin.settings import TokenSettings
from services.admin.tokens import minted_token
from shared.clock import last_boundary, utc_now

CONNECTIONS = 64
CHART_POINTS = 288
CHART_CPU_MS_MAX = 0.5
MEMORY_MB_MAX = 120
HISTORY = timedelta(hours=26)
_SEED_SHARE = 8
"""The seed's stack takes about so many times as long, and gets so many times fewer requests."""
_SECRET = "the benchmark's own secret, long enough"  # noqa: S105
_CURRENT = "/api/portfolio/current"
_CHART = "/api/portfolio/performance?timeframe=1D"


@dataclass(frozen=True)
class _Server:
    process: psutil.Process
    port: int


@dataclass(frozen=True)
class _Load:
    """Requests to send to a server."""

    server: _Server
    requests: list[bytes]
    status: int = 200


async def measure(server: Databases, size: Size, nats_url: str) -> Measured:
    ours_name = await kept_portfolios(server, size.users, seed_like=False)
    seed_name = await kept_portfolios(server, size.users, seed_like=True)
    # Slots of the near future as well: a chart ends now, and the measuring takes a while.
    last = last_boundary(utc_now(), SLOT) + timedelta(hours=1)
    seed_users = min(size.users, 1_000)
    async with server.copy(ours_name) as ours_url:
        await refresh_prices(ours_url)
        await recent_history(ours_url, size.users, last - HISTORY, last, seed_like=False)
        async with server.copy(seed_name) as seed_url:
            await refresh_prices(seed_url)
            await recent_history(seed_url, seed_users, last - HISTORY, last, seed_like=True)
            return await _measure(size, nats_url, ours_url, seed_url)


async def _measure(size: Size, nats_url: str, ours_url: str, seed_url: str) -> Measured:
    tokens = [token(f"user{number}") for number in range(1, size.users + 1)]
    some = tokens[: min(size.users, 1_000)]
    with (
        _running("services.api_gateway", gateway_environment(ours_url, nats_url)) as ours,
        _running("bench.seed_like.app", {"DATABASE_URL": seed_url, "JWT_SECRET": _SECRET}) as seed,
        _running("bench.bare_server", {}, ours_url) as bare,
    ):
        for each in (ours, seed, bare):
            await wait_for_port(each.port)
        points, _ = await _asked_chart(ours.port, tokens[0])
        assert points == CHART_POINTS, points
        dear, cheap = max(size.requests // _SEED_SHARE, 1), size.requests
        loads = {
            "current": _Load(ours, _requests(_CURRENT, some, cheap)),
            "current, seed": _Load(seed, _requests(_CURRENT, some, dear)),
            "query": _Load(bare, _requests("/query", [], cheap)),
            "constant": _Load(bare, _requests("/constant", [], cheap)),
            "constant, seed": _Load(seed, _requests("/constant", [], dear)),
            "chart, seed": _Load(seed, _requests(_CHART, some, dear)),
            "cached": _Load(ours, _requests(_CHART, tokens[:8], cheap)),
        }
        # Every user is asked for once, so that no answer can have been kept.
        fresh = iter(tokens[8:])
        each_run = min(size.uncached_requests, (len(tokens) - 8) // (size.runs + 1))
        cpu_ms: dict[str, list[float]] = {name: [] for name in (*loads, "uncached", "304")}
        for run in progress("requests", range(size.runs + 1), total=size.runs + 1, unit="runs"):
            asking = list(islice(fresh, each_run))
            loads["uncached"] = _Load(ours, _requests(_CHART, asking, each_run))
            # The charts are new to the gateway, the users' tokens are not.
            await _send(ours.port, _requests(_CURRENT, asking, each_run), 200)
            _, tag = await _asked_chart(ours.port, tokens[0])
            repeated = _requests(_CHART, tokens[:1], cheap, if_none_match=tag)
            loads["304"] = _Load(ours, repeated, status=304)
            for name in ("uncached", *(name for name in loads if name != "uncached")):
                load = loads[name]
                spent = await _cpu_ms(load)
                if run > 0:  # the first one warms up
                    cpu_ms[name].append(spent)
        ours_mb, seed_mb = memory_mb(ours.process), memory_mb(seed.process)
    cpu = {name: middle(values) for name, values in cpu_ms.items()}
    unit = "ms CPU"
    return Measured(
        [
            Figure(
                f"/current, {POSITIONS} positions (limit: bare aiohttp + query)",
                unit,
                cpu["current"],
                cpu["current, seed"],
                cpu["query"],
                times_min=12,
                share_min=0.75,
            ),
            Figure(
                f"chart of {CHART_POINTS} points, not cached",
                unit,
                cpu["uncached"],
                cpu["chart, seed"],
                at_most=CHART_CPU_MS_MAX,
                times_min=20,
            ),
            Figure(
                "  cached (limit: bare aiohttp)",
                unit,
                cpu["cached"],
                cpu["chart, seed"],
                cpu["constant"],
                share_min=0.7,
            ),
            Figure(
                "  304 (limit: bare aiohttp)",
                unit,
                cpu["304"],
                cpu["chart, seed"],
                cpu["constant"],
                share_min=0.7,
            ),
            Figure("a constant: bare aiohttp, and FastAPI", unit, cpu["constant"], cpu["constant, seed"]),
            Figure("memory of the server process", "MB", ours_mb, seed_mb, at_most=MEMORY_MB_MAX),
        ],
        {},
    )


# ---- servers -------------------------------------------------------------------------------------


def gateway_environment(database_url: str, nats_url: str) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "NATS_URL": nats_url,
        "JWT_SECRET": _SECRET,
        "GATEWAY_HOST": "127.0.0.1",
        "HEALTH_HOST": "127.0.0.1",
        "HEALTH_PORT": str(free_port()),
        "USER_REQUESTS_PER_SECOND": "0",
        "GATEWAY_DRAIN_SECONDS": "0",
        "LOG_LEVEL": "WARNING",
    }


@contextmanager
def _running(module: str, environment: dict[str, str], *arguments: str) -> Iterator[_Server]:
    """Run a server as a process for the block, on a free port that it is told in both ways."""
    port = free_port()
    with running(module, {"GATEWAY_PORT": str(port), **environment}, str(port), *arguments) as process:
        yield _Server(process, port)


# ---- requests ------------------------------------------------------------------------------------


def token(subject: str) -> str:
    """Return a bearer token that the gateway of `gateway_environment` trusts."""
    return minted_token(
        TokenSettings.model_validate({"jwt_secret": _SECRET}),
        subject,
        now=utc_now(),
        lifetime=timedelta(hours=6),
    )


def _requests(path: str, tokens: Sequence[str], count: int, *, if_none_match: str = "") -> list[bytes]:
    """Return so many requests, of the tokens in turn."""
    condition = f"If-None-Match: {if_none_match}\r\n" if if_none_match else ""
    kinds = [
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n{condition}\r\n".encode()
        for token in tokens
    ] or [f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()]
    return list(islice(cycle(kinds), count))


async def _cpu_ms(load: _Load) -> float:
    """Send the load's requests; return the CPU milliseconds per request, of user and kernel mode."""
    before = cpu_seconds(load.server.process)
    await _send(load.server.port, load.requests, load.status)
    return (cpu_seconds(load.server.process) - before) * 1000 / len(load.requests)


async def _send(port: int, requests: list[bytes], status: int) -> None:
    """Send the requests over 64 connections that are kept open, one at a time on each."""
    waiting = iter(requests)
    await asyncio.gather(*(_client(port, waiting, status) for _ in range(min(CONNECTIONS, len(requests)))))


async def _client(port: int, waiting: Iterator[bytes], status: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in waiting:
        writer.write(request)
        answered, _, _ = await _answer(reader)
        assert answered == status, answered
    writer.close()
    await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    status = int(first.split(" ")[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0"))) if status != 304 else b""
    return status, headers, body


async def _asked_chart(port: int, token: str) -> tuple[int, str]:
    """Return the number of points of a chart, and its ETag, empty when it has none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_requests(_CHART, [token], 1)[0])
    status, headers, body = await _answer(reader)
    assert status == 200, body
    writer.close()
    await writer.wait_closed()
    return body.count(b'"timestamp"'), headers.get("etag", "")
