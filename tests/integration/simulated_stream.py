"""Clients of a simulated market's streams: a plain WebSocket in either format, and alpaca-py's own classes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has no types of its own
import orjson
from aiohttp import ClientWebSocketResponse, WSMsgType
from alpaca.data.live import CryptoDataStream, StockDataStream

from tests.integration.simulated_market import KEYS, SimulatedMarket

SECONDS_MAX = 10.0
CONNECTED = [{"T": "success", "msg": "connected"}]
AUTHENTICATED = [{"T": "success", "msg": "authenticated"}]


@dataclass
class RawStream:
    socket: ClientWebSocketResponse
    packed: bool

    async def say(self, **message: object) -> None:
        if self.packed:
            await self.socket.send_bytes(msgpack.packb(message))
        else:
            await self.socket.send_str(orjson.dumps(message).decode())

    async def frame(self) -> list[Any]:
        """Return the messages of the next frame, which must be of the format that was asked for."""
        heard = await self.socket.receive(timeout=SECONDS_MAX)
        assert heard.type is (WSMsgType.BINARY if self.packed else WSMsgType.TEXT), heard
        messages = msgpack.unpackb(heard.data) if self.packed else orjson.loads(heard.data)
        assert isinstance(messages, list)
        return messages

    async def messages(self, count: int) -> list[Any]:
        """Return that many messages, of as many frames as it takes."""
        found: list[Any] = []
        while len(found) < count:
            found += await self.frame()
        return found

    async def subscribe(self, **channels: list[str]) -> dict[str, Any]:
        """Subscribe and return the acknowledgement."""
        await self.say(action="subscribe", **channels)
        (message,) = await self.frame()
        assert isinstance(message, dict)
        return message

    async def closed(self) -> int | None:
        """Wait for the end and return its code; nothing else may come before."""
        heard = await self.socket.receive(timeout=SECONDS_MAX)
        assert heard.type in {WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR}, heard
        return self.socket.close_code


@asynccontextmanager
async def raw_stream(
    market: SimulatedMarket,
    path: str = "/v2/iex",
    *,
    packed: bool = False,
    key: str | None = "key",
    **options: Any,
) -> AsyncIterator[RawStream]:
    """Connect, with the keys in the handshake's headers (`key=None`: without), past the greetings."""
    headers = {"Content-Type": "application/msgpack"} if packed else {}
    if key is not None:
        headers |= KEYS | {"APCA-API-KEY-ID": key}
    async with market.http.ws_connect(market.url + path, headers=headers, **options) as socket:
        stream = RawStream(socket, packed)
        assert await stream.frame() == CONNECTED
        yield stream


@asynccontextmanager
async def authenticated(
    market: SimulatedMarket, path: str = "/v2/iex", *, packed: bool = False, key: str = "key", **options: Any
) -> AsyncIterator[RawStream]:
    async with raw_stream(market, path, packed=packed, key=key, **options) as stream:
        assert await stream.frame() == AUTHENTICATED
        yield stream


@dataclass
class Heard:
    """What alpaca-py has handed to its handlers."""

    stream: Any
    messages: list[Any] = field(default_factory=list)

    async def handler(self, message: Any) -> None:
        self.messages.append(message)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.messages if isinstance(message, kind)]


@asynccontextmanager
async def alpaca_stream(
    market: SimulatedMarket, kind: type[StockDataStream] | type[CryptoDataStream], path: str, **options: Any
) -> AsyncIterator[Heard]:
    """Give one of alpaca-py's streams; `run` it when it is subscribed."""
    heard = Heard(kind("key", "secret", url_override=market.url.replace("http", "ws") + path, **options))
    yield heard


@asynccontextmanager
async def running(heard: Heard) -> AsyncIterator[None]:
    """Run a stream of alpaca-py as its `run` does, in this loop."""
    task = asyncio.create_task(heard.stream._run_forever())
    try:
        yield
    finally:
        await heard.stream.stop_ws()
        if heard.stream._ws is not None:
            await heard.stream._ws.close()  # it listens for five seconds before it looks at the order to stop
        await asyncio.wait_for(task, SECONDS_MAX)
