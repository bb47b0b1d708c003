"""Clients that are slow, silent or gone, and far too many of them."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import nats
import psutil

from bench.processes import Helper, cpu_seconds, helper
from local.servers import child_command
from local.settings import ROOT
from shared.messages import ALL_PRICES
from tests.faults import checker
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.readers import DEADLINE_SECONDS, OVERLOAD_RECOVERY_SECONDS_MAX
from tests.faults.rows.market import current
from tests.faults.rows.row import Row, control, next_slots, seconds_until, session, total
from tests.faults.signs import Sign
from tests.faults.system import System
from tests.waiting import eventually

STREAM_PATH, READ_PATH = "/api/portfolio/stream", "/api/portfolio/current"
LONG_PATH = "/api/openapi.json"
"""Of the longest answer there is."""
MOVING = [f"MOVE{letter}" for letter in "ABCDEFGHIJ"]
"""Symbols that only watchers hold, and that trade several times a second: the others are too slow to fill buffers."""
TICKS_PER_SECOND = 40
WATCHERS = [f"watcher{number}" for number in range(6)]
RECEIVE_BYTES = 4096
DEAF_STREAMS, VANISHED_STREAMS, HEARING_STREAMS = 30, 10, 4
"""For each gateway; the last two by SSE and as many by WebSocket."""
HALF_REQUESTS, DRIPPING_REQUESTS, UNREAD_ANSWERS = 20, 5, 5
DRIP_SECONDS = 0.3
PIPELINED_REQUESTS = 100
GONE_SECONDS_MAX = 75.0
"""A head may take 15 s, an answer 10 s to be taken; buffers of a stream are full after half a minute or so."""
HEARD_WITHIN_SECONDS_MAX = 4.0
READS_SECONDS_MAX = 2.0
MEMORY_MB_MORE_MAX = 40.0
FLOOD_MESSAGE_BYTES, FLOOD_MESSAGES = 64 * 1024, 400
CUT_OFF_SECONDS_MAX = 30.0

DEAF, VANISHED = "SSE clients that do not read", "watchers that vanished"
HALF, DRIPPING, UNREAD = "half requests", "requests byte by byte", "clients that read no answer"
HELD_BACK = "gateway_stream_held_back_total"
STREAMS_SSE, STREAMS_WEBSOCKET = (
    f'gateway_streams_open{{transport="{transport}"}}' for transport in ("sse", "websocket")
)

OVERLOAD_TIMES = 10
OVERLOAD_SECONDS, CAPACITY_SECONDS = 60.0, 5.0
CAPACITY_CONNECTIONS = 300
"""So many keep both gateways busy, and few are refused: each asks again as soon as it is answered."""
PEAK_REFUSED_SHARE_MAX = 0.1
OVERLOAD_CONNECTIONS = OVERLOAD_TIMES * CAPACITY_CONNECTIONS
FILES_MIN = OVERLOAD_CONNECTIONS + 1000
OVERLOAD_MEMORY_MB_MORE_MAX = 100.0
GOODPUT_SHARE_MIN = 0.8
"""Of the peak. The load has the same cores, which want to be left alone for it."""
QUICK_SECONDS = 0.5


# ---- 20: slow and vanished clients ---------------------------------------------------------------


Pair = tuple[int, int]
"""The port of a gateway and that of its client, who may have the same one towards another gateway."""


@dataclass
class Bad:
    """The connections of clients that do not behave, by what is wrong with them."""

    sockets: dict[str, list[socket.socket]] = field(default_factory=dict)
    pairs: dict[str, set[Pair]] = field(default_factory=dict)

    def add(self, kind: str, connection: socket.socket) -> None:
        self.sockets.setdefault(kind, []).append(connection)
        pair = connection.getpeername()[1], connection.getsockname()[1]
        self.pairs.setdefault(kind, set()).add(pair)

    def close(self) -> None:
        for connections in self.sockets.values():
            for connection in connections:
                connection.close()


async def _slow_clients(system: System, life: Life) -> str:
    gateways = system.services["api_gateway"]
    held_back = await total(gateways, HELD_BACK)
    bad = Bad()
    async with AsyncExitStack() as stack:
        stack.callback(bad.close)
        await stack.enter_async_context(_moving_prices(system))
        streams = await _open_streams(gateways)
        before = await checker.usage(system)
        hearing = [
            await stack.enter_async_context(_watching(system, gateway, HEARING_STREAMS))
            for gateway in system.gateway_ports
        ]
        began = time.monotonic()
        for gateway, port in system.gateway_ports.items():
            vanished = await stack.enter_async_context(_watching(system, gateway, VANISHED_STREAMS))
            vanished.vanish(bad)
            await _begin_badly(system, port, bad)
        slowly = _request(READ_PATH, system.token(WATCHERS[0]))
        await stack.enter_async_context(_dripping(bad.sockets[DRIPPING], slowly))
        cut_off = await _deaf_on_the_bus(system)
        gone = await _seconds_until_gone(system, bad, began)
        after = await checker.usage(system)
        waited = max([await each.longest_wait() for each in hearing])
        count = {kind: len(pairs) for kind, pairs in bad.pairs.items()}

    async def are_closed() -> bool:
        return await _open_streams(gateways) <= streams

    await eventually(are_closed)
    held_back = await total(gateways, HELD_BACK) - held_back
    assert held_back > 0, "no event was held back for those who do not read"
    assert waited <= HEARD_WITHIN_SECONDS_MAX, f"one who reads has waited {waited:.1f} s for an event"
    slowest = life.readers.slowest_seconds
    assert slowest <= READS_SECONDS_MAX, f"a reader has waited {slowest:.1f} s"
    more = max(after[each.name].memory_mb - before[each.name].memory_mb for each in gateways)
    assert more <= MEMORY_MB_MORE_MAX, f"{more:.0f} MB more"
    kinds = ", ".join(f"{count[kind]} {kind} gone after {seconds:.0f} s" for kind, seconds in gone.items())
    return (
        f"{kinds}; {held_back:g} events held back; deaf subscriber of the bus cut off after {cut_off:.0f} s; "
        f"others: events at least every {waited:.1f} s, answers within {slowest:.1f} s; {more:.0f} MB more"
    )


async def _begin_badly(system: System, port: int, bad: Bad) -> None:
    """Open connections to a gateway that will not be used as they should be."""
    loop = asyncio.get_running_loop()
    for number in range(DEAF_STREAMS):
        connection = await _connection(port)
        bad.add(DEAF, connection)
        subject = WATCHERS[number % len(WATCHERS)]
        await loop.sock_sendall(connection, _request(STREAM_PATH, system.token(subject, lasts_seconds=600)))
    read = _request(READ_PATH, system.token(WATCHERS[0], lasts_seconds=600))
    for number in range(HALF_REQUESTS):
        connection = await _connection(port)
        bad.add(HALF, connection)
        await loop.sock_sendall(connection, read[: 1 + number * (len(read) - 2) // HALF_REQUESTS])
    for _ in range(DRIPPING_REQUESTS):
        bad.add(DRIPPING, await _connection(port))
    long = f"GET {LONG_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    for _ in range(UNREAD_ANSWERS):
        connection = await _connection(port)
        bad.add(UNREAD, connection)
        with suppress(TimeoutError, OSError):  # it is not read from any more when it has too much to answer
            async with asyncio.timeout(0.5):
                await loop.sock_sendall(connection, long * PIPELINED_REQUESTS)


async def _connection(port: int) -> socket.socket:
    """Connect with a buffer that is soon full."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    return connection


