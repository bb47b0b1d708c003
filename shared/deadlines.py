"""Many waits of the same length on one timer: they run out in the order in which they began."""

import asyncio
import math
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """Calls `expired(key)` once for each key that was started `seconds` ago and has not ended since.

    An `asyncio.timeout` sets a timer of its own and takes it back, for a deadline that hardly ever comes; here a start
    and an end are one entry in a dictionary, a tenth of the cost.
    """

    def __init__(self, seconds: float, expired: Callable[[K], None]) -> None:
        self._seconds = seconds
        self._expired = expired
        self._running: dict[
            K, float
        ] = {}  # in the order of their ends: none lasts longer than one begun later
        self._ends_at_max = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def start(self, key: K) -> None:
        """Begin a wait; `key` must not be under way."""
        assert key not in self._running
        now = time.monotonic()
        ends_at = now + self._seconds
        if ends_at > self._ends_at_max:
            ends_at = max(self._ends_at_max, now)
        self._running[key] = ends_at
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(ends_at - now, self._look)

    def end(self, key: K) -> bool:
        """End a wait; return whether it was under way, and so has not expired."""
        return self._running.pop(key, None) is not None

    def end_within(self, seconds: float) -> None:
        """Let all waits run out so many seconds from now, at the latest, and those that begin later too."""
        self._ends_at_max = min(time.monotonic() + seconds, self._ends_at_max)
        self._running = {key: min(ends_at, self._ends_at_max) for key, ends_at in self._running.items()}
        if self._timer is not None:
            self._timer.cancel()
        self._look()

    def _look(self) -> None:
        """Expire what is due, and set the timer to the next end; without one it is set by the next start."""
        self._timer = None
        while self._running:
            key, ends_at = next(iter(self._running.items()))
            remaining = ends_at - time.monotonic()
            if remaining > 0:
                self._timer = asyncio.get_running_loop().call_later(remaining, self._look)
                return
            del self._running[key]
            self._expired(key)
