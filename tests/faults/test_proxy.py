"""The proxy does what it says, to connections that are open and to new ones."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.faults.proxy import FAIR, Proxy, Weather, proxied
from tests.waiting import eventually

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    """The port of a server that sends back what it gets."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(1000):
                writer.write(chunk)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def proxy(echo_port: int) -> AsyncIterator[Proxy]:
    async with proxied(echo_port) as running:
        yield running


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def said(streams: Streams, message: bytes = b"hello", seconds_max: float = 10) -> float:
    """Send a message and wait for its echo; return how many seconds that took."""
    reader, writer = streams
    began = time.monotonic()
    writer.write(message)
    async with asyncio.timeout(seconds_max):
        assert await reader.readexactly(len(message)) == message
    return time.monotonic() - began


async def test_bytes_pass_unchanged_both_ways_and_are_counted(proxy: Proxy) -> None:
    message = bytes(range(256)) * 2_000
    async with connected(proxy) as streams:
        await said(streams, message)
        assert (proxy.connections, proxy.open_connections) == (1, 1)
        assert (proxy.bytes_there, proxy.bytes_back) == (len(message), len(message))


async def test_end_of_one_direction_passes_and_a_closed_connection_is_forgotten(proxy: Proxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"bye")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 10) == b"bye"

        async def is_forgotten() -> bool:
            return proxy.open_connections == 0

        await eventually(is_forgotten)


async def test_latency_is_added_to_the_round_trip_and_keeps_the_order(proxy: Proxy) -> None:
    async with connected(proxy) as streams:
        proxy.weather = Weather(latency_seconds=0.2, jitter_seconds=0.1)
        reader, writer = streams
        began = time.monotonic()
        numbers = b""
        for number in range(10):
            message = b"%d;" % number
            numbers += message
            writer.write(message)
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(reader.readexactly(len(numbers)), 10) == numbers
        # The first is 0.1 s late at least; ten that waited for each other would be one second late.
        assert 0.1 <= time.monotonic() - began < 1.0
        proxy.weather = FAIR
        assert await said(streams) < 0.1


async def test_reset_is_an_error_at_the_client_and_leaves_nothing(proxy: Proxy) -> None:
    async with connected(proxy) as streams, connected(proxy) as other:
        await said(streams)
        await said(other)
        assert proxy.reset() == 2
        for reader, _ in (streams, other):
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 10)
        assert proxy.resets == 2
    async with connected(proxy) as again:
        await said(again)


async def test_black_hole_keeps_open_and_new_connections_silent_and_lets_all_pass_afterwards(
    proxy: Proxy,
) -> None:
    async with connected(proxy) as old:
        await said(old)
        proxy.weather = Weather(is_silent=True)
        async with connected(proxy) as new:
            asking = [asyncio.create_task(said(each)) for each in (old, new)]
            done, _ = await asyncio.wait(asking, timeout=0.3)
            assert not done
            proxy.weather = FAIR
            assert all(seconds >= 0.3 for seconds in await asyncio.gather(*asking))


async def test_trickle_is_as_slow_as_it_is_told_to_be(proxy: Proxy) -> None:
    async with connected(proxy) as streams:
        proxy.weather = Weather(bytes_per_second=1_000)
        # 200 bytes at 1,000 a second, each way, of which the ways overlap.
        assert 0.15 <= await said(streams, b"x" * 200) < 2
        proxy.weather = FAIR
        assert await said(streams, b"x" * 200) < 0.1


async def test_refusal_is_at_once_and_spares_what_is_open(proxy: Proxy) -> None:
    async with connected(proxy) as streams:
        await said(streams)
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            async with connected(proxy):
                pass
        await said(streams)
        await proxy.accept()
        async with connected(proxy) as again:
            await said(again)


async def test_target_that_is_gone_resets_the_connection() -> None:
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
        free = server.sockets[0].getsockname()[1]
    async with proxied(free) as proxy, connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 10)
