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


async def test_ticks_are_aligned_and_end_with_stop() -> None:
    stop = asyncio.Event()
    interval = timedelta(milliseconds=50)
    ticks = []
    async for tick in aligned_ticks(interval, stop):
        ticks.append(tick)
        if len(ticks) == 3:
            stop.set()
    assert all(last_boundary(tick, interval) == tick for tick in ticks)
    assert ticks == sorted(set(ticks))
    assert clock.utc_now() - ticks[-1] < timedelta(seconds=1)


async def test_boundaries_that_pass_during_the_work_are_skipped() -> None:
    stop = asyncio.Event()
    interval = timedelta(milliseconds=40)
    ticks = []
    async for tick in aligned_ticks(interval, stop):
        ticks.append(tick)
        if len(ticks) == 2:
            stop.set()
        else:
            reached = clock.utc_now() + 3 * interval
            while clock.utc_now() < reached:
                pass  # work that blocks for three boundaries
    assert ticks[1] - ticks[0] >= 3 * interval
