"""A server that answers every request with the bytes it was told to, whatever was asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Babbler:
    answer: bytes = b""
    url: str = ""
    serving: set["asyncio.Task[None]"] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self.serving.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(self.answer)
                await writer.drain()
        finally:
            self.serving.discard(task)
            writer.close()


def http(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """Return an answer; `Retry_After="3"` becomes the header `Retry-After: 3`."""
    named = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1", errors="replace") + body


@asynccontextmanager
async def babbling() -> AsyncIterator[Babbler]:
    babbler = Babbler()
    server = await asyncio.start_server(babbler.serve, "127.0.0.1", 0)
    babbler.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield babbler
    finally:
        server.close()
        for task in list(babbler.serving):
            task.cancel()
            await asyncio.wait({task})
