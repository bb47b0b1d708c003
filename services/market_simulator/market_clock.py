"""The market's time: the real one, or a replay's recorded time that runs at a chosen speed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.market_simulator.instants import SECOND_NS


class MarketClock(Protocol):
    """Tells what time it is in the market."""

    def now_ns(self) -> int:
        """Return the market's current instant."""


class RealClock:
    """The time of this machine."""

    def now_ns(self) -> int:
        return time.time_ns()


@dataclass(slots=True)
class ReplayClock:
    """Recorded time: `speed` recorded seconds pass in a real second, up to the end of the recording."""

    at_ns: int
    speed: float
    end_ns: int
    monotonic_s: Callable[[], float] = time.monotonic
    _since_s: float = 0.0

    def __post_init__(self) -> None:
        self._since_s = self.monotonic_s()

    def now_ns(self) -> int:
        passed_s = self.monotonic_s() - self._since_s
        return min(self.end_ns, self.at_ns + int(passed_s * self.speed * SECOND_NS))

    def set(self, at_ns: int | None, speed: float | None) -> None:
        """Go to another instant or another speed, or both; None leaves it as it is."""
        now_ns = self.now_ns() if at_ns is None else at_ns
        self.at_ns, self.speed = now_ns, self.speed if speed is None else speed
        self._since_s = self.monotonic_s()