@asynccontextmanager
async def _dripping(connections: Iterable[socket.socket], request: bytes) -> AsyncIterator[None]:
    """Send a request over each connection, byte by byte, while the block runs."""
    tasks = [asyncio.create_task(_drip(connection, request)) for connection in connections]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drip(connection: socket.socket, request: bytes) -> None:
    with suppress(OSError):
        for byte in request:
            await asyncio.get_running_loop().sock_sendall(connection, bytes([byte]))
            await asyncio.sleep(DRIP_SECONDS)


def _request(path: str, token: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}", *headers, "", ""]
    return "\r\n".join(lines).encode()


async def _seconds_until_gone(system: System, bad: Bad, began: float) -> dict[str, float]:
    """Wait until the gateways have closed every connection of these clients; return after how many seconds, by kind."""
    gone: dict[str, float] = {}

    async def are_gone() -> bool:
        open_now = await asyncio.to_thread(_clients_of, system)
        for kind, pairs in bad.pairs.items():
            if kind not in gone and pairs.isdisjoint(open_now):
                gone[kind] = time.monotonic() - began
        return len(gone) == len(bad.pairs)

    try:
        await eventually(are_gone, timeout=GONE_SECONDS_MAX, every=0.25)
    except AssertionError:
        open_now = _clients_of(system)
        left = {kind: len(pairs & open_now) for kind, pairs in bad.pairs.items() if kind not in gone}
        raise AssertionError(f"connections that are left after {GONE_SECONDS_MAX:g} s: {left}") from None
    return gone


