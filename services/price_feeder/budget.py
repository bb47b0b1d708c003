"""How often Alpaca may be asked: the budget of requests, and the pause that an answer asks for. Pure."""

import math
import threading
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

WINDOW_SECONDS = 60.0

PAUSE_MIN = timedelta(seconds=1)
PAUSE_MAX = timedelta(hours=1)
PAUSE_UNTOLD = timedelta(seconds=15)
"""The pause when Alpaca is out of patience and does not say for how long."""


class RateBudget:
    """At most `requests_max` requests in any 60 seconds, wherever between start and end the other side counts them.

    A request holds its place from its start until 60 seconds after its end, and so it does not matter how long
    it was under way. Times are seconds of a clock that never goes back. Safe for use by several threads.
    """

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self._under_way = 0
        self._ended_at: deque[float] = deque()
        self._lock = threading.Lock()

    def start(self, at: float) -> bool:
        """Take a place for a request that starts now; False when none is left."""
        with self._lock:
            if self._left(at) <= 0:
                return False
            self._under_way += 1
            return True

    def end(self, at: float) -> None:
        """Say that a started request has ended, well or not."""
        with self._lock:
            assert self._under_way > 0
            self._under_way -= 1
            self._ended_at.append(at)

    def left(self, at: float) -> int:
        """Return how many requests may start now."""
        with self._lock:
            return self._left(at)

    def _left(self, at: float) -> int:
        while self._ended_at and at - self._ended_at[0] > WINDOW_SECONDS:
            self._ended_at.popleft()
        return self._requests_max - self._under_way - len(self._ended_at)


def pause_asked_for(headers: Mapping[str, str], now: datetime) -> timedelta:
    """Return how long to ask nothing: `Retry-After` (seconds or a date), else `X-RateLimit-Reset` (epoch), bounded."""
    pause = _retry_after(headers.get("Retry-After"), now)
    if pause is None:
        reset = _number(headers.get("X-RateLimit-Reset"))
        pause = None if reset is None else reset - now.timestamp()
    if pause is None:
        return PAUSE_UNTOLD
    seconds = min(max(pause, PAUSE_MIN.total_seconds()), PAUSE_MAX.total_seconds())
    return timedelta(seconds=seconds)


def _retry_after(value: str | None, now: datetime) -> float | None:
    seconds = _number(value)
    if seconds is not None or value is None:
        return seconds
    try:
        until = parsedate_to_datetime(value)
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return (until - now).total_seconds()
    except (ValueError, OverflowError):
        return None


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
