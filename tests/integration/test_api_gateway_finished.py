"""Finished answers: on the wire they are what the library would send, to the byte."""

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial

import pytest
from aiohttp import web

from services.api_gateway import connections
from services.api_gateway.edge import Edge
from services.api_gateway.finished import Finished, Kind
from services.api_gateway.leaving import Leaving
from services.api_gateway.negotiation import Representation, Stem
from tests.waiting import eventually

APP = "https://app.example.com"
OWN = Kind(
    200, {"Content-Type": "application/json", "Vary": "Accept-Encoding, Authorization", "X-Share": "100 %s %"}
)
UNMARKED = Kind(200, {"Content-Type": "application/json"})
CHART = Representation(Stem(b"[" + b"1," * 1000), b"1]", cache_control="private, no-cache")
LARGE = b"x" * 20_000_000  # more than the kernel takes from the one and keeps for the other


@dataclass
class Server:
    port: int
    handled: list[str] = field(default_factory=list)
    in_full: int = 0
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)


class Watched(Finished):
    """Counts how often the library's way is taken."""

    server: Server

    def in_full(self) -> web.Response:
        self.server.in_full += 1
        return super().in_full()


def finished(request: web.Request) -> Finished:
    match request.match_info["name"]:
        case "chart":
            return CHART.response(request.headers)
        case "own":
            return Finished(OWN, b"{}", '"1"')
        case "large":
            return Finished(UNMARKED, LARGE)
        case _:
            return Finished(UNMARKED, '{"name":"é"}'.encode())


@pytest.fixture(params=[(), (APP,)], ids=["no origins", "an origin"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """Serve every answer twice: as it is, and in full by the library."""
    started = Server(0)

    async def as_it_is(request: web.Request) -> Finished:
        started.handled.append(request.path)
        if request.query_string == "wait":
            await started.may_answer.wait()
        answer = finished(request)
        watched = Watched(answer.kind, answer.body, answer.entity_tag)
        watched.server = started
        return watched

    async def by_the_library(request: web.Request) -> web.Response:
        return finished(request).in_full()

    app = web.Application()
    app.add_routes([web.get("/a/{name}", as_it_is), web.get("/b/{name}", by_the_library)])
    edge_around = partial(
        Edge,
        routes=frozenset(),
        timeout_seconds=10,
        allowed_origins=frozenset(request.param),
        leaving=Leaving(),
    )
    async with connections.serving(
        app, "127.0.0.1", 0, edge_around, connections.Connections(100), finish_seconds_max=4
    ) as started.port:
        yield started


def asking(name: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = [f"{method} {name} HTTP/{version}", "Host: a", "X-Request-Id: mine", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def sent(server: Server, *requests: bytes, stays: bool = True) -> bytes:
    """Send the requests at once, and one that closes a connection that stays; return what comes, without the dates."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(b"".join(requests) + (asking("/nothing", "Connection: close") if stays else b""))
        async with asyncio.timeout(20):
            everything = await reader.read()
    finally:
        writer.close()
    dated = rb"\r\nDate: (Mon|Tue|Wed|Thu|Fri|Sat|Sun), [0-9]{2} [A-Z][a-z]{2} [0-9]{4} ([0-9]{2}:){2}[0-9]{2} GMT\r\n"
    return re.sub(dated, b"\r\nDate: now\r\n", everything)


@pytest.mark.parametrize("name", ["chart", "own", "unmarked"])
@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Accept-Encoding: gzip",),
        (f"If-None-Match: {CHART.entity_tag}",),
        ("Accept-Encoding: gzip", f"If-None-Match: {CHART.entity_tag_gzip}"),
        (f"Origin: {APP}",),
        ("Origin: https://evil.example",),
        (f"Origin: {APP}", f"If-None-Match: {CHART.entity_tag}"),
    ],
)
async def test_usual_request_gets_what_the_library_would_send(
    server: Server, name: str, headers: tuple[str, ...]
) -> None:
    ours = await sent(server, asking(f"/a/{name}", *headers))
    assert server.in_full == 0
    assert ours == await sent(server, asking(f"/b/{name}", *headers))
    assert ours.count(b"HTTP/1.1 ") == 2  # this answer, and that of the request that closes
    assert ours.count(b"\r\nDate: now\r\n") == 2


@pytest.mark.parametrize("name", ["chart", "own"])
@pytest.mark.parametrize(
    ("method", "version", "headers", "stays"),
    [
        ("HEAD", "1.1", (), True),
        ("HEAD", "1.1", ("Connection: close",), False),
        ("GET", "1.1", ("Connection: close",), False),
        ("GET", "1.1", ("Connection: close", f"If-None-Match: {CHART.entity_tag}"), False),
        ("GET", "1.0", (), False),
        ("GET", "1.0", ("Connection: keep-alive",), True),
        ("GET", "1.0", ("Connection: keep-alive", f"Origin: {APP}"), True),
    ],
)
async def test_unusual_request_is_left_to_the_library(
    *, server: Server, name: str, method: str, version: str, headers: tuple[str, ...], stays: bool
) -> None:
    ours = await sent(server, asking(f"/a/{name}", *headers, method=method, version=version), stays=stays)
    assert server.in_full == 1
    theirs = await sent(server, asking(f"/b/{name}", *headers, method=method, version=version), stays=stays)
    assert ours == theirs
    assert ours.startswith(f"HTTP/{version} ".encode())


async def test_expected_continuation_comes_before_the_answer(server: Server) -> None:
    asked = "Expect: 100-continue", "Content-Length: 0"
    ours = await sent(server, asking("/a/own", *asked))
    assert ours.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert ours == await sent(server, asking("/b/own", *asked))


async def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    names = ["chart", "own", "unmarked", "chart"] * 3
    ours = await sent(server, *(asking(f"/a/{name}") for name in names))
    assert ours == await sent(server, *(asking(f"/b/{name}") for name in names))
    assert ours.count(b"HTTP/1.1 200 OK") == len(names)


async def test_next_request_waits_until_a_slow_client_has_taken_its_answer(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(asking("/a/large") + asking("/a/own"))
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"\r\nContent-Length: 20000000\r\n" in head
        assert await reader.readexactly(1_000_000) == LARGE[:1_000_000]
        assert server.handled == ["/a/large"]
        assert await reader.readexactly(19_000_000) == LARGE[1_000_000:]
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
    assert server.handled == ["/a/large", "/a/own"]
    writer.close()


async def test_client_that_left_before_its_answer_is_no_error(
    server: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as gone:
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
        gone.connect(("127.0.0.1", server.port))
        gone.sendall(asking("/a/own?wait"))

        async def is_handled() -> bool:
            return server.handled == ["/a/own"]

        await eventually(is_handled)
    ours = await sent(server, asking("/a/own"))  # the reset has arrived by now
    server.may_answer.set()
    assert ours == await sent(server, asking("/b/own"))
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]
    assert "Traceback" not in capsys.readouterr().err


async def test_headers_cannot_be_added_to_what_is_finished() -> None:
    with pytest.raises(TypeError):
        Finished(OWN, b"{}").headers["X-Late"] = "1"  # type: ignore[index]
