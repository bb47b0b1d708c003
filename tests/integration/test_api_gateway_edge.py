"""What surrounds every request: problems, limits, CORS, metrics, clients that misbehave."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from services.api_gateway import connections, edge, openapi
from services.api_gateway.responses import Health, ProblemDetails
from shared.database import Database
from tests.factories import create_user
from tests.gateway import POOL, Gateway, bearer, running
from tests.metrics import sample
from tests.waiting import eventually

CURRENT = "/api/portfolio/current"
APP = "https://app.example.com"


@pytest.fixture
async def gateway(database: Database, database_url: str) -> AsyncIterator[Gateway]:
    await create_user(database, cash="1")
    async with running(database_url, cors_allowed_origins=(APP, "http://localhost:3000")) as started:
        yield started


async def raw(gateway: Gateway, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are, and return status, headers and body of the first answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            return await read_answer(reader)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers.get("Content-Length", "0")))
    return int(head[0].split()[1]), headers, body


# ---- addresses and methods -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api", "/api/portfolio/current/", "/API/portfolio/current", "/%00"])
async def test_unknown_address_is_a_problem(gateway: Gateway, path: str) -> None:
    answer = await gateway.get(path)
    assert answer.status == 404
    assert answer.problem().type == "urn:foliotick:problem:not-found"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_other_method_is_a_problem_that_lists_the_allowed(gateway: Gateway, method: str) -> None:
    answer = await gateway.ask(method, CURRENT, headers=bearer())
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"
    assert answer.problem().allowed == ["GET", "HEAD"]


async def test_head_has_no_body(gateway: Gateway) -> None:
    answer = await gateway.ask("HEAD", CURRENT, headers=bearer())
    assert (answer.status, answer.text) == (200, "")


@pytest.mark.parametrize("line", [b"GET /healthz", b"GET /healthz HTTP/0.9", b"GET /healthz HTTP/2.0"])
async def test_another_version_of_http_is_answered_in_one_that_is_known(
    gateway: Gateway, line: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(line + b"\r\nHost: h\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await reader.read()  # to the end: the connection is closed
    writer.close()
    assert answer.startswith((b"HTTP/1.0 200 ", b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))


async def test_served_document_is_the_committed_one(gateway: Gateway) -> None:
    answer = await gateway.get("/api/openapi.json", None)
    assert answer.status == 200
    assert answer.text == openapi.text()


async def test_health_needs_no_token(gateway: Gateway) -> None:
    Health.model_validate_json((await gateway.get("/healthz", None)).text)
    ready = await gateway.get("/readyz", None)
    assert ready.status == 200
    assert ready.json()["checks"] == dict.fromkeys(
        ("postgres", "notifications", "load", "connections", "user_rates", "streams"), "ok"
    )


async def test_unexpected_failure_shows_nothing_of_itself(
    database: Database, gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    # A view that divides by zero: a bug, not an outage.
    await database.fetch("DROP VIEW portfolio_valuations")
    await database.fetch(
        """
        CREATE VIEW portfolio_valuations AS
        SELECT 1 / (id - id) AS user_id, subject, is_active, cash_balance AS total_value, FALSE AS simulated
        FROM users
        """
    )
    answer = await gateway.get("/api/portfolio/performance")
    assert answer.status == 500
    problem = answer.problem()
    assert problem.type == "urn:foliotick:problem:internal-error"
    assert "division" not in answer.text
    assert "Traceback" not in answer.text
    logged = capsys.readouterr().out
    assert problem.request_id in logged
    assert "division by zero" in logged


# ---- request id, access line, metrics ------------------------------------------------------------


async def test_given_request_id_is_kept(gateway: Gateway) -> None:
    answer = await gateway.ask("GET", "/nowhere", headers={"X-Request-Id": "web-1.2_3"})
    assert answer.headers["X-Request-Id"] == "web-1.2_3"
    assert answer.problem().request_id == "web-1.2_3"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, 'a"b', "é"])
async def test_unfit_request_id_is_replaced(gateway: Gateway, given: str) -> None:
    answer = await gateway.ask("GET", "/healthz", headers={"X-Request-Id": given})
    assert answer.headers["X-Request-Id"] != given
    assert len(answer.headers["X-Request-Id"]) == 16


async def test_request_leaves_one_line_without_its_query_or_token(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    answer = await gateway.get(f"{CURRENT}?access_token=very-private")
    out = capsys.readouterr().out
    assert out.count("request_served") == 1
    assert CURRENT in out
    assert answer.headers["X-Request-Id"] in out
    assert "very-private" not in out
    assert bearer()["Authorization"].split(".")[2] not in out


def idle_connections() -> float:
    return sample("database_connections", pool=POOL, state="idle")


async def test_requests_are_counted_by_route_and_status(gateway: Gateway) -> None:
    def counted(route: str, status: str) -> float:
        labels = {"route": route, "status": status}
        return REGISTRY.get_sample_value("gateway_request_seconds_count", labels) or 0.0

    before = counted(CURRENT, "200"), counted("unmatched", "404")
    await gateway.get(CURRENT)
    await gateway.get("/some/random/address")
    await gateway.get("/another")
    assert (counted(CURRENT, "200"), counted("unmatched", "404")) == (before[0] + 1, before[1] + 2)
    assert REGISTRY.get_sample_value("gateway_requests_in_flight") == 0
    assert idle_connections() >= 1


def test_seconds_are_counted_in_the_buckets_that_hold_them() -> None:
    registry = CollectorRegistry()
    seconds = edge.RequestSeconds()
    registry.register(seconds)
    for took in (0.0005, 0.001, 0.0011, 0.3, 60):
        seconds.observe("/a", 200, took)
    seconds.observe("/a", 503, 2)

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"gateway_request_seconds_{name}", {"route": "/a", **labels})

    bounds = ("0.001", "0.0025", "0.25", "0.5", "10.0", "+Inf")
    assert [sample("bucket", status="200", le=bound) for bound in bounds] == [2, 3, 3, 4, 4, 5]
    assert sample("count", status="200") == 5
    assert sample("sum", status="200") == pytest.approx(60.3026)
    assert sample("bucket", status="503", le="1.0") == 0
    assert sample("bucket", status="503", le="2.5") == 1


# ---- CORS ----------------------------------------------------------------------------------------


async def test_allowed_origin_may_read_the_answer(gateway: Gateway) -> None:
    answer = await gateway.ask("GET", CURRENT, headers=bearer() | {"Origin": APP})
    assert answer.headers["Access-Control-Allow-Origin"] == APP
    assert answer.headers["Vary"] == "Accept-Encoding, Authorization, Origin"
    refused = await gateway.ask("GET", CURRENT, headers={"Origin": APP})
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, APP)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://app.example.com.evil.example"])
async def test_other_origin_may_not(gateway: Gateway, origin: str) -> None:
    answer = await gateway.ask("GET", CURRENT, headers=bearer() | {"Origin": origin})
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["Vary"] == "Accept-Encoding, Authorization, Origin"


async def test_preflight_of_an_allowed_origin_is_answered(gateway: Gateway) -> None:
    asked = {
        "Origin": APP,
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = await gateway.ask("OPTIONS", CURRENT, headers=asked)
    assert (answer.status, answer.text) == (204, "")
    assert answer.headers["Access-Control-Allow-Origin"] == APP
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
    refused = await gateway.ask("OPTIONS", CURRENT, headers=asked | {"Origin": "https://evil.example"})
    assert refused.status == 405
    assert "Access-Control-Allow-Origin" not in refused.headers


async def test_without_configured_origins_nothing_is_allowed(database: Database, database_url: str) -> None:
    await create_user(database)
    async with running(database_url) as gateway:
        answer = await gateway.ask("GET", CURRENT, headers=bearer() | {"Origin": APP})
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("Access-Control")]


# ---- bodies and malformed requests ---------------------------------------------------------------


async def test_large_body_is_refused(gateway: Gateway) -> None:
    answer = await gateway.ask("GET", CURRENT, headers=bearer(), data=b"x" * 2000)
    assert answer.status == 413
    assert answer.problem().type == "urn:foliotick:problem:body-too-large"


async def test_small_body_is_ignored(gateway: Gateway) -> None:
    assert (await gateway.ask("GET", CURRENT, headers=bearer(), data=b"{}")).status == 200


@pytest.mark.parametrize(
    "framing", ["Content-Length: 1000000", "Content-Length: 100", "Transfer-Encoding: chunked"]
)
async def test_body_that_never_comes_is_not_waited_for(gateway: Gateway, framing: str) -> None:
    started = time.monotonic()
    request = f"POST {CURRENT} HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n5".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(request)
    async with asyncio.timeout(5):
        status, headers, _ = await read_answer(reader)
        assert await reader.read() == b""  # and the connection is closed
    assert status in (405, 413)
    assert headers["Content-Type"] == "application/problem+json"
    assert time.monotonic() - started < 3
    writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        b"GET /" + b"a" * 10000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10000 + b"\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
async def test_malformed_request_is_a_problem_without_a_traceback(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], request_bytes: bytes
) -> None:
    status, headers, body = await raw(gateway, request_bytes)
    assert status in (400, 404)
    assert headers["Content-Type"] == "application/problem+json"
    ProblemDetails.model_validate_json(body)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert "exc_" not in captured.out
    assert captured.out.count("request_served") == 1
    assert (await gateway.get(CURRENT)).status == 200


async def test_bad_expectation_is_a_problem(gateway: Gateway) -> None:
    answer = await gateway.ask("GET", "/nowhere", headers={"Expect": "the-unexpected"})
    assert answer.status == 417
    assert answer.problem().type == "urn:foliotick:problem:expectation-failed"


@pytest.mark.parametrize("query", ["%", "timeframe=%zz", "a[]=%00", "%F0%28%8C%28=1", "&&&=", "timeframe"])
async def test_strange_query_is_refused(gateway: Gateway, query: str) -> None:
    request = f"GET /api/portfolio/performance?{query} HTTP/1.1\r\nHost: a\r\nAuthorization: "
    status, _, _ = await raw(gateway, f"{request}{bearer()['Authorization']}\r\n\r\n".encode())
    assert status == 400


# ---- slow clients, overload ----------------------------------------------------------------------


async def test_client_that_never_finishes_its_headers_is_cut_off(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "KEEPALIVE_SECONDS", 0.5)
    async with running(database_url) as gateway:
        for beginning in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: a\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(beginning)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()


async def test_client_that_does_not_read_its_answers_is_cut_off(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "WRITE_SECONDS_MAX", 0.3)
    user_id = await create_user(database)
    await database.fetch(
        "INSERT INTO positions SELECT $1, 'T' || n, 1, 1 FROM generate_series(1, 10000) AS n", user_id
    )
    async with running(database_url) as gateway:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", gateway.port))
            credentials = bearer()["Authorization"]
            asked = f"GET {CURRENT} HTTP/1.1\r\nHost: a\r\nAuthorization: {credentials}\r\n\r\n"
            deaf.sendall(asked.encode() * 5)  # some ten megabytes of answers
            deaf.setblocking(False)

            async def is_cut_off() -> bool:
                try:
                    deaf.send(b"\r\n")
                except ConnectionError:
                    return True
                return False

            await eventually(is_cut_off, every=0.1)
        assert (await gateway.get(CURRENT)).status == 200


async def test_more_requests_than_can_be_served_are_refused_at_once(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "IN_FLIGHT_MAX", 3)
    await create_user(database)
    async with (
        running(database_url, gateway_database_connections=1) as gateway,
        database.transaction() as connection,
    ):
        await connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        waiting = [asyncio.ensure_future(gateway.get(CURRENT)) for _ in range(3)]

        async def are_waiting() -> bool:
            return REGISTRY.get_sample_value("gateway_requests_in_flight") == 3

        await eventually(are_waiting)
        started = time.monotonic()
        refused = await gateway.get(CURRENT)
        assert time.monotonic() - started < 1
        assert refused.status == 503
        assert refused.problem().type == "urn:foliotick:problem:overloaded"
        assert refused.headers["Retry-After"] == "2"
        for answer in await asyncio.gather(*waiting):
            assert answer.status == 503


async def test_hundreds_at_once_are_all_answered_by_few_connections(gateway: Gateway) -> None:
    connector = aiohttp.TCPConnector(limit=200)
    async with aiohttp.ClientSession(connector=connector) as session:
        many = Gateway(gateway.port, session)
        answers = await asyncio.gather(*(many.get(CURRENT) for _ in range(200)))
    # A machine that stands still meanwhile makes so many too many: then some are refused, which is an answer as well.
    assert {answer.status for answer in answers} <= {200, 503}
    assert sum(answer.status == 200 for answer in answers) >= 10
    refused = {answer.problem().type for answer in answers if answer.status == 503}
    assert refused <= {"urn:foliotick:problem:overloaded"}
    assert 1 <= idle_connections() <= 10
