"""The portfolio stream: how soon a tick is an event, and what a thousand clients cost the gateway."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from bench.data import POSITIONS, refresh_prices
from bench.figures import Figure, Measured
from bench.gateway import gateway_environment, token
from bench.processes import Helper, cpu_seconds, helper, memory_mb, running, wait_for_port
from bench.progress import say
from bench.server import Databases, connected
from bench.sizes import Size
from bench.snapshots import kept_portfolios
from local.settings import free_port

FEW_CLIENTS = 100
APART_SECONDS = 0.03
"""Between two ticks where latency is measured. A user's are at least 13 ticks apart: none waits for the pace."""
BATCHES_APART_SECONDS = 0.4
"""Between two batches of ticks of all symbols, where their latency is measured."""
PACE_SECONDS = 0.25
"""Between two ticks of a symbol, and between two events of a client, where the load is measured."""
LATENCY_MS_MAX = 50
CORE_PERCENT_MAX = 100
FLAT_TIMES_MAX = 1.05
WARM_UP_SECONDS = 10.0
LATENCY_SECONDS_MAX = 30.0
LIMIT_SECONDS_MAX = 30.0
STORED_SECONDS = 60.0
"""Ticks are published for so long before the table hears of them; their sequences are far from a jump by then."""
_PATH = "/api/portfolio/stream"
_HELD_BACK = re.compile(r"^gateway_stream_held_back_total (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class _Loaded:
    """What clients saw, and what that cost."""

    seen: dict[str, Any]
    cpu_percent: float


async def measure(server: Databases, size: Size, nats_url: str) -> Measured:
    name = await kept_portfolios(server, size.users, seed_like=False)
    async with server.copy(name) as url:
        await refresh_prices(url)
        async with connected(url) as connection:
            rows = await connection.fetch(
                "SELECT symbol, sequence FROM asset_prices ORDER BY length(symbol), symbol"
            )
        async with helper("bench.tick_publisher", nats_url) as publisher:
            ticks = _Ticks(
                url, publisher, [row["symbol"] for row in rows], max(row["sequence"] for row in rows)
            )
            tokens = [token(f"user{number}") for number in range(1, size.stream_clients + 1)]
            say(f"  {min(FEW_CLIENTS, len(tokens))} clients")
            latency = await _latency(url, nats_url, ticks, tokens[:FEW_CLIENTS], size)
            say(f"  {len(tokens):,} clients for {size.stream_seconds:g} s")
            load = await _load(url, nats_url, ticks, tokens, size)
            say("  the limit")
            bare_cpu_percent = await _bare(nats_url, ticks, tokens, load, size)
    return Measured(
        _latency_figures(min(FEW_CLIENTS, len(tokens)), latency)
        + _load_figures(len(tokens), size, load, bare_cpu_percent),
        {},
    )


@dataclass
class _Ticks:
    """Every symbol moves, at once or one after the other, again and again."""

    url: str
    publisher: Helper
    symbols: list[str]
    sequence: int
    """The highest that any symbol has had."""

    async def publish(self, every_seconds: float, seconds: float, *, one_by_one: bool = False) -> float:
        """Publish for so long; return by how many milliseconds a batch was late, at worst."""
        batch, late_ms_max = 1 if one_by_one else len(self.symbols), 0.0
        loop = asyncio.get_running_loop()
        began = loop.time()
        for part in range(math.ceil(seconds / STORED_SECONDS)):
            passed_seconds = part * STORED_SECONDS
            await asyncio.sleep(began + passed_seconds - loop.time())
            part_seconds = min(seconds - passed_seconds, STORED_SECONDS)
            published = await self.publisher.ask(
                symbols=self.symbols,
                batch=batch,
                every_seconds=every_seconds,
                seconds=part_seconds,
                first=self.sequence + 1,
                acknowledged=False,
            )
            self.sequence += math.ceil(round(part_seconds / every_seconds) * batch / len(self.symbols))
            late_ms_max = max(late_ms_max, published["late_ms_max"])
            await self._store()
        return late_ms_max

    async def _store(self) -> None:
        """Let the table know how far the ticks have come, as a feeder does: a gateway reads it now and then."""
        async with connected(self.url) as connection:
            await connection.execute("UPDATE asset_prices SET sequence = $1", self.sequence)


# ---- ours ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gateway:
    process: psutil.Process
    port: int
    health_port: int

    async def held_back(self) -> float:
        """Return how many events had to wait because a client did not read."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.health_port}/metrics") as answer,
        ):
            found = _HELD_BACK.search(await answer.text())
        assert found is not None
        return float(found[1])


@asynccontextmanager
async def _gateway(url: str, nats_url: str) -> AsyncIterator[_Gateway]:
    port, health_port = free_port(), free_port()
    environment = gateway_environment(url, nats_url) | {
        "GATEWAY_PORT": str(port),
        "HEALTH_PORT": str(health_port),
    }
    with running("services.api_gateway", environment) as process:
        await wait_for_port(port)
        yield _Gateway(process, port, health_port)


@dataclass(frozen=True)
class _Latency:
    """How long ticks took to clients, and meanwhile to a bare subscriber."""

    seen: dict[str, Any]
    heard: dict[str, Any]


async def _latency(
    url: str, nats_url: str, ticks: _Ticks, tokens: Sequence[str], size: Size
) -> tuple[_Latency, _Latency]:
    """Measure ticks that come one by one, and ticks of all symbols at once."""
    seconds = min(size.stream_seconds, LATENCY_SECONDS_MAX)
    found = []
    async with (
        _gateway(url, nats_url) as gateway,
        helper("bench.sse_clients", str(gateway.port)) as clients,
        helper("bench.tick_ears", nats_url) as ears,
    ):
        await clients.ask(do="connect", path=_PATH, tokens=tokens)
        await ticks.publish(PACE_SECONDS, min(WARM_UP_SECONDS, seconds))
        for every_seconds, one_by_one in ((APART_SECONDS, True), (BATCHES_APART_SECONDS, False)):
            await clients.ask(do="count", seconds=1)  # all is quiet then
            await ears.ask(do="begin")
            listening = asyncio.create_task(clients.ask(do="listen", seconds=seconds))
            await ticks.publish(every_seconds, seconds - BATCHES_APART_SECONDS, one_by_one=one_by_one)
            seen = await listening
            found.append(_Latency(seen, (await ears.ask(do="report"))["since_received"]))
        await clients.ask(do="leave")
    one_by_one_, at_once = found
    return one_by_one_, at_once


@dataclass(frozen=True)
class _Load(_Loaded):
    memory_mb_before: float
    memory_mb_after: float
    held_back: float
    late_ms_max: float


async def _load(url: str, nats_url: str, ticks: _Ticks, tokens: Sequence[str], size: Size) -> _Load:
    warm_up = min(WARM_UP_SECONDS, size.stream_seconds)
    async with (
        _gateway(url, nats_url) as gateway,
        helper("bench.sse_clients", str(gateway.port)) as clients,
    ):
        await clients.ask(do="connect", path=_PATH, tokens=tokens)
        await ticks.publish(PACE_SECONDS, warm_up)
        held_back, before = await gateway.held_back(), memory_mb(gateway.process)
        late_ms_max, counted = await _counted(
            gateway.process,
            clients,
            lambda: ticks.publish(PACE_SECONDS, size.stream_seconds),
            size.stream_seconds,
        )
        after = memory_mb(gateway.process)
        held_back = await gateway.held_back() - held_back
        await clients.ask(do="leave")
    return _Load(counted.seen, counted.cpu_percent, before, after, held_back, late_ms_max)


async def _counted(
    measured: psutil.Process, clients: Helper, work: Callable[[], Awaitable[Any]], seconds: float
) -> tuple[Any, _Loaded]:
    """Count events while the work is done; return what it returned, and what that cost the measured process."""
    loop = asyncio.get_running_loop()
    used, began = cpu_seconds(measured), loop.time()
    working = asyncio.ensure_future(work())
    seen = await clients.ask(do="count", seconds=seconds)
    done = await working
    spent = (cpu_seconds(measured) - used) / (loop.time() - began)
    return done, _Loaded(seen, spent * 100)


# ---- the limit -----------------------------------------------------------------------------------


async def _bare(nats_url: str, ticks: _Ticks, tokens: Sequence[str], load: _Load, size: Size) -> float:
    """Return the CPU of hearing as many ticks and of sending ready bytes to as many clients, with nothing between."""
    seconds = min(size.stream_seconds, LIMIT_SECONDS_MAX)
    port = free_port()
    path = f"/events?bytes={round(load.seen['bytes_per_event'])}&every_seconds={PACE_SECONDS}"
    with running("bench.bare_server", {}, str(port)) as server:
        await wait_for_port(port)
        async with helper("bench.sse_clients", str(port)) as clients:
            await clients.ask(do="connect", path=path, tokens=tokens)
            await clients.ask(do="count", seconds=min(WARM_UP_SECONDS, seconds))
            _, sent = await _counted(server, clients, lambda: asyncio.sleep(seconds), seconds)
            await clients.ask(do="leave")
    async with helper("bench.tick_ears", nats_url) as ears:
        await ears.ask(do="begin")  # it has started then
        used = cpu_seconds(ears.measured)
        await ticks.publish(PACE_SECONDS, seconds)
        heard = (cpu_seconds(ears.measured) - used) / seconds
    return sent.cpu_percent + heard * 100


# ---- figures -------------------------------------------------------------------------------------


def _latency_figures(clients: int, latency: tuple[_Latency, _Latency]) -> list[Figure]:
    one_by_one, at_once = latency
    cases = [
        (one_by_one, f"tick on the bus to event read, {clients} clients", "p50", None),
        (one_by_one, f"tick on the bus to event read, {clients} clients", "p99", LATENCY_MS_MAX),
        (at_once, "  of all symbols at once", "p50", None),
        (at_once, "  of all symbols at once", "p99", None),
    ]
    return [
        Figure(
            f"{what}, {percent} (limit: bare subscriber)",
            "ms",
            measured.seen[percent],
            limit=measured.heard[percent],
            at_most=goal,
        )
        for measured, what, percent, goal in cases
    ]


def _load_figures(clients: int, size: Size, load: _Load, bare_cpu_percent: float) -> list[Figure]:
    rate, pace_ms = load.seen["events_per_second"], PACE_SECONDS * 1000
    return [
        Figure(
            f"{clients:,} clients x {POSITIONS}, all moving 4 times a second (limit: bare SSE, subscriber)",
            "% of a core",
            load.cpu_percent,
            limit=bare_cpu_percent,
            at_most=CORE_PERCENT_MAX,
        ),
        Figure(
            "  between two events of a client (limit: the pace)", "ms", 1000 / rate["median"], limit=pace_ms
        ),
        Figure("  of the client with the fewest (limit: the pace)", "ms", 1000 / rate["min"], limit=pace_ms),
        Figure("  events that waited for a slow client", "events", load.held_back, at_most=0),
        Figure(
            f"  the gateway's memory after {size.stream_seconds:g} s (limit: before)",
            "MB",
            load.memory_mb_after,
            limit=load.memory_mb_before,
            limit_times_max=FLAT_TIMES_MAX,
        ),
    ]
