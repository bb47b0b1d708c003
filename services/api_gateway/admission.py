"""Who may ask the database: as many as will be answered soon. All others are refused at once.

A queue in which everybody waits for five seconds answers nobody in time. By Little's law who joins `n` others waits for
`n` times the time of a place, and every reading that ends tells what a place takes: its own time, divided by the number
that it stood in line with. That holds whatever is short: the processor of this process, connections, or the database.

What is kept, or is being read for somebody else already, needs no place: a thousand who wait for one chart are one.
"""

import time
from collections.abc import Callable
from types import TracebackType

from prometheus_client import Gauge

from services.api_gateway import problems
from services.api_gateway.episodes import Episode
from services.api_gateway.problems import Problem
from services.api_gateway.refusals import refused

WAIT_SECONDS_MAX = 0.1
"""Nobody is let in who would wait for longer."""
FEW, FEW_SECONDS = 64, 1.0
"""So few are let in while nobody of them has waited for longer than that, whatever was learnt before."""
BURST_SECONDS = 0.1
BURST_MAX = 256
"""So many may come at once, as after a pause, while nobody of them has waited for longer than that."""
PLACE_SECONDS_AT_FIRST = 0.002
LEARNING_SHARE = 1 / 32
"""How much one reading changes what a place is taken to cost."""

readings_under_way = Gauge(
    "gateway_readings_under_way", "Requests that wait for the database, or are read for"
)
place_seconds = Gauge(
    "gateway_place_seconds", "How much longer a reading takes for each one that is under way before it"
)


class Place:
    """One reading's place, while the block runs; what it took is learnt from."""

    __slots__ = ("_admission", "at", "others")

    def __init__(self, admission: "Admission", at: float, others: int) -> None:
        self._admission = admission
        self.at = at
        self.others = others

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None) -> None:
        """Give the place back; to be called once."""
        self._admission.leave(self, error)


class Admission:
    """Lets readings in, or raises Problem."""

    def __init__(self, at_once_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Let in at least as many as the database is asked at once."""
        self._clock = clock
        self._at_once_max = at_once_max
        self._places: dict[Place, None] = {}  # in the order in which they were taken
        self._place_seconds = PLACE_SECONDS_AT_FIRST
        self._has_failed = False
        self.overload = Episode(
            "overload_began",
            "overload_ended",
            says="overloaded, requests refused",
            advice="start another gateway, or find out what is slow: gateway_request_seconds and PostgreSQL say it",
        )
        readings_under_way.set_function(lambda: len(self._places))
        place_seconds.set_function(lambda: self._place_seconds)

    def place(self) -> Place:
        """Return a place for a reading; raises Problem when it would not be answered soon."""
        now, under_way = self._clock(), len(self._places)
        if under_way and not self._is_answered_soon(now, under_way):
            raise self._refusal(under_way)
        place = Place(self, now, under_way)
        self._places[place] = None
        return place

    def leave(self, place: Place, error: BaseException | None) -> None:
        """Learn from a reading that has ended, however it has."""
        del self._places[place]
        took = (self._clock() - place.at) / (place.others + 1)
        self._place_seconds += (took - self._place_seconds) * LEARNING_SHARE
        self._has_failed = error is not None and not isinstance(error, Problem)

    async def check(self) -> str | None:
        """Say for readiness whether requests are refused; those that are not are answered in time."""
        return self.overload.note()

    def _is_answered_soon(self, now: float, under_way: int) -> bool:
        if (under_way + 1) * self._place_seconds <= WAIT_SECONDS_MAX or under_way < self._at_once_max:
            return True
        waits = now - next(iter(self._places)).at
        return (under_way < FEW and waits < FEW_SECONDS) or (under_way < BURST_MAX and waits < BURST_SECONDS)

    def _refusal(self, under_way: int) -> Problem:
        refused("overload")
        if self._has_failed:  # not too many requests are the matter, but that nothing answers them
            return Problem(problems.DATABASE_UNAVAILABLE, "Portfolios cannot be read now. Try again soon.")
        self.overload.refuse(under_way=under_way, place_ms=round(self._place_seconds * 1000, 2))
        return Problem(problems.OVERLOADED, "There is more to do than can be done in time. Try again soon.")
