"""A TCP proxy that does to a connection what networks do: delays, resets, silence, trickles, refusals."""

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

CHUNK_SIZE_MAX = 65_536
CHUNKS_MAX = 64
"""On their way in one direction; whoever sends more has to wait."""
TRICKLE_SECONDS = 0.02
"""Between two drops."""


@dataclass(frozen=True)
class Weather:
    """What is done to the bytes that pass."""

    latency_seconds: float = 0.0
    """Added to each round trip, on the way there."""
    jitter_seconds: float = 0.0
    """How far the latency of a chunk may be from that."""
    is_silent: bool = False
    """Nothing passes, as if all packets were lost: what was sent meanwhile passes afterwards."""
    bytes_per_second: float | None = None
    """In each direction of a connection."""


FAIR = Weather()


@dataclass(eq=False)
class _Passage:
    """A connection that passes through."""

    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def reset(self) -> None:
        for writer in self.writers:
            connection: Any = writer.get_extra_info("socket")
            with suppress(OSError):  # closed already
                # To close it without lingering is to send RST.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Passes connections to `port` of this machine on to `target_port`, in any weather."""

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        self.target_port = target_port
        self.port = 0
        self.connections = 0
        """That were accepted."""
        self.resets = 0
        """Connections that were reset."""
        self.bytes_there = 0
        self.bytes_back = 0
        self._weather = FAIR
        self._changed = asyncio.Event()
        self._chance = random.Random(seed)
        self._passages: set[_Passage] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    # ---- what is done to it ----------------------------------------------------------------------

    @property
    def weather(self) -> Weather:
        return self._weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        """Let new weather begin, for connections that are open as well."""
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def open_connections(self) -> int:
        return len(self._passages)

    def reset(self, share: float = 1.0) -> int:
        """Reset open connections, each with this probability; return how many."""
        struck = [passage for passage in self._passages if self._chance.random() < share]
        for passage in struck:
            passage.reset()
        self.resets += len(struck)
        return len(struck)

    async def refuse(self) -> None:
        """Accept no more connections: they are refused at once. Those that are open stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """Accept connections, on the same port as ever."""
        if self._server is None:
            self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        await self.refuse()
        for passage in self._passages:
            passage.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- what passes -----------------------------------------------------------------------------

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        passage = _Passage([writer])
        self._passages.add(passage)
        try:
            await self._fair_enough()
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            passage.writers.append(there_writer)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._flow(reader, there_writer, is_back=False))
                tasks.create_task(self._flow(there_reader, writer, is_back=True))
        except* OSError:  # the one end or the other is gone: so is the connection
            passage.reset()
        finally:
            for each in passage.writers:
                each.close()
            self._passages.discard(passage)
            self._tasks.discard(task)

    async def _flow(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_back: bool
    ) -> None:
        """Let bytes pass in one direction until their end."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_MAX)

        async def arrive() -> None:
            while True:
                due_at, chunk = await on_the_way.get()
                await asyncio.sleep(due_at - time.monotonic())
                await self._fair_enough()
                if not chunk:
                    writer.write_eof()
                    return
                await self._trickle(writer, chunk)
                if is_back:
                    self.bytes_back += len(chunk)
                else:
                    self.bytes_there += len(chunk)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(arrive())
            due_at, chunk = 0.0, b"-"
            while chunk:
                chunk = await reader.read(CHUNK_SIZE_MAX)
                latency = 0.0 if is_back else self._latency()
                due_at = max(due_at, time.monotonic() + latency)  # none overtakes another
                await on_the_way.put((due_at, chunk))

    def _latency(self) -> float:
        weather = self._weather
        return max(0.0, weather.latency_seconds + weather.jitter_seconds * self._chance.uniform(-1, 1))

    async def _fair_enough(self) -> None:
        """Wait until something passes."""
        while self._weather.is_silent:
            await self._changed.wait()

    async def _trickle(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        while chunk:
            rate = self._weather.bytes_per_second
            size = len(chunk) if rate is None else max(1, round(rate * TRICKLE_SECONDS))
            writer.write(chunk[:size])
            await writer.drain()
            chunk = chunk[size:]
            if rate is not None:
                await asyncio.sleep(max(TRICKLE_SECONDS, 1 / rate))
                await self._fair_enough()


@asynccontextmanager
async def proxied(target_port: int, *, seed: int = 0) -> AsyncIterator[Proxy]:
    """Run a proxy to a port of this machine while the block runs."""
    proxy = Proxy(target_port, seed=seed)
    await proxy.accept()
    try:
        yield proxy
    finally:
        await proxy.close()