def _clients_of(system: System) -> set[Pair]:
    """Return which connections the gateways have."""
    found = set()
    for gateway in system.services["api_gateway"]:
        for each in psutil.Process(gateway.pids()[0]).net_connections("tcp"):
            found.add((each.laddr.port, _port_of(each.raddr)))
    return found


def _port_of(address: Any) -> int:
    """Return the port of an address; 0 when there is none, as at a socket that listens."""
    return address.port if address else 0


async def _open_streams(gateways: list[Service]) -> float:
    return await total(gateways, STREAMS_SSE) + await total(gateways, STREAMS_WEBSOCKET)


# ---- those who watch -----------------------------------------------------------------------------


@dataclass
class Watching:
    """A process with clients of a stream."""

    process: asyncio.subprocess.Process

    def vanish(self, bad: Bad) -> None:
        """Freeze it: its connections are there, and nobody is."""
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        pairs = {(_port_of(each.raddr), each.laddr.port) for each in connections}
        bad.pairs.setdefault(VANISHED, set()).update(pairs)
        self.process.send_signal(signal.SIGSTOP)

    async def longest_wait(self) -> float:
        """End it; return how long one of its clients has waited for something to read, at most (seconds)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        line = await asyncio.wait_for(self.process.stdout.readline(), 10)
        assert line, "a stream was closed to one who reads"
        seconds: float = json.loads(line)["waited_seconds"]
        return seconds


@asynccontextmanager
async def _watching(system: System, gateway: str, streams: int) -> AsyncIterator[Watching]:
    """Let a process watch by so many SSE streams and so many WebSockets while the block runs."""
    upgrade = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    requests = [
        _request(STREAM_PATH, system.token(WATCHERS[number % len(WATCHERS)], lasts_seconds=600), *headers)
        for headers in ((), upgrade)
        for number in range(streams)
    ]
    process = await _started("tests.faults.onlookers")
    try:
        order = {
            "port": system.gateway_ports[gateway],
            "requests": [request.decode() for request in requests],
        }
        assert await _asked(process, order) == {"open": len(requests)}
        yield Watching(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _started(module: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *child_command([sys.executable, "-m", module]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ,
    )


async def _asked(process: asyncio.subprocess.Process, order: object) -> Any:
    """Tell a process what to do, and return what it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{json.dumps(order)}\n".encode())
    await process.stdin.drain()
    line = await asyncio.wait_for(process.stdout.readline(), 120)
    assert line, "the process has ended"
    return json.loads(line)


