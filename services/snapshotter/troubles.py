"""What an operator is to see of the work in `/readyz`: what goes wrong now, and what went wrong lately.

None of it makes the service unready: it does what can be done, and says what cannot.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count

from shared.health import Degraded

REMEMBERED_SECONDS_MIN = 60.0
SHOWN_MAX = 5


class Troubles:
    """Troubles that have begun and not ended, and those that happened in the last two intervals."""

    def __init__(self, interval: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._remembered_seconds = max(2 * interval.total_seconds(), REMEMBERED_SECONDS_MIN)
        self._clock = clock
        self._numbers = count()
        self._lasting: dict[str | int, str] = {}
        self._happened: dict[str, tuple[str, float]] = {}

    def number(self) -> int:
        """Return a key for a trouble that may be there several times."""
        return next(self._numbers)

    def begin(self, key: str | int, text: str) -> None:
        """Note a trouble that lasts until `end`."""
        self._lasting[key] = text

    def end(self, key: str | int) -> None:
        self._lasting.pop(key, None)

    def happened(self, kind: str, text: str) -> None:
        """Note what is over already; of each kind the last is said, for a while."""
        self._happened[kind] = text, self._clock()

    async def check(self) -> Degraded | None:
        """Return in one line what is wrong, for readiness."""
        now = self._clock()
        lately = [text for text, at in self._happened.values() if now - at < self._remembered_seconds]
        told = [*dict.fromkeys(self._lasting.values()), *lately]
        if not told:
            return None
        more = f"; and {len(told) - SHOWN_MAX} more" if len(told) > SHOWN_MAX else ""
        return Degraded("; ".join(told[:SHOWN_MAX]) + more)
