"""HTTP connections: the library's server with our edge around every request, also around malformed ones."""

import asyncio
import resource
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_parser import RawRequestMessage
from prometheus_client import Gauge

from services.api_gateway.edge import Edge, Handler
from services.api_gateway.episodes import Episode
from services.api_gateway.refusals import refused
from shared import logs

KEEPALIVE_SECONDS = 15.0
"""How long a connection may be idle, and how long the headers of a request may take to arrive."""
LINGER_SECONDS = 0.5
"""How long an unwanted body is read and thrown away, so that its sender gets to see the answer."""
WRITE_SECONDS_MAX = 10.0
"""How long a client may take to read its answer."""
LAST_ANSWER_SECONDS = 0.5
"""At the end, of the time in which requests are finished, the part for sending 503 to those that are not."""
BACKLOG = 1024
FILES_FOR_OTHERS = 256
"""Open files that are not connections of clients: to the database, to the bus, the health port, modules."""

_VERSIONS = (HttpVersion11, HttpVersion10)
"""The parser lets 0.9 and 2.0 pass as well, in which the library would answer; they get an answer of 1.0."""

log = logs.get_logger()
connections_open = Gauge("gateway_connections_open", "Connections of clients, streams among them")


class Connections:
    """The connections that there are; one too many is closed unread."""

    def __init__(self, connections_max: int) -> None:
        self._connections_max = min(connections_max, _open_files_max() - FILES_FOR_OTHERS)
        self.open = 0
        self.episode = Episode(
            "connections_refused",
            "connections_refused_no_more",
            says="too many connections, new ones closed",
            advice="raise GATEWAY_CONNECTIONS_MAX and the limit of open files, or start another gateway",
        )
        connections_open.set_function(lambda: self.open)

    def has_room(self) -> bool:
        """Tell whether one more may stay; counts one that may not."""
        if self.open < self._connections_max:
            return True
        refused("connections")
        self.episode.refuse(connections_max=self._connections_max)
        return False

    async def check(self) -> str | None:
        """Say for readiness whether connections are refused; those that there are, are served."""
        return self.episode.note()


def _open_files_max() -> int:
    """Let this process have as many open files as the system allows it, and return how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


class _Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_connections", "_edge", "_is_refused", "_patience")

    def __init__(self, manager: web.Server, edge: Edge, connections: Connections, **options: Any) -> None:
        super().__init__(manager, **options)
        self._edge = edge
        self._connections = connections
        self._is_refused = False
        self._patience: asyncio.TimerHandle | None = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a malformed request; the library would answer in plain text and log a traceback."""
        return self._edge.malformed(exc)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._connections.has_room():
            self._is_refused = True
            cast(asyncio.Transport, transport).abort()
            return
        self._connections.open += 1
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.set_write_buffer_limits(high=0)  # what the client has not taken pauses the writing

    def pause_writing(self) -> None:
        """Cut the client off unless it takes its answer in time."""
        super().pause_writing()
        if self._patience is None and self.transport is not None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(WRITE_SECONDS_MAX, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._lose_patience_no_more()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._is_refused:
            return
        self._connections.open -= 1
        super().connection_lost(exc)
        self._lose_patience_no_more()

    def _lose_patience_no_more(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Say in one line what broke a connection after its answer, such as a body that ends too early."""
        error = kw.get("exc_info")
        log.info("connection_broken", error=type(error).__name__)


class _Server(web.Server):
    def __init__(self, edge: Edge, connections: Connections, **options: Any) -> None:
        super().__init__(edge.serve, **options)  # type: ignore[arg-type]  # the factory makes web.Request
        self._edge = edge
        self._connections_open = connections

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self._edge, self._connections_open, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    def __init__(
        self,
        app: web.Application,
        edge_around: Callable[[Handler], Edge],
        connections: Connections,
        finish_seconds_max: float,
    ) -> None:
        super().__init__(
            app,
            access_log=None,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=LINGER_SECONDS,
            shutdown_timeout=finish_seconds_max / 2,  # the library waits for a request twice as long
        )
        self._edge_around = edge_around
        self._connections = connections
        self._finish_seconds_max = finish_seconds_max
        self._edge: Edge | None = None

    async def shutdown(self) -> None:
        assert self._edge is not None
        self._edge.close(self._finish_seconds_max - LAST_ANSWER_SECONDS)
        await super().shutdown()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        self._edge = edge = self._edge_around(server.request_handler)
        make_request = server.request_factory

        def request(message: RawRequestMessage, *others: Any) -> web.BaseRequest:
            if message.version not in _VERSIONS:
                message = message._replace(version=HttpVersion10, should_close=True)
            return make_request(message, *others)

        return _Server(edge, self._connections, request_factory=request, **self._kwargs)


@asynccontextmanager
async def serving(
    app: web.Application,
    host: str,
    port: int,
    edge_around: Callable[[Handler], Edge],
    connections: Connections,
    *,
    finish_seconds_max: float,
) -> AsyncIterator[int]:
    """Serve the application while the block runs, and yield its port. Raises OSError when the port is taken.

    At the end no new request is accepted, and those under way are finished, with 503 if need be, in
    `finish_seconds_max`.
    """
    runner = _Runner(app, edge_around, connections, finish_seconds_max)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            raise OSError(error.errno, f"GATEWAY_PORT {port} cannot be used: {error.strerror}") from error
        log.info("listening", host=host, port=site.port)
        yield site.port
    finally:
        await runner.cleanup()
