"""A market whose streams send the frames that a test hands them, and whose REST side knows no trades."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgpack  # type: ignore[import-untyped]
from aiohttp import WSMsgType, web


@dataclass
class SpoiltMarket:
    url: str = ""
    sockets: dict[str, web.WebSocketResponse] = field(default_factory=dict)
    """The streams that have a subscription, by their path."""
    connections: int = 0

    async def send(self, path: str, frame: bytes | str) -> None:
        """Send a frame to whoever is subscribed; it may have gone."""
        socket = self.sockets.get(path)
        if socket is not None:
            with suppress(ConnectionError):
                await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))

    async def stream(self, request: web.Request) -> web.WebSocketResponse:
        self.connections += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(msgpack.packb([{"T": "success", "msg": "connected"}]))
        subscribed: set[str] = set()
        try:
            async for message in socket:
                if message.type is not WSMsgType.BINARY:
                    break
                await self.answer(socket, msgpack.unpackb(message.data), subscribed)
                if subscribed:
                    self.sockets[request.path] = socket
        finally:
            if self.sockets.get(request.path) is socket:
                del self.sockets[request.path]
        return socket

    async def answer(
        self, socket: web.WebSocketResponse, asked: dict[str, Any], subscribed: set[str]
    ) -> None:
        if asked["action"] == "auth":
            reply: dict[str, object] = {"T": "success", "msg": "authenticated"}
        else:
            change = subscribed.update if asked["action"] == "subscribe" else subscribed.difference_update
            change(asked.get("trades", []))
            reply = {"T": "subscription", "trades": sorted(subscribed)}
        await socket.send_bytes(msgpack.packb([reply]))


@asynccontextmanager
async def spoilt_market() -> AsyncIterator[SpoiltMarket]:
    market = SpoiltMarket()
    app = web.Application()
    app.router.add_get("/v2/iex", market.stream)
    app.router.add_get("/v1beta3/crypto/us", market.stream)

    async def no_trades(_: web.Request) -> web.Response:
        await asyncio.sleep(0)
        return web.json_response({"trades": {}})

    app.router.add_get("/{rest:.*}", no_trades)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        market.url = f"http://127.0.0.1:{site.port}"
        yield market
    finally:
        await runner.cleanup()
