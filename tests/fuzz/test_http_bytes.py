"""Bytes on the gateway's port: whatever they are, it answers with a clean refusal or not at all, and stays well."""

import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from shared.bus import Bus
from shared.database import Database
from tests.factories import create_user, set_price
from tests.fuzz.strategies import INSTANTS, TEXTS, cut
from tests.fuzz.trying import nothing_unexpected_logged, try_each
from tests.gateway import Gateway, running, token
from tests.waiting import eventually

QUIET_SECONDS = 0.1
"""After so long without a byte nothing more is awaited: the gateway waits for the rest of what was sent."""
ANSWER_SECONDS_MAX = 10.0
STREAM = b"/api/portfolio/stream"
STATUSES = {100, 101, 200, 201, 204, 304, 400, 401, 403, 404, 405, 413, 417, 429}
"""Of all answers: what is wrong is the client's fault."""
LEAKS = (b"Traceback", b'File "', b"aiohttp", b"asyncpg", b"0x", b"/site-packages/", b"Error:")
"""What no refusal may have in it, unless the client sent it."""

NOISE = st.one_of(
    st.binary(max_size=30),
    TEXTS.map(lambda text: text.encode(errors="surrogatepass")),
    st.sampled_from(
        [b"", b"\x00", b"\r", b"\n", b"\r\n", b"\t", b"%", b"\xff", b"x" * 9000, b"0", b"-1", b"9" * 30]
    ),
)
METHODS = st.one_of(
    st.sampled_from([b"GET"] * 8 + [b"POST"] * 3 + [b"HEAD", b"OPTIONS", b"get", b"PRI", b"TRACE"]), NOISE
)
_PATHS = """
/api/portfolio/current /api/portfolio/performance /api/portfolio/stream /api/portfolio/stream-tickets
/api/openapi.json /healthz /
"""
PATHS = st.sampled_from(_PATHS.encode().split())
_VALUES = """
1D 1d ALL % %zz %ff %00 %F0%9F%92%A5 %ed%a0%80 2026-03-02T15:00:00Z 1969-12-31T23:59:59Z abcdefabcdef.1
1970-01-01T00:00:00%2B00:00 2026-03-02T15:00:00%2b23:59 xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
"""
VALUES = st.one_of(
    INSTANTS.map(quote),
    TEXTS.map(lambda text: quote(text, errors="surrogatepass")),
    st.sampled_from(_VALUES.split()),
).map(str.encode)
QUERIES = st.lists(
    st.tuples(
        st.sampled_from([b"timeframe", b"until", b"ticket", b"last_event_id", b"x", b"", b"until%00"]), VALUES
    ),
    max_size=3,
).map(lambda pairs: b"?" + b"&".join(name + b"=" + value for name, value in pairs) if pairs else b"")
TARGETS = st.one_of(
    st.tuples(PATHS, QUERIES).map(b"".join),
    st.tuples(PATHS, NOISE).map(b"".join),
    st.sampled_from(
        [b"*", b"//", b"/../..", b"http://h/healthz", b"http://[::1", b"h:443", b"/" + b"a/" * 5000, b"/?"]
    ),
    NOISE,
)
VERSIONS = st.one_of(
    st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/9.9"]), NOISE
)
SPECIAL: dict[bytes, list[bytes]] = {
    b"Accept-Encoding": [
        b"gzip;q=1e400",
        b"gzip;q=0",
        b"*;q=0",
        b"identity;q=0",
        b";;;",
        b"gzip," * 2000,
        b"br",
    ],
    b"If-None-Match": [b"*", b'W/"', b'"' + b"a" * 7000 + b'"', b'"a","b', b'"\xff"'],
    b"Last-Event-ID": [b"abcdefabcdef.1", b"abcdefabcdef.999999999999999", b"abcdefabcdef.-1", b"."],
    b"Authorization": [
        b"Bearer",
        b"Bearer a.b.c",
        b"Basic x",
        b"Bearer eyJhbGciOiJub25lIn0.e30.",
        b"Bearer \xff",
    ],
    b"Content-Length": [b"0", b"5", b"-1", b"1e3", b"18446744073709551616", b"5, 5", b"+5"],
    b"Transfer-Encoding": [b"chunked", b"gzip, chunked", b"identity", b"chunked, chunked", b"x"],
    b"Expect": [b"100-continue", b"x"],
    b"Upgrade": [b"websocket", b"h2c", b"WebSocket"],
    b"Connection": [b"Upgrade", b"close", b"keep-alive, Upgrade", b"Host"],
    b"Sec-WebSocket-Version": [b"13", b"8", b"x"],
    b"Sec-WebSocket-Key": [b"dGhlIHNhbXBsZSBub25jZQ==", b"short", b"\xff"],
    b"Sec-WebSocket-Extensions": [b"permessage-deflate", b"permessage-deflate; server_max_window_bits=99"],
    b"Origin": [b"null", b"http://[", b"http://127.0.0.1", b"x" * 3000],
    b"Access-Control-Request-Method": [b"GET"],
    b"X-Request-Id": [b"a" * 64, b"a b", b"\xff"],
    b"Cookie": [b"a=b;" * 1000, b'="\x01'],
    b"Range": [b"bytes=0-", b"bytes=9-1"],
    b"X-Forwarded-For": [b"::", b"1" * 400],
}
HEADERS = st.one_of(
    st.sampled_from(sorted(SPECIAL)).flatmap(
        lambda name: st.tuples(st.just(name), st.one_of(st.sampled_from(SPECIAL[name]), NOISE))
    ),
    st.tuples(NOISE, NOISE),
)
BODIES = st.one_of(
    st.just(b""),
    st.binary(max_size=50),
    st.sampled_from(
        [
            b"0\r\n\r\n",
            b"5\r\nhello\r\n0\r\n\r\n",
            b"ffffffffffffffffff\r\n",
            b"-1\r\n",
            b"5;x=" + b"y" * 9000,
        ]
    )
    | st.just(b"x" * 100_000),
)


