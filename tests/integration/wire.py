"""A wire between a service and a server: cut, connected, or frozen, as the test wants it."""

import asyncio
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from local.settings import free_port


class Wire:
    """Listens on a port of its own for a server, once `connect` is called. Use as an async context manager.

    Before that, and after `cut`, connections are refused, as if the server was away. `freeze` lets nothing through in
    either direction and says nothing to those who connect, as if the server stood still.
    """

    def __init__(self, url: str) -> None:
        """Take the URL of the server; `url` is then what to give to the service."""
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._server_at = parts.hostname, parts.port
        self._port = free_port()
        user, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self._port}"))
        self.connections = 0
        """How many were ever made."""
        self._listening: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def connect(self) -> None:
        self._listening = await asyncio.start_server(self._carry, "127.0.0.1", self._port)

    async def cut(self) -> None:
        if self._listening:
            self._listening.close()
            self._listening = None
        for task in tuple(self._carrying):
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._carrying.add(task)
        self.connections += 1
        writers = [writer]
        with suppress(OSError, asyncio.CancelledError):
            try:
                await self._flows.wait()
                there, back = await asyncio.open_connection(*self._server_at)
                writers.append(back)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._flow(reader, back))
                    tasks.create_task(self._flow(there, writer))
            finally:
                self._carrying.discard(task)
                for each in writers:
                    each.transport.abort()

    async def _flow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
