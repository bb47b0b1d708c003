"""Aligned time. Only the outermost loops ask the clock; below them the instant is a parameter."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
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


async def aligned_ticks(interval: timedelta, stop: asyncio.Event) -> AsyncIterator[datetime]:
    """Yield each boundary of `interval` once it is reached, until `stop` is set.

    Boundaries that pass while the caller works are skipped, not queued. After a backward jump of the
    wall clock boundaries repeat, after a forward jump they are left out: the caller must not mind either.
    """
    boundary = next_boundary(utc_now(), interval)
    while not stop.is_set():
        now = utc_now()
        if now >= boundary:
            yield last_boundary(now, interval)
            boundary = next_boundary(utc_now(), interval)
            continue
        boundary = min(boundary, next_boundary(now, interval))
        await wait_for_stop(stop, min((boundary - now).total_seconds(), _CLOCK_CHECK_SECONDS_MAX))
