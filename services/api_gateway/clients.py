"""Those who watch a portfolio: by Server-Sent Events, or by the same over WebSocket.

A client has no queue. It has seen a version of its portfolio, and when it is its turn it gets what has changed since;
who reads slowly gets fewer events, each of them true when it is sent.
"""

import asyncio
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import cast

from aiohttp import HttpVersion11, WSCloseCode, WSMsgType, web
from aiohttp.abc import AbstractStreamWriter
from prometheus_client import Counter as EventCounter
from prometheus_client import Gauge

from services.api_gateway import problems
from services.api_gateway.episodes import Episode
from services.api_gateway.live import EndReason, Live, Watched
from services.api_gateway.pace import SPACING_SECONDS, Pace
from services.api_gateway.problems import Problem
from services.api_gateway.refusals import refused
from shared import logs

STREAMS_PER_USER_MAX = 20
RETRY_MS = 2000
"""After which time an EventSource connects again."""
SEND_BUFFER_BYTES = 64 * 1024
"""What the system holds for a client that does not read: events that will be old when they arrive."""
UNACKNOWLEDGED_MS_MAX = 20_000
"""A client that has vanished without a word is given up after this time."""
WEBSOCKET_MESSAGE_BYTES_MAX = 1024
CLOSE_SECONDS_MAX = 2.0

_EVENT_ID = re.compile(r"([0-9a-f]{12})\.([0-9]{1,15})")
_CLOSE_CODES: dict[EndReason, int] = {
    "token_expired": 4401,
    "user_deactivated": 4403,
    "user_unknown": 4404,
    "going_away": WSCloseCode.GOING_AWAY,
}
_SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}

log = logs.get_logger()
streams_open = Gauge("gateway_streams_open", "Portfolio streams, by transport", ["transport"])
events_sent = EventCounter("gateway_stream_events", "Events sent", ["event"])
events_held_back = EventCounter(
    "gateway_stream_held_back", "Events that waited because a client did not read"
)
_sent = {event: events_sent.labels(event) for event in ("portfolio", "change", "heartbeat", "end")}

Framing = Callable[[str, str, str], bytes]
"""Makes the bytes of an event from its name, its id (empty: none) and the JSON of its data."""


class Places:
    """The streams that there are, and those that are about to be opened."""

    def __init__(self, places_max: int) -> None:
        self._places_max = places_max
        self._taken: Counter[str] = Counter()
        self.episode = Episode(
            "streams_refused",
            "streams_refused_no_more",
            says="too many streams, new ones refused",
            advice="start another gateway, or raise GATEWAY_STREAMS_MAX where there is memory",
        )

    async def check_readiness(self) -> str | None:
        """Say for readiness whether streams are refused; those that are open are served."""
        return self.episode.note()

    def check(self) -> None:
        """Raise Problem when all places are taken."""
        if self._taken.total() >= self._places_max:
            refused("streams")
            self.episode.refuse(streams_max=self._places_max)
            raise Problem(problems.OVERLOADED, "There are too many streams. Try again soon.")

    def take(self, subject: str) -> None:
        """Take one for a user, to be freed; raises Problem when none is left."""
        self.check()
        if self._taken[subject] >= STREAMS_PER_USER_MAX:
            raise Problem(
                problems.TOO_MANY_STREAMS, f"A user may have {STREAMS_PER_USER_MAX} streams at once."
            )
        self._taken[subject] += 1

    def free(self, subject: str) -> None:
        self._taken[subject] -= 1
        if not self._taken[subject]:
            del self._taken[subject]


class Client:
    """One open stream. It has a place, taken by its caller, until it leaves."""

    def __init__(
        self,
        live: Live,
        watched: Watched,
        pace: Pace,
        places: Places,
        *,
        expires_at: float,
        heartbeat_seconds: float,
        last_event_id: str,
    ) -> None:
        self._live = live
        self._watched = watched
        self._places = places
        self.over: asyncio.Future[EndReason | None] = asyncio.get_running_loop().create_future()
        """Why the stream ends; None when the client has gone."""
        self.events = 0
        self.next_at = 0.0
        self._pace = pace
        self._expires_at = expires_at
        self._heartbeat_seconds = heartbeat_seconds
        self._transport: asyncio.WriteTransport | None = None
        self._framing: Framing = _sse
        self._is_due = False
        self._sent_at = 0.0
        known = _EVENT_ID.fullmatch(last_event_id)
        self._key, self._version = (known[1], int(known[2])) if known else ("", 0)

    def begin(self, transport: asyncio.WriteTransport, framing: Framing) -> None:
        """Send what the client has not seen yet; changes follow."""
        self._transport = transport
        self._framing = framing
        self._live.add(self._watched, self)
        self.next_at = asyncio.get_running_loop().time() + SPACING_SECONDS
        if not self._send_changes():
            self._send_heartbeat(self._live.now())

    def leave(self) -> None:
        """Give everything back; called once."""
        self.finish(None)
        self._live.remove(self._watched, self)
        self._places.free(self._watched.subject)

    def wake(self) -> None:
        if not self._is_due and self._transport is not None:
            self._is_due = True
            self._pace.add(self)

    def send(self) -> None:
        self._is_due = False
        if self.over.done() or self._transport is None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size():  # it has not taken the last one yet
            events_held_back.inc()
            self.wake()
            return
        self._send_changes()

    def pass_second(self, now: datetime) -> None:
        if self._transport is None:
            return
        if self._transport.is_closing():
            self.finish(None)
        elif time.time() >= self._expires_at:
            self.end("token_expired")
        elif asyncio.get_running_loop().time() >= self._sent_at + self._heartbeat_seconds:
            self._send_heartbeat(now)

    def end(self, reason: EndReason) -> None:
        if not self.over.done() and self._transport is not None and not self._transport.is_closing():
            self._write("end", "", f'{{"reason":"{reason}"}}')
        self.finish(reason)

    def finish(self, reason: EndReason | None) -> None:
        """Send nothing more."""
        if not self.over.done():
            self.over.set_result(reason)

    def _send_changes(self) -> bool:
        """Send what has changed since the client's version; tell whether there was anything."""
        portfolio = self._watched.portfolio
        assert portfolio is not None
        now = self._live.now()
        version = portfolio.settle()
        if self._key == portfolio.key and portfolio.is_known(self._version):
            if self._version == version:
                return False
            event, data = "change", portfolio.changes_since(self._version, now)
        else:
            event, data = "portfolio", portfolio.whole(now)
        self._key, self._version = portfolio.key, version
        self._write(event, f"{portfolio.key}.{version}", data)
        return True

    def _send_heartbeat(self, now: datetime) -> None:
        portfolio = self._watched.portfolio
        assert portfolio is not None
        portfolio.settle()
        self._write("heartbeat", "", portfolio.pulse(now))

    def _write(self, event: str, event_id: str, data: str) -> None:
        assert self._transport is not None
        self._transport.write(self._framing(event, event_id, data))
        self._sent_at = asyncio.get_running_loop().time()
        self.events += 1
        _sent[event].inc()


