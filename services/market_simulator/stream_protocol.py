"""Alpaca's real-time streams over WebSocket: the handshake, and the conversation with one client."""

import asyncio
import time
from functools import partial

from aiohttp import WSMsgType, web

from services.market_simulator.access import key_of
from services.market_simulator.answers import error
from services.market_simulator.questions import CRYPTO, DELAY_NS, FEEDS, LOCATIONS, STOCKS
from services.market_simulator.simulator import Simulator
from services.market_simulator.stream import Endpoint, Stream, thawed
from services.market_simulator.stream_faults import RefuseHandshake
from services.market_simulator.stream_messages import success
from services.market_simulator.streams import STREAMS_MAX

_SAID_BYTES_MAX = 1024 * 1024
_CLOSE_SECONDS = 1.0
_MSGPACK = "application/msgpack"


def routes(simulator: Simulator) -> list[web.RouteDef]:
    """Return the routes of the streams: stocks by feed, crypto by location."""
    feeds = "|".join(sorted({*FEEDS, "test"}))
    return [
        web.get(f"/v2/{{feed:{feeds}}}", partial(_stream, simulator)),
        web.get("/v1beta1/{feed:boats|overnight}", partial(_stream, simulator)),
        web.get(f"/v1beta3/crypto/{{loc:{'|'.join(sorted(LOCATIONS))}}}", partial(_stream, simulator)),
    ]


def _endpoint(simulator: Simulator, request: web.Request) -> Endpoint:
    feed = request.match_info.get("feed", "")
    return Endpoint(
        path=request.path,
        venue=STOCKS if feed else CRYPTO,
        feed=feed,
        symbols_max=simulator.stream_symbols_max if feed == "iex" else None,
        delay_ns=DELAY_NS if feed == "delayed_sip" else 0,
    )


async def _stream(simulator: Simulator, request: web.Request) -> web.StreamResponse:
    streams = simulator.streams
    streams.attempts.append((request.path, time.time_ns()))
    await thawed(streams.faults, request.path)
    if refusal := streams.faults.take(RefuseHandshake, request.path, time.monotonic()):
        return error(refusal.status, "the handshake is refused")
    if len(streams.open) >= STREAMS_MAX:
        return error(503, f"{STREAMS_MAX} streams are open")
    socket = web.WebSocketResponse(
        autoping=False,  # a stream that is frozen answers no ping
        autoclose=False,
        timeout=_CLOSE_SECONDS,
        max_msg_size=_SAID_BYTES_MAX,
    )
    await socket.prepare(request)
    assert request.transport is not None
    stream = Stream(
        endpoint=_endpoint(simulator, request),
        form="msgpack" if request.headers.get("Content-Type", "").startswith(_MSGPACK) else "json",
        socket=socket,
        transport=request.transport,
        faults=streams.faults,
        queued_bytes_max=streams.queued_bytes_max,
        client=request.headers.get("User-Agent", "")[:100],
    )
    streams.enter(stream)
    try:
        stream.say(success("connected"))
        if key_of(request.headers) is not None:
            streams.authenticate(stream, request.headers)
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(stream.write())
            await _converse(simulator, stream)
            if stream.ending:
                await writing
            else:
                writing.cancel()
                await socket.close()
    finally:
        streams.leave(stream)
    return socket


async def _converse(simulator: Simulator, stream: Stream) -> None:
    """Answer a client until one side closes; who does not authenticate in time is sent away."""
    ends_s = time.monotonic() + simulator.streams.auth_seconds
    while True:
        wait_s = None if stream.account is not None or stream.ending else ends_s - time.monotonic()
        try:
            heard = await stream.socket.receive(timeout=wait_s if wait_s is None else max(wait_s, 0.001))
        except TimeoutError:
            stream.refuse(404)
            continue
        await stream.thawed()
        match heard.type:
            case WSMsgType.PING:
                await stream.pong(heard.data)
            case WSMsgType.PONG:
                pass
            case WSMsgType.TEXT | WSMsgType.BINARY:
                if not stream.ending:
                    simulator.streams.hear(stream, heard.data, binary=heard.type is WSMsgType.BINARY)
            case _:
                return
