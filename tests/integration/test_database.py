"""The pool: whose turn it is, and what becomes of connections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from shared import database as databases
from shared.database import Database, DatabaseUnavailable
from tests.waiting import eventually

PID = "SELECT pg_backend_pid()"


@pytest.fixture
async def reader(database_url: str) -> AsyncIterator[Database]:
    """Two connections that only read, and are therefore kept."""
    async with databases.connect(
        database_url, application_name="reader", connections_max=2, reads_only=True
    ) as connected:
        yield connected


async def backends(database: Database, application_name: str) -> int:
    count: int = await database.fetch_value(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", application_name
    )
    return count


async def test_one_connection_does_for_statements_one_after_another(reader: Database) -> None:
    assert len({await reader.fetch_value(PID) for _ in range(10)}) == 1
    assert (reader.connections_open, reader.connections_idle) == (1, 1)


async def test_no_more_connections_than_allowed_whatever_is_kept(
    reader: Database, database: Database
) -> None:
    for _ in range(3):
        asked = [reader.fetch_value("SELECT pg_backend_pid() FROM pg_sleep(0.05)") for _ in range(6)]
        assert len(set(await asyncio.gather(*asked))) == 2
        async with reader.transaction() as first, reader.transaction() as second:
            assert await first.fetchval("SELECT 1") + await second.fetchval("SELECT 2") == 3
    assert await backends(database, "reader") <= 2


async def test_failed_statement_gives_its_turn_back(reader: Database) -> None:
    for _ in range(5):
        with pytest.raises(DatabaseUnavailable):
            await reader.fetch_value("SELECT pg_sleep(10)", timeout=0.05)
    assert await asyncio.gather(*(reader.fetch_value("SELECT 1") for _ in range(5))) == [1] * 5


async def test_cancelled_statement_gives_its_turn_back(reader: Database) -> None:
    for _ in range(5):
        asking = asyncio.ensure_future(reader.fetch_value("SELECT pg_sleep(10)"))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await asking
    assert await asyncio.gather(*(reader.fetch_value("SELECT 1") for _ in range(5))) == [1] * 5


async def test_whoever_is_cancelled_while_waiting_leaves_the_turn_to_the_next(reader: Database) -> None:
    async with reader.transaction():
        async with reader.transaction():
            waiting = [asyncio.ensure_future(reader.fetch_value("SELECT 1")) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
        # The second's turn has come by now, though it does not know yet.
        waiting[1].cancel()
        assert await waiting[2] == 1
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert await asyncio.gather(*(reader.fetch_value("SELECT 1") for _ in range(5))) == [1] * 5


async def test_who_waits_too_long_for_a_turn_is_told(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "CONNECT_TIMEOUT_SECONDS", 0.3)
    async with (
        databases.connect(database_url, application_name="reader", connections_max=1, reads_only=True) as one,
        one.transaction() as connection,
    ):
        with pytest.raises(DatabaseUnavailable, match="no connection became free"):
            await one.fetch_value("SELECT 1")
        assert await connection.fetchval("SELECT 1") == 1


async def test_kept_connection_that_the_server_ended_is_replaced(
    reader: Database, database: Database
) -> None:
    ended = await reader.fetch_value(PID)
    await database.fetch("SELECT pg_terminate_backend($1)", ended)

    async def is_gone() -> bool:
        return await backends(database, "reader") == 0

    await eventually(is_gone)
    assert await reader.fetch_value(PID) != ended


async def test_connection_that_nobody_uses_is_ended(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "IDLE_SECONDS_MAX", 0.3)
    async with databases.connect(
        database_url, application_name="reader", connections_max=3, reads_only=True
    ) as reader:
        await asyncio.gather(*(reader.fetch_value("SELECT 1 FROM pg_sleep(0.05)") for _ in range(3)))
        assert reader.connections_open == 3

        async def are_gone() -> bool:
            return await backends(database, "reader") == 0

        await eventually(are_gone)
        assert (reader.connections_open, reader.connections_idle) == (0, 0)
        assert await reader.fetch_value("SELECT 1") == 1


async def test_statement_under_way_is_finished_before_the_pool_closes(database_url: str) -> None:
    async with databases.connect(
        database_url, application_name="reader", connections_max=2, reads_only=True
    ) as reader:
        await reader.fetch_value("SELECT 1")
        under_way = asyncio.ensure_future(reader.fetch_value("SELECT 7 FROM pg_sleep(0.3)"))
        await asyncio.sleep(0)
    assert await under_way == 7