@asynccontextmanager
async def _moving_prices(system: System) -> AsyncIterator[None]:
    """Let watchers hold symbols that trade all the time; in the end nothing is left of them."""
    order = {"symbols": MOVING, "ticks_per_second": TICKS_PER_SECOND}
    await control(system, "PUT", "stream/load", order)
    try:
        async with session(system) as connection:
            for subject in WATCHERS:
                user = await connection.fetchval(
                    "INSERT INTO users (subject) VALUES ($1) RETURNING id", subject
                )
                await connection.executemany(
                    "INSERT INTO positions (user_id, ticker, shares, cost_basis) VALUES ($1, $2, $3, 1)",
                    [(user, symbol, Decimal(number + 1)) for number, symbol in enumerate(MOVING)],
                )

            async def are_priced() -> bool:
                found: int = await connection.fetchval(
                    "SELECT count(*) FROM asset_prices WHERE symbol = ANY($1)", MOVING
                )
                return found == len(MOVING)

            await eventually(are_priced, timeout=20)
        yield
    finally:
        async with session(system) as connection:
            left = await connection.fetch("DELETE FROM users WHERE subject = ANY($1) RETURNING id", WATCHERS)
            await control(system, "DELETE", "stream/load")
            await next_slots(4)  # until nobody asks for these symbols any more, nor values their holders
            users = [row["id"] for row in left]
            for table in ("portfolio_snapshots", "position_snapshots"):
                await connection.execute(f"DELETE FROM {table} WHERE user_id = ANY($1)", users)  # noqa: S608
            for table in ("asset_prices", "audited_prices"):
                await connection.execute(f"DELETE FROM {table} WHERE symbol = ANY($1)", MOVING)  # noqa: S608


# ---- the bus -------------------------------------------------------------------------------------


async def _deaf_on_the_bus(system: System) -> float:
    """Subscribe to prices and to a flood and read nothing; return after how many seconds the server cuts that off."""
    parts = urlsplit(system.nats.url)
    login = {"user": unquote(parts.username or ""), "pass": unquote(parts.password or "")}
    connect = json.dumps(login | {"verbose": False, "headers": True, "name": "deaf"})
    loop = asyncio.get_running_loop()
    deaf = await _connection(parts.port or 0)
    client = await nats.connect(system.nats.url)
    try:
        said = f"CONNECT {connect}\r\nSUB {ALL_PRICES} 1\r\nSUB flood 2\r\nPING\r\n"
        await loop.sock_sendall(deaf, said.encode())
        heard = b""
        while b"PONG" not in heard:
            heard += await loop.sock_recv(deaf, RECEIVE_BYTES)
        port, server = deaf.getsockname()[1], psutil.Process(system.nats.pids()[0])
        for _ in range(FLOOD_MESSAGES):
            await client.publish("flood", bytes(FLOOD_MESSAGE_BYTES))

        async def is_cut_off() -> bool:
            open_now = await asyncio.to_thread(server.net_connections, "tcp")
            return all(_port_of(each.raddr) != port for each in open_now)

        return await seconds_until(is_cut_off, CUT_OFF_SECONDS_MAX)
    finally:
        deaf.close()
        await client.close()


# ---- 22: overload --------------------------------------------------------------------------------


async def _overload(system: System, life: Life) -> str:
    gateways = system.services["api_gateway"]
    users = [user for user in system.population.active if user.shares]
    load = partial(_loaded, tokens=[system.token(user.subject, lasts_seconds=600) for user in users])
    async with helper("bench.crowd", *map(str, system.gateway_ports.values())) as crowd:
        with life.readers.overloaded():
            peak = await load(crowd, gateways, CAPACITY_CONNECTIONS, CAPACITY_SECONDS)
            before, judged = await checker.usage(system), life.readers.counts["200"]
            flood = asyncio.create_task(load(crowd, gateways, OVERLOAD_CONNECTIONS, OVERLOAD_SECONDS))
            most = await _most_memory(gateways, flood)
            found = await flood
            judged = life.readers.counts["200"] - judged
        seconds = await _seconds_to_normal(system)
    more = max(most[each.name] - before[each.name].memory_mb for each in gateways)
    seen = (
        f"{_in_words(peak)} with {CAPACITY_CONNECTIONS} connections; with {OVERLOAD_TIMES} times as many "
        f"{_in_words(found)}, refusals {_seconds_in_words(found['refused_ms'])}; "
        f"{judged} answers judged meanwhile; normal after {seconds:.1f} s; {more:.0f} MB more at most"
    )
    _check_overload(found, peak, seen)
    assert more <= OVERLOAD_MEMORY_MB_MORE_MAX, seen
    assert judged > 0, f"no answer was judged: {seen}"
    return seen


