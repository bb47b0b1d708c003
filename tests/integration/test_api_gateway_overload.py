"""More than can be served: what is refused, how soon, and who does not notice."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from services.api_gateway import admission, episodes, refusals
from shared.bus import Bus
from shared.database import Database
from tests.factories import create_user
from tests.gateway import Answer, Gateway, bearer, running, token
from tests.metrics import sample
from tests.waiting import eventually

CURRENT = "/api/portfolio/current"
CHART = "/api/portfolio/performance"


@asynccontextmanager
async def many_connections(gateway: Gateway) -> AsyncIterator[Gateway]:
    """The same gateway, asked over as many connections as there are requests."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Gateway(gateway.port, session, gateway.served)


@asynccontextmanager
async def nobody_is_answered(database: Database) -> AsyncIterator[None]:
    """Let every reading of users wait while the block runs."""
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        yield


async def test_excess_is_refused_at_once_and_said_and_all_is_well_after(
    database: Database,
    database_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(episodes, "CALM_SECONDS", 0.3)
    monkeypatch.setattr(admission, "FEW_SECONDS", 0.2)
    await create_user(database)
    refused_before = sample("gateway_requests_refused_total", reason="overload")
    async with (
        running(database_url, gateway_database_connections=2) as gateway,
        many_connections(gateway) as crowd,
    ):
        async with nobody_is_answered(database):
            waiting = [asyncio.ensure_future(crowd.get(CURRENT)) for _ in range(64)]

            async def are_waiting() -> bool:
                return sample("gateway_readings_under_way") >= 50

            await eventually(are_waiting)

            async def is_refused() -> bool:
                with suppress(TimeoutError):  # let in: the others have not waited for long yet
                    async with asyncio.timeout(0.3):
                        answer = await crowd.get(CURRENT)
                    assert answer.problem().type == "urn:foliotick:problem:overloaded"
                    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
                    return True
                return False

            await eventually(is_refused, timeout=1.9)  # the statements under way end after two seconds
            assert (await gateway.get("/healthz", None)).status == 200
            assert (await gateway.says("load")).startswith("overloaded, requests refused: ")
        # Who was let in got an answer, or the reason why there was none in time.
        for answer in await asyncio.gather(*waiting):
            assert answer.status in (200, 503)

        async def is_well() -> bool:
            answers = await asyncio.gather(*(crowd.get(CURRENT) for _ in range(50)))
            checks = (await gateway.get("/readyz", None)).json()["checks"]
            return {answer.status for answer in answers} == {200} and checks["load"] == "ok"

        await eventually(is_well, timeout=5)
    assert sample("gateway_requests_refused_total", reason="overload") > refused_before
    said = capsys.readouterr().out
    assert (said.count("overload_began"), said.count("overload_ended")) == (1, 1)


async def test_hundreds_who_wait_for_one_chart_are_one_reading(
    database: Database, database_url: str, bus: Bus
) -> None:
    await create_user(database)
    async with (
        running(database_url, bus=bus, gateway_database_connections=1) as gateway,
        many_connections(gateway) as crowd,
    ):
        async with nobody_is_answered(database):
            waiting = [asyncio.ensure_future(crowd.get(CHART)) for _ in range(300)]

            async def are_waiting() -> bool:
                return sample("gateway_requests_in_flight") == 300

            await eventually(are_waiting)
            assert sample("gateway_readings_under_way") == 1
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}


async def test_greedy_user_is_refused_and_a_modest_one_keeps_all_answers(
    database: Database, database_url: str
) -> None:
    await create_user(database, "greedy")
    await create_user(database, "modest")
    served: list[Answer] = []
    async with (
        running(database_url, user_requests_per_second=20, user_requests_burst=20) as gateway,
        many_connections(gateway) as crowd,
    ):
        is_over = asyncio.Event()

        async def ask_again_and_again() -> None:
            while not is_over.is_set():
                served.append(await crowd.get(CURRENT, "greedy"))

        began = time.monotonic()
        greedy = [asyncio.ensure_future(ask_again_and_again()) for _ in range(20)]
        modest = []
        for _ in range(20):
            modest.append(await gateway.get(CURRENT, "modest"))
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - began
        is_over.set()
        await asyncio.gather(*greedy)
    assert {answer.status for answer in modest} == {200}
    refused = [answer for answer in served if answer.status != 200]
    assert len(served) - len(refused) <= 20 + 20 * (seconds + 5)
    assert len(refused) >= 100  # with 400 a second he asked twenty times what he may
    for answer in refused:
        assert answer.status == 429
        assert answer.problem().type == "urn:foliotick:problem:too-many-requests"
        assert answer.headers["Retry-After"] == "1"


async def test_refusals_cost_a_client_time_and_nobody_else(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "PER_SECOND", 20)
    await create_user(database)
    forged = {"Authorization": f"Bearer {token(secret='y' * 32)}"}
    async with running(database_url) as gateway, many_connections(gateway) as crowd:

        async def knock() -> None:
            for _ in range(8):
                assert (await crowd.ask("GET", CURRENT, headers=forged)).status == 401

        began = time.monotonic()
        knocking = [asyncio.ensure_future(knock()) for _ in range(10)]
        good = [await gateway.get(CURRENT) for _ in range(10)]
        assert not all(knock.done() for knock in knocking)
        await asyncio.gather(*knocking)
        assert time.monotonic() - began > 2.5  # 80 at 20 a second, of which 20 at once
        assert {answer.status for answer in good} == {200}


async def test_clients_that_leave_while_a_refusal_is_held_back_leave_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "PER_SECOND", 1)
    monkeypatch.setattr(refusals, "HOLD_SECONDS_MAX", 0.5)
    async with running(database_url) as gateway:
        for _ in range(30):
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(f"GET {CURRENT} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            await writer.drain()
            writer.close()

        async def is_nothing_left() -> bool:
            return sample("gateway_connections_open") == 0 and sample("gateway_refusals_held_back") == 0

        await eventually(is_nothing_left)
        assert (await gateway.get("/healthz", None)).status == 200


async def test_connection_too_many_is_closed_and_those_there_are_go_on(
    database: Database, database_url: str
) -> None:
    await create_user(database)
    asked = (
        f"GET {CURRENT} HTTP/1.1\r\nHost: a\r\nAuthorization: {bearer()['Authorization']}\r\n\r\n".encode()
    )
    async with running(database_url, gateway_connections_max=3) as gateway:
        connections = []
        for _ in range(3):
            connections.append(await asyncio.open_connection("127.0.0.1", gateway.port))

        async def are_open() -> bool:
            return sample("gateway_connections_open") == 3

        await eventually(are_open)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        for reader, writer in connections:
            writer.write(asked)
            async with asyncio.timeout(5):
                assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
        assert sample("gateway_requests_refused_total", reason="connections") >= 1
        connections.pop()[1].close()

        async def is_let_in() -> bool:
            assert sample("gateway_connections_open") < 3
            async with aiohttp.ClientSession() as session:
                answer = await Gateway(gateway.port, session).get("/readyz", None)
            assert answer.json()["checks"]["connections"] == "degraded"
            return (await gateway.says("connections")).startswith("too many connections, new ones closed: 1 ")

        await eventually(is_let_in)
        for _, writer in connections:
            writer.close()
