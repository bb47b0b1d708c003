"""When each client of a stream gets its next event: soon after a change, and not more often than the rate allows."""

import asyncio
import heapq
from itertools import count
from typing import Protocol

GATHER_SECONDS = 0.01
"""Changes that come together, as ticks of one batch do, are one event."""
SPACING_SECONDS = 0.25
"""Between two events of a client, at least."""
TURN_SECONDS_MAX = 0.005
"""How long events are sent before others get their turn."""


class Paced(Protocol):
    next_at: float
    """The event loop's time before which it gets nothing."""

    def send(self) -> None:
        """Send what there is to be sent."""


class Pace:
    """Sends events when they are due, in slices, so that a thousand clients do not hold up a request."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Paced]] = []
        self._order = count()
        self._timer: asyncio.Handle | None = None
        self._fires_at = 0.0

    def add(self, client: Paced) -> None:
        """Let the client send once, as soon as the pace allows; it is not to be added again before."""
        loop = asyncio.get_running_loop()
        at = max(loop.time() + GATHER_SECONDS, client.next_at)
        heapq.heappush(self._due, (at, next(self._order), client))
        if self._timer is None or at < self._fires_at:
            self._wait_until(at, loop)

    def _wait_until(self, at: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = at
        self._timer = loop.call_at(at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        began = now = loop.time()
        while self._due and self._due[0][0] <= now and now - began < TURN_SECONDS_MAX:
            client = heapq.heappop(self._due)[2]
            client.next_at = now + SPACING_SECONDS
            client.send()
            now = loop.time()
        if self._due:
            if self._due[0][0] <= now:
                self._fires_at = now
                self._timer = loop.call_soon(self._fire)
            else:
                self._wait_until(self._due[0][0], loop)
