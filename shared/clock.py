"""Aligned time. Only the outermost loops ask the clock; below them the instant is a parameter."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Now = Callable[[], datetime]
"""A clock: returns the aware current time in UTC."""
_CLOCK_CHECK_SECONDS_MAX = 1.0  # a wall clock that jumps is noticed within this time


def utc_now() -> datetime:
    """Return the aware current time in UTC."""
    return datetime.now(UTC)


def last_boundary(at: datetime, interval: timedelta) -> datetime:
    """Return the latest multiple of `interval` since the epoch that is not after `at`."""
    return at - (at - _EPOCH) % interval


def next_boundary(at: datetime, interval: timedelta) -> datetime:
    """Return the earliest multiple of `interval` since the epoch that is after `at`."""
    return last_boundary(at, interval) + interval


async def wait_for_stop(stop: asyncio.Event, timeout: float) -> bool:
    """Wait until `stop` is set or `timeout` seconds have passed; tell whether it was set."""
    if timeout > 0:
        try:
            async with asyncio.timeout(timeout):
                await stop.wait()
        except TimeoutError:
            pass
    return stop.is_set()


async def aligned_ticks(
    interval: timedelta, stop: asyncio.Event, *, now: Now = utc_now
) -> AsyncIterator[datetime]:
    """Yield the boundary of `interval` under way, then each one once it is reached, until `stop` is set.

    When boundaries pass while the caller works, the last of them is yielded at once and the others are left out.
    A jump of the wall clock leaves boundaries out or repeats them: the caller must not mind.
    """
    yielded: datetime | None = None
    while not stop.is_set():
        at = now()
        boundary = last_boundary(at, interval)
        if boundary != yielded:
            yielded = boundary
            yield boundary
        else:
            remaining = (boundary + interval - at).total_seconds()
            await wait_for_stop(stop, min(remaining, _CLOCK_CHECK_SECONDS_MAX))