# ---- transports ----------------------------------------------------------------------------------


def _sse(event: str, event_id: str, data: str) -> bytes:
    id_line = f"id: {event_id}\n" if event_id else ""
    return f"event: {event}\n{id_line}data: {data}\n\n".encode()


def _sse_chunk(event: str, event_id: str, data: str) -> bytes:
    return _chunk(_sse(event, event_id, data))


def _chunk(body: bytes) -> bytes:
    """Frame a part of the answer, as the library does for what goes through it."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def _websocket_frame(event: str, event_id: str, data: str) -> bytes:
    """Frame an event as a text message of a server (RFC 6455): final, not masked."""
    id_member = f'"id":"{event_id}",' if event_id else ""
    body = f'{{"event":"{event}",{id_member}"data":{data}}}'.encode()
    size = len(body)
    if size < 126:
        return struct.pack("!BB", 0x81, size) + body
    if size < 65536:
        return struct.pack("!BBH", 0x81, 126, size) + body
    return struct.pack("!BBQ", 0x81, 127, size) + body


class EventStream(web.StreamResponse):
    """A stream of events as the answer to a GET. It outlasts its handler: the edge's deadline is for its beginning."""

    def __init__(self, client: Client) -> None:
        super().__init__(headers=_SSE_HEADERS)
        self._client = client
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        with _leaving_if_it_fails(self._client):
            writer = await super().prepare(request)
            transport = _tuned(request)
            framing = _sse_chunk if request.version >= HttpVersion11 else _sse
            preface = f"retry: {RETRY_MS}\n\n".encode()
            transport.write(_chunk(preface) if framing is _sse_chunk else preface)
            self._client.begin(transport, framing)
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Wait until the stream is over."""
        with _watching(self._client, "sse"):
            await asyncio.wait({self._client.over})
        await super().write_eof(data)


class SocketStream(web.WebSocketResponse):
    """The same over WebSocket. What the client says is not listened to, so it may say nothing."""

    def __init__(self, client: Client) -> None:
        super().__init__(
            max_msg_size=WEBSOCKET_MESSAGE_BYTES_MAX,
            compress=False,
            timeout=CLOSE_SECONDS_MAX,
            autoclose=False,
        )
        self._client = client

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        with _leaving_if_it_fails(self._client):
            writer = await super().prepare(request)
            self._client.begin(_tuned(request), _websocket_frame)
        return writer

    async def write_eof(self) -> None:  # type: ignore[override]  # the library's own takes nothing either
        """Wait until the stream is over, and close it; the client leaves first: nothing may follow a close frame."""
        with _watching(self._client, "websocket"):
            hearing = asyncio.create_task(self.receive())
            self._client.over.add_done_callback(lambda _: hearing.cancel())
            await asyncio.wait({hearing})
        if self.closed:
            return
        if hearing.cancelled():
            reason = self._client.over.result()
            if reason is not None:
                await self.close(code=_CLOSE_CODES[reason], message=reason.encode())
        elif hearing.result().type in (WSMsgType.TEXT, WSMsgType.BINARY):
            await self.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"this stream takes no messages")
        else:  # it wants to close, or has gone
            await self.close()


@contextmanager
def _leaving_if_it_fails(client: Client) -> Iterator[None]:
    try:
        yield
    except BaseException:
        client.leave()
        raise


@contextmanager
def _watching(client: Client, transport: str) -> Iterator[None]:
    """Count the stream while the block runs; in the end let the client leave, and say what there was."""
    began = time.monotonic()
    with streams_open.labels(transport).track_inprogress():
        try:
            yield
        finally:
            client.leave()
            log.info(
                "stream_closed",
                transport=transport,
                reason=client.over.result() or "client_left",
                events=client.events,
                seconds=round(time.monotonic() - began, 1),
            )


def _tuned(request: web.BaseRequest) -> asyncio.WriteTransport:
    """Return the connection, told to give up soon on a client that does not take what it is sent."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has gone")
    tcp: socket.socket = transport.get_extra_info("socket")
    with suppress(OSError):
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS_MAX)
    return cast(asyncio.WriteTransport, transport)
