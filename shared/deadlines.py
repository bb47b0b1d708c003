"""Many waits of the same length on one timer: they run out in the order in which they began."""

import asyncio
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
        self._running: dict[K, float] = {}  # in the order of their ends, since all last equally long
        self._timer: asyncio.TimerHandle | None = None

    def start(self, key: K) -> None:
        """Begin a wait; `key` must not be under way."""
        assert key not in self._running
        self._running[key] = time.monotonic() + self._seconds
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def end(self, key: K) -> bool:
        """End a wait; return whether it was under way, and so has not expired."""
        return self._running.pop(key, None) is not None

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
