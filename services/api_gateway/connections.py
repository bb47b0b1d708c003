"""HTTP connections: the library's server with our edge around every request, also around malformed ones."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_parser import RawRequestMessage

from services.api_gateway.edge import Edge, Handler
from shared import logs

KEEPALIVE_SECONDS = 15.0
"""How long a connection may be idle, and how long the headers of a request may take to arrive."""
LINGER_SECONDS = 0.5
"""How long an unwanted body is read and thrown away, so that its sender gets to see the answer."""
WRITE_SECONDS_MAX = 10.0
"""How long a client may take to read its answer."""
SHUTDOWN_SECONDS_MAX = 8.0
BACKLOG = 1024

_VERSIONS = (HttpVersion11, HttpVersion10)
"""The parser lets 0.9 and 2.0 pass as well, in which the library would answer; they get an answer of 1.0."""

log = logs.get_logger()


class _Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("_edge", "_patience")

    def __init__(self, manager: web.Server, edge: Edge, **options: Any) -> None:
        super().__init__(manager, **options)
        self._edge = edge
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
    def __init__(self, edge: Edge, **options: Any) -> None:
        super().__init__(edge.serve, **options)  # type: ignore[arg-type]  # the factory makes web.Request
        self._edge = edge

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self._edge, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    def __init__(self, app: web.Application, edge_around: Callable[[Handler], Edge]) -> None:
        super().__init__(
            app,
            access_log=None,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=LINGER_SECONDS,
            shutdown_timeout=SHUTDOWN_SECONDS_MAX,
        )
        self._edge_around = edge_around

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        edge = self._edge_around(server.request_handler)
        make_request = server.request_factory

        def request(message: RawRequestMessage, *others: Any) -> web.BaseRequest:
            if message.version not in _VERSIONS:
                message = message._replace(version=HttpVersion10, should_close=True)
            return make_request(message, *others)

        return _Server(edge, request_factory=request, **self._kwargs)


@asynccontextmanager
async def serving(
    app: web.Application, host: str, port: int, edge_around: Callable[[Handler], Edge]
) -> AsyncIterator[int]:
    """Serve the application while the block runs, and yield its port. Raises OSError when the port is taken.

    At the end no new request is accepted, those under way are finished.
    """
    runner = _Runner(app, edge_around)
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
