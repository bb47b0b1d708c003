"""What refusing may cost: so many refusals a second leave, the others are held back for a moment.

A refusal costs half of an answer: most of it is what the system and the library take for any request. A client that
repeats at once what was refused, over as many connections as it has, could take the whole processor with refusals.
"""

import asyncio
import time
from collections import deque
from typing import Protocol

from prometheus_client import Counter, Gauge

PER_SECOND = 250
"""Refusals that leave in a second, and as many at once when there were none for a second; 3 percent of a core."""
HOLD_SECONDS_MAX = 4.0
"""Nobody is held back for longer: of more than a thousand held back more leave. Twice what `Retry-After` asks for."""
PAID_SECONDS = 1.0
"""A refusal that took so long leaves at once: its client has waited, and its deadline is near."""
RELEASE_SECONDS = 0.02
HELD_MAX = 10_000
"""A refusal beyond these leaves at once."""

refusals = Counter(
    "gateway_requests_refused", "Requests that were refused for their number, by reason", ["reason"]
)
held_back = Gauge("gateway_refusals_held_back", "Refusals that wait to be sent")
_by_reason = {
    reason: refusals.labels(reason)
    for reason in ("overload", "in_flight", "user_rate", "connections", "streams")
}


def refused(reason: str) -> None:
    """Count a request or connection that was refused."""
    _by_reason[reason].inc()


class Bucket:
    """A token bucket, as the one instant at which it will be full again (the generic cell rate algorithm)."""

    __slots__ = ("_burst_seconds", "_full_at", "_spacing")

    def __init__(self, per_second: float, burst: float) -> None:
        self._spacing = 1 / per_second
        self._burst_seconds = burst / per_second
        self._full_at = 0.0

    def take(self, now: float) -> float:
        """Take a token and return 0; without one return the seconds until there is one."""
        full_at = max(self._full_at, now) + self._spacing
        wait = full_at - now - self._burst_seconds
        if wait > 1e-9:
            return wait
        self._full_at = full_at
        return 0.0


class Request(Protocol):
    """What was refused."""

    @property
    def transport(self) -> object:
        """None once its client has gone."""


class Holding:
    """Holds back refusals that are too many at once, and lets them go one after the other.

    Those that came in the same moment leave at different ones, else they would come back as the same wave.
    """

    def __init__(self, seconds_max: float = HOLD_SECONDS_MAX) -> None:
        self._bucket = Bucket(PER_SECOND, PER_SECOND)
        self._seconds_max = seconds_max
        self._newest_at = self._released_at = 0.0
        self._held: deque[tuple[asyncio.Future[None], Request]] = deque()
        self._releasing: asyncio.TimerHandle | None = None
        self._is_over = False
        held_back.set_function(lambda: len(self._held))

    def is_to_be_held(self) -> bool:
        """Count a refusal that is about to be sent, and tell whether it is to be held back before."""
        return self._bucket.take(time.monotonic()) > 0 and len(self._held) < HELD_MAX and not self._is_over

    async def hold(self, request: Request) -> None:
        """Wait for the turn of this request's refusal to be sent."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._held.append((waiter, request))
        self._newest_at = time.monotonic()
        if self._releasing is None:
            self._released_at = self._newest_at
            self._releasing = loop.call_later(RELEASE_SECONDS, self._release_some)
        await waiter

    def release(self) -> None:
        """Hold nothing back any more."""
        self._is_over = True
        if self._releasing is not None:
            self._releasing.cancel()
        while self._held:
            self._let_go()

    def _release_some(self) -> None:
        """Let as many go as may, or as must for nobody to wait for too long."""
        now = time.monotonic()
        passed, self._released_at = (
            now - self._released_at,
            now,
        )  # more than asked for, when the processor is busy
        remaining = max(self._newest_at + self._seconds_max - now, passed)
        count, must = 0, int(len(self._held) * passed / remaining)
        while self._held:
            is_gone = self._held[0][1].transport is None  # its client: nobody else need wait for its turn
            if not is_gone:
                if self._bucket.take(now) > 0 and count >= must:
                    break
                count += 1
            self._let_go()
        self._releasing = None
        if self._held:
            self._releasing = asyncio.get_running_loop().call_later(RELEASE_SECONDS, self._release_some)

    def _let_go(self) -> None:
        waiter, _ = self._held.popleft()
        if not waiter.done():
            waiter.set_result(None)
