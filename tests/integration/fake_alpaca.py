"""A small server that speaks Alpaca's two latest-trade calls by hand, and breaks them on request.

What it answers is text typed in the tests, so that it can be anything that bytes can be.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

Fault = Callable[[asyncio.StreamWriter], Awaitable[None]]

STOCKS = "/v2/stocks/trades/latest"
CRYPTO = "/v1beta3/crypto/us/latest/trades"


@dataclass(frozen=True)
class Asked:
    """One request: where, for what, when (seconds of the monotonic clock), with which headers."""

    path: str
    symbols: tuple[str, ...]
    feed: str | None
    at: float
    headers: dict[str, str]


def trade(price: str, at: str = "2026-03-02T15:00:00.123456789Z") -> str:
    """Return a trade as Alpaca writes it; `price` goes in as it is."""
    return f'{{"c":["@"],"i":1,"p":{price},"s":100,"t":"{at}","x":"V","z":"C"}}'


@dataclass
class FakeAlpaca:
    """`trades` maps a symbol to its JSON text. `fault` answers instead, when it is set."""

    trades: dict[str, str] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)
    names_the_invalid: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    fault: Fault | None = None
    faults_by_path: dict[str, Fault] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    url: str = ""
    serving: set["asyncio.Task[None]"] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task
        self.serving.add(task)
        try:
            while request := await self._request(reader):
                if request.path not in (STOCKS, CRYPTO):  # the calendar, say
                    writer.write(response("404 Not Found", "{}"))
                    break
                self.asked.append(request)
                fault = self.faults_by_path.get(request.path, self.fault)
                if fault:
                    await fault(writer)
                    break
                status, body = self._answer(request)
                writer.write(response(status, body, self.headers))
                await writer.drain()
        except ConnectionError:
            pass  # the client gave up, which is what some tests are about
        finally:
            self.serving.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> Asked | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        url = urlsplit(head[0].split()[1])
        query = parse_qs(url.query)
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        symbols = tuple(query.get("symbols", [""])[0].split(","))
        return Asked(url.path, symbols, query.get("feed", [None])[0], time.monotonic(), headers)

    def _answer(self, asked: Asked) -> tuple[str, str]:
        bad = [symbol for symbol in asked.symbols if symbol in self.invalid]
        if bad and self.names_the_invalid:
            return "400 Bad Request", f'{{"message":"invalid symbol: {bad[0]}"}}'
        if bad:
            return "400 Bad Request", "<html><title>400 Bad Request</title></html>"
        found = [f'"{symbol}":{self.trades[symbol]}' for symbol in asked.symbols if symbol in self.trades]
        return "200 OK", f'{{"trades":{{{",".join(found)}}}}}'

    @property
    def symbols_asked(self) -> set[str]:
        return {symbol for asked in self.asked for symbol in asked.symbols}


@asynccontextmanager
async def running_fake() -> AsyncIterator[FakeAlpaca]:
    fake = FakeAlpaca()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
        for task in list(fake.serving):
            task.cancel()
            await asyncio.wait({task})


def response(status: str, body: str, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


# ---- faults --------------------------------------------------------------------------------------


def answers(status: str, body: str, **headers: str) -> Fault:
    """Answer with this; `Retry_After="3"` becomes the header `Retry-After: 3`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return sends(response(status, body, named))


def sends(raw: bytes) -> Fault:
    """Send these bytes and close."""

    async def fault(writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        await writer.drain()

    return fault


async def hangs(_: asyncio.StreamWriter) -> None:
    """Accept the request and say nothing."""
    await asyncio.Event().wait()


async def resets(writer: asyncio.StreamWriter) -> None:
    """Cut the connection in the middle of the headers, hard."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-")
    await writer.drain()
    writer.transport.abort()


def drips(raw: bytes, rest: bytes = b" ") -> Fault:
    """Send `raw` at once and then one byte ten times a second, for ever."""

    async def fault(writer: asyncio.StreamWriter) -> None:
        writer.write(raw)
        while True:
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.write(rest)

    return fault
