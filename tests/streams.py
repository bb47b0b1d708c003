"""Clients of the portfolio stream for tests."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp

from shared.bus import Bus, Outgoing
from shared.database import Database
from shared.messages import PriceTick, price_subject
from tests.factories import set_price
from tests.gateway import Gateway, bearer

PATH = "/api/portfolio/stream"


@dataclass(frozen=True)
class Event:
    name: str
    id: str
    data: Any
    """Numbers are the decimals that were written."""


@dataclass
class Stream:
    """What a client has received: its events in order, and what they add up to."""

    read: Callable[[], Any]
    events: list[Event] = field(default_factory=list)
    shown: dict[str, Any] = field(default_factory=dict)

    async def next(self, *names: str) -> Event:
        """Return the next event of these names, or of any, and apply all up to it."""
        while True:
            event: Event = await self.read()
            self.events.append(event)
            if event.name == "portfolio":
                self.shown = dict(event.data)
            elif event.name == "change" and self.shown:
                changed = {position["ticker"]: position for position in event.data["positions"]}
                held = [changed.get(position["ticker"], position) for position in self.shown["positions"]]
                self.shown |= event.data | {"positions": held}
            if not names or event.name in names:
                return event

    async def until(self, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read until what is shown satisfies a condition; return it."""
        while not (self.shown and is_so(self.shown)):
            await self.next()
        return self.shown


def of_sse(response: aiohttp.ClientResponse) -> Stream:
    """Return what an answer of Server-Sent Events streams."""

    async def read() -> Event:
        fields = {"id": ""}
        while True:
            line = (await response.content.readline()).decode()
            if not line:
                raise ConnectionResetError("the stream has ended")
            if line == "\n" and "data" in fields:
                return Event(fields["event"], fields["id"], json.loads(fields["data"], parse_float=Decimal))
            name, _, value = line.rstrip("\n").partition(": ")
            if name in ("event", "id", "data"):
                fields[name] = value

    return Stream(read)


def of_websocket(socket: aiohttp.ClientWebSocketResponse) -> Stream:
    """Return what a WebSocket streams."""

    async def read() -> Event:
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ConnectionResetError(f"{message.type.name} {message.data}")
        told = json.loads(message.data, parse_float=Decimal)
        return Event(told["event"], told.get("id", ""), told["data"])

    return Stream(read)


@asynccontextmanager
async def sse(
    gateway: Gateway, subject: str | None = "demo", *, query: str = "", **headers: str
) -> AsyncIterator[Stream]:
    """Open the stream as Server-Sent Events."""
    url = f"http://127.0.0.1:{gateway.port}{PATH}{query}"
    sent = (bearer(subject) if subject else {}) | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    async with gateway.session.get(url, headers=sent) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"

        yield of_sse(response)


@asynccontextmanager
async def websocket(
    gateway: Gateway, subject: str | None = "demo", *, query: str = ""
) -> AsyncIterator[tuple[Stream, aiohttp.ClientWebSocketResponse]]:
    """Open the stream as a WebSocket."""
    url = f"http://127.0.0.1:{gateway.port}{PATH}{query}"
    async with gateway.session.ws_connect(url, headers=bearer(subject) if subject else {}) as socket:
        yield of_websocket(socket), socket


async def trade(database: Database, bus: Bus | None, symbol: str, price: str, *, feed: str = "iex") -> None:
    """Do what the feeder does with a trade: store it, then publish it."""
    await set_price(database, symbol, price, feed=feed)
    if bus is None:
        return
    row = await database.fetch_row(
        "SELECT symbol, price, traded_at, received_at, feed, sequence FROM asset_prices WHERE symbol = $1",
        symbol,
    )
    assert row is not None
    await bus.publish(Outgoing(price_subject(symbol), PriceTick(**row)))