def head(method: bytes, target: bytes, version: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    lines = [b" ".join((method, target, version)), *(name + b": " + value for name, value in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Return a request of which little is as it should be."""
    headers = draw(st.lists(HEADERS, max_size=5))
    if draw(st.integers(0, 3)):
        headers.insert(0, (b"Host", b"127.0.0.1"))
    if draw(st.booleans()):
        headers.append((b"Authorization", b"Bearer " + token().encode()))
    return head(draw(METHODS), draw(TARGETS), draw(VERSIONS), headers) + draw(BODIES)


RIGHT = head(
    b"GET", b"/api/portfolio/performance?timeframe=1W", b"HTTP/1.1", [(b"Host", b"h"), (b"Accept", b"*/*")]
)
CONVERSATIONS = st.one_of(
    requests(),
    requests(),
    st.lists(requests(), min_size=2, max_size=4).map(b"".join),
    st.integers(2, 300).map(lambda times: RIGHT * times),
    st.tuples(st.just(RIGHT), requests(), st.just(RIGHT)).map(b"".join),
    cut(RIGHT),
    st.binary(max_size=300),
    st.just(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50),  # TLS
    st.just(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000),
)
"""What a client says on a connection before it waits for an answer."""

# ---- answers -------------------------------------------------------------------------------------

_STATUS = re.compile(rb"(?:^|\r\n)HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n")


async def said_back(port: int, sent: bytes, *, first_seconds_max: float = QUIET_SECONDS) -> bytes:
    """Send, and return what comes until nothing more does, or nothing comes at first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        with suppress(ConnectionError):
            writer.write(sent)
            while len(received) < 10_000_000:
                async with asyncio.timeout(QUIET_SECONDS if received else first_seconds_max):
                    part = await reader.read(65_536)
                if not part:
                    break
                received += part
    except TimeoutError:
        pass
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return received


def check_answers(received: bytes, sent: bytes) -> None:
    """Every answer is one that this API gives, and no refusal says more than it should."""
    begun = b"\r\n" + received
    assert not received or begun.startswith(b"\r\nHTTP/1."), received[:200]
    for found in _STATUS.finditer(received):
        assert int(found[1]) in STATUSES, (found[0], sent[:500])
    for part in received.split(b"HTTP/1.")[1:]:
        if part[4:5] in (b"4", b"5"):
            assert b"application/problem+json" in part, part[:500]
            assert not [leak for leak in LEAKS if leak in part and leak not in sent], part[:500]


def gauge(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def nothing_is_left() -> None:
    """No request is under way and no stream open any more."""

    async def none_is() -> bool:
        open_streams = sum(gauge("gateway_streams_open", transport=name) for name in ("sse", "websocket"))
        return (gauge("gateway_requests_in_flight"), open_streams) == (0, 0)

    await eventually(none_is, timeout=30)


@pytest.fixture
async def gateway(database: Database, database_url: str, bus: Bus) -> AsyncIterator[Gateway]:
    await set_price(database, "AAPL", "175.00")
    await create_user(database, cash="1", positions={"AAPL": ("100", "15000")})
    async with running(database_url, bus=bus) as started:
        yield started


async def check_health(gateway: Gateway) -> None:
    answer = await gateway.get("/api/portfolio/current")
    assert (answer.status, answer.json()["total_value"]) == (200, 17501)


async def test_any_bytes_are_answered_cleanly(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    async def check(conversations: list[bytes]) -> None:
        received = await asyncio.gather(*(said_back(gateway.port, sent) for sent in conversations))
        for sent, answers in zip(conversations, received, strict=True):
            check_answers(answers, sent)
        await check_health(gateway)

    with nothing_unexpected_logged(caplog):
        await try_each(check, st.lists(CONVERSATIONS, min_size=1, max_size=12), count=20)
        await nothing_is_left()


# ---- frames of a WebSocket -----------------------------------------------------------------------


@st.composite
def client_frames(draw: st.DrawFn) -> bytes:
    """Return a frame as no good client sends it, or a good one."""
    opcode, first_bits = draw(st.integers(0, 15)), draw(st.sampled_from([0x80, 0x80, 0x00, 0xC0, 0xF0, 0x40]))
    payload = draw(
        st.one_of(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xfe", b"\x03\xe8", b"x" * 2000]))
    )
    length = draw(st.sampled_from([len(payload)] * 5 + [0, 2**16, 2**31, 2**63, 2**64 - 1]))
    mask = draw(st.sampled_from([b"\x00\x00\x00\x00", b"\x12\x34\x56\x78", b""]))
    masked = 0x80 if mask else 0
    if length < 126:
        size = bytes([masked | length])
    elif length < 2**16:
        size = bytes([masked | 126]) + struct.pack("!H", length)
    else:
        size = bytes([masked | 127]) + struct.pack("!Q", length)
    body = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload)) if mask else payload
    return bytes([first_bits | opcode]) + size + mask + body


async def test_any_frames_of_a_client_end_its_stream_alone(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    async def check(frames: list[bytes]) -> None:
        headers = [
            (b"Host", b"127.0.0.1"),
            (b"Authorization", b"Bearer " + token().encode()),
            (b"Upgrade", b"websocket"),
            (b"Connection", b"Upgrade"),
            (b"Sec-WebSocket-Version", b"13"),
            (b"Sec-WebSocket-Key", base64.b64encode(b"a" * 16)),
        ]
        sent = head(b"GET", STREAM, b"HTTP/1.1", headers) + b"".join(frames)
        received = await said_back(gateway.port, sent, first_seconds_max=ANSWER_SECONDS_MAX)
        assert received.startswith(b"HTTP/1.1 101 "), received[:200]
        assert not [leak for leak in LEAKS if leak in received], received[-500:]
        await check_health(gateway)

    with nothing_unexpected_logged(caplog):
        await try_each(check, st.lists(client_frames() | st.binary(max_size=50), max_size=6), count=15)
        await nothing_is_left()