async def _loaded(
    crowd: Helper, gateways: Iterable[Service], connections: int, seconds: float, *, tokens: Sequence[str]
) -> dict[str, Any]:
    """Let so many connections ask; return what they saw, and the gateways' processor seconds for each answer."""
    processes = [psutil.Process(gateway.pids()[0]) for gateway in gateways]
    used = sum(map(cpu_seconds, processes))
    seen = await crowd.ask(path=READ_PATH, tokens=tokens, connections=connections, seconds=seconds)
    used = sum(map(cpu_seconds, processes)) - used
    return seen | {"cpu_seconds": used / max(seen["answers"].get("200", 0), 1)}


def _in_words(seen: dict[str, Any]) -> str:
    statuses = ", ".join(f"{count} times {status}" for status, count in sorted(seen["answers"].items()))
    return (
        f"{seen['ok_per_second']:.0f} served a second ({statuses}), {_seconds_in_words(seen['ok_ms'])}, "
        f"{seen['cpu_seconds'] * 1000:.2f} ms of the gateways' processors for each"
    )


def _seconds_in_words(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{what} {value / 1000:.1f} s" for what, value in milliseconds.items())


def _check_overload(found: dict[str, Any], peak: dict[str, Any], seen: str) -> None:
    """Check what came of a load that is too much."""
    assert not found["lost"], f"{found['lost']} connections lost: {seen}"
    assert set(found["answers"]) <= {"200", "429", "503"}, seen
    assert set(found["answers"]) > {"200"}, f"nobody is refused: {seen}"
    refused = peak["refused_per_second"] / peak["ok_per_second"]
    assert refused <= PEAK_REFUSED_SHARE_MAX, f"that is no peak: {seen}"
    slowest_ms = max(found["ok_ms"]["max"], found["refused_ms"]["max"], found["waiting_ms"])
    assert slowest_ms <= DEADLINE_SECONDS * 1000, f"somebody waits for {slowest_ms:.0f} ms: {seen}"
    assert found["ok_per_second"] >= GOODPUT_SHARE_MIN * peak["ok_per_second"], f"few are served: {seen}"


async def _most_memory(gateways: Iterable[Service], while_task: "asyncio.Task[Any]") -> dict[str, float]:
    """Return the most memory (MB) that each gateway uses until the task is done."""
    most: dict[str, float] = {}
    while not while_task.done():
        for gateway in gateways:
            used = psutil.Process(gateway.pids()[0]).memory_info().rss / 1e6
            most[gateway.name] = max(used, most.get(gateway.name, 0.0))
        await asyncio.wait({while_task}, timeout=0.25)
    return most


async def _seconds_to_normal(system: System) -> float:
    """Return how long it takes until every gateway is ready and answers quickly, several times in a row."""
    users: Sequence[Any] = [user for user in system.population.active if user.shares]

    async def is_normal() -> bool:
        for gateway in system.services["api_gateway"]:
            assert await gateway.is_ready()
            for user in users[:5]:
                began = time.monotonic()
                await current(system, gateway.name, user)
                assert time.monotonic() - began <= QUICK_SECONDS
        return True

    return await seconds_until(is_normal, OVERLOAD_RECOVERY_SECONDS_MAX)


def _lack_of_files() -> str | None:
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)  # up to which all of us go by ourselves
    is_enough = allowed == resource.RLIM_INFINITY or allowed >= FILES_MIN
    return None if is_enough else f"{allowed} open files are allowed at most, not {FILES_MIN}"


ROWS = (
    Row(
        20,
        "slow and vanished HTTP, SSE and WebSocket clients, slow bus consumer",
        "half requests, bytes one by one, answers and streams that nobody reads, a frozen client",
        _slow_clients,
        signs=(Sign(metric=HELD_BACK),),
    ),
    Row(
        22,
        f"overload: {OVERLOAD_TIMES} times the clients that can be served",
        f"{OVERLOAD_CONNECTIONS} connections that ask again at once, for {OVERLOAD_SECONDS:g} s",
        _overload,
        needs=_lack_of_files,
        signs=(Sign("load", 'gateway_requests_refused_total{reason="overload"}', "overload_began"),),
    ),
)
