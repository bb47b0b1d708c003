"""Boundaries of aligned time."""

import asyncio
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from shared import clock
from shared.clock import aligned_ticks, last_boundary, next_boundary

FIVE_MINUTES = timedelta(minutes=5)


def test_boundaries_are_multiples_of_the_interval_since_the_epoch() -> None:
    at = datetime(2025, 1, 5, 1, 3, 20, tzinfo=UTC)
    assert last_boundary(at, FIVE_MINUTES) == datetime(2025, 1, 5, 1, 0, tzinfo=UTC)
    assert next_boundary(at, FIVE_MINUTES) == datetime(2025, 1, 5, 1, 5, tzinfo=UTC)


def test_an_instant_on_a_boundary_is_its_own_last_boundary() -> None:
    at = datetime(2025, 1, 5, 1, 5, tzinfo=UTC)
    assert last_boundary(at, FIVE_MINUTES) == at
    assert next_boundary(at, FIVE_MINUTES) == datetime(2025, 1, 5, 1, 10, tzinfo=UTC)


@given(
    at=st.datetimes(datetime(1990, 1, 1), datetime(2060, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    seconds=st.floats(0.05, 86_400),
)
def test_an_instant_lies_between_its_boundaries(at: datetime, seconds: float) -> None:
    interval = timedelta(seconds=seconds)
    assert last_boundary(at, interval) <= at < next_boundary(at, interval)
    assert next_boundary(at, interval) - last_boundary(at, interval) == interval


async def test_ticks_begin_with_the_boundary_under_way_and_end_with_stop() -> None:
    stop = asyncio.Event()
    interval = timedelta(milliseconds=50)
    began = clock.utc_now()
    ticks = []
    async for tick in aligned_ticks(interval, stop):
        ticks.append(tick)
        if len(ticks) == 3:
            stop.set()
    assert ticks[0] in (last_boundary(began, interval), next_boundary(began, interval))
    assert all(last_boundary(tick, interval) == tick for tick in ticks)
    assert ticks == sorted(set(ticks))


async def test_of_boundaries_that_pass_during_the_work_the_last_is_yielded_at_once() -> None:
    stop = asyncio.Event()
    interval = timedelta(milliseconds=200)
    ticks: list[datetime] = []
    async for tick in aligned_ticks(interval, stop):
        if ticks:
            assert last_boundary(clock.utc_now(), interval) == tick  # not the next one: no slot is lost
            assert tick - ticks[0] >= 2 * interval
            stop.set()
        else:
            ticks.append(tick)
            reached = next_boundary(tick, interval) + 1.4 * interval
            while clock.utc_now() < reached:
                pass  # work that blocks across two boundaries
