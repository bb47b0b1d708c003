"""The clock of the database on real PostgreSQL, beside an own clock that is set wrong on purpose."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from shared import database_clock, health
from shared.database import Database
from shared.database_clock import DatabaseClock
from tests.waiting import eventually

HOUR = timedelta(hours=1)
CLOSE = timedelta(seconds=2)


class OwnClock:
    """The clock of this machine, as far ahead as it is told to be."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead


async def test_own_clock_counts_while_it_agrees_and_the_databases_when_it_leaps(database: Database) -> None:
    own = OwnClock()
    shared = DatabaseClock(database, own=own.now)
    own.ahead = HOUR
    assert shared.now() - datetime.now(UTC) > HOUR - CLOSE  # nothing else is known yet
    own.ahead = timedelta(0)
    assert await shared.read()
    for ahead in (HOUR, -HOUR, timedelta(seconds=3), timedelta(0)):
        own.ahead = ahead  # and is not read again
        assert abs(shared.now() - datetime.now(UTC)) < CLOSE
    own.ahead = timedelta(seconds=1)
    assert abs(shared.now() - own.now()) < timedelta(seconds=0.2)  # near enough to be gone by


async def test_clock_that_is_apart_is_said_once_and_noted_by_readiness(database: Database) -> None:
    own = OwnClock()
    shared = DatabaseClock(database, own=own.now)
    with capture_logs() as logs:
        await shared.read()
        assert await shared.check() is None
        own.ahead = -HOUR
        await shared.read()
        await shared.read()
        assert await shared.check() == "the clock is -3600 s ahead of PostgreSQL's"
        own.ahead = timedelta(0)
        await shared.read()
    assert [line["event"] for line in logs] == ["clock_wrong", "clock_right_again"]


async def test_time_goes_on_while_the_database_is_away(database: Database) -> None:
    own = OwnClock()
    shared = DatabaseClock(database, own=own.now)
    await shared.read()
    own.ahead = HOUR
    await database.close()
    assert not await shared.read()
    assert await DatabaseClock(database).check() == "not compared with PostgreSQL's yet"
    assert abs(shared.now() - datetime.now(UTC)) < CLOSE


async def test_readiness_asks_nothing(database: Database) -> None:
    """It has two seconds for all its checks, and a reading may take more."""
    assert await DatabaseClock(database).check() == "not compared with PostgreSQL's yet"
    assert database.connections_open == 0


async def test_what_a_connection_was_waited_for_spoils_no_reading(database: Database) -> None:
    long_ones = [
        asyncio.create_task(database.fetch("SELECT pg_sleep(1.2)")) for _ in range(database.connections_max)
    ]
    await asyncio.sleep(0)  # they have all turns
    shared = DatabaseClock(database)
    assert await shared.read()
    assert abs(shared.now() - datetime.now(UTC)) < timedelta(seconds=0.5)
    await asyncio.gather(*long_ones)


async def test_clock_that_cannot_be_read_is_said_once_until_it_can(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, stop = DatabaseClock(database), asyncio.Event()
    monkeypatch.setattr(database_clock, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(database_clock, "UNKNOWN_SECONDS_MAX", 0.2)

    async def is_degraded() -> bool:
        return isinstance(await shared.check(), health.Degraded)

    async def is_known() -> bool:
        return await shared.check() is None

    with capture_logs() as logs, monkeypatch.context() as slow:
        slow.setattr(database_clock, "ROUND_TRIP_SECONDS_MAX", 0.0)  # every answer takes longer
        keeping = asyncio.create_task(shared.keep(stop))
        await eventually(is_degraded)
        assert await shared.check() == "PostgreSQL's clock cannot be read: the answer took 0.0 s"
        slow.undo()
        await eventually(is_known)
        stop.set()
        await keeping
    assert [line["event"] for line in logs] == ["clock_unknown", "clock_known"]


async def test_waiting_for_the_first_reading_ends_with_it_or_with_the_service(database: Database) -> None:
    stop = asyncio.Event()
    shared = DatabaseClock(database)
    waiting = asyncio.create_task(shared.wait_until_known(stop))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(shared.keep(stop))
        assert await asyncio.wait_for(waiting, 10)
        stop.set()
    assert not await DatabaseClock(database).wait_until_known(stop)
