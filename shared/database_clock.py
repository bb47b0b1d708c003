"""The clock that all replicas share: PostgreSQL's. A machine whose own clock is wrong goes by it."""

import asyncio
import time
from datetime import datetime, timedelta

from prometheus_client import Gauge

from shared import clock, health, logs
from shared.clock import Now
from shared.database import STATEMENT_TIMEOUT_SECONDS, Connection, Database, DatabaseUnavailable

READ_SECONDS = 5.0
RETRY_SECONDS = 0.5
APART_MAX = timedelta(seconds=2)
"""How far the own clock may be from the database's and still be gone by; more than reading it can be wrong."""
ROUND_TRIP_SECONDS_MAX = 1.0
"""An answer that took longer says too little: it is from some moment in between."""
UNKNOWN_SECONDS_MAX = 10.0
"""After that long without a first reading somebody must see to it: no timer begins, and no feeder, without one."""

apart_seconds = Gauge(
    "foliotick_clock_apart_seconds", "How far the clock is ahead of PostgreSQL's when last read"
)

log = logs.get_logger()


def _steady() -> float:
    """Return seconds of a clock that nobody sets, and that counts while the machine is asleep as well."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def _reading(connection: Connection) -> tuple[datetime, float, float]:
    """Return the database's time, and when it was asked and answered; what a connection was waited for is no part."""
    asked = _steady()
    at = await connection.fetchval("SELECT clock_timestamp()", timeout=STATEMENT_TIMEOUT_SECONDS)
    return at, asked, _steady()


class DatabaseClock:
    """Tells the time by the own clock while that agrees with the database's, and by the database's else.

    A leap of the own clock is noticed at once, without asking: a clock that nobody sets carries the last reading on.
    While the database is away that goes on for as long as it takes.
    """

    def __init__(self, database: Database, *, own: Now = clock.utc_now) -> None:
        self._database = database
        self._own = own
        self._known = asyncio.Event()
        self._read_at = own()
        self._steady_at = _steady()
        self._is_wrong = False
        self._why_unknown = ""
        self._is_unknown_said = False

    def now(self) -> datetime:
        """Return the time that all replicas have; before the first reading the own one."""
        own = self._own()
        if not self._known.is_set():
            return own
        shared = self._carried_on()
        return own if abs(own - shared) <= APART_MAX else shared

    async def wait_until_known(self, stop: asyncio.Event) -> bool:
        """Wait for the first reading; return False when `stop` is set first."""
        while not stop.is_set() and not self._known.is_set():
            try:
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._known.wait()
            except TimeoutError:
                continue
        return not stop.is_set()

    async def keep(self, stop: asyncio.Event) -> None:
        """Read the database's clock every few seconds, until `stop` is set."""
        began_at = _steady()
        while not stop.is_set():
            is_read = await self.read()
            self._say_unknown(_steady() - began_at)
            await clock.wait_for_stop(stop, READ_SECONDS if is_read else RETRY_SECONDS)

    async def read(self) -> bool:
        """Read the database's clock once; tell whether that was possible."""
        try:
            at, asked, answered = await self._database.run(_reading)
        except DatabaseUnavailable as error:
            self._why_unknown = str(error)
            return False
        if answered - asked > ROUND_TRIP_SECONDS_MAX:
            self._why_unknown = f"the answer took {answered - asked:.1f} s"
            return False
        self._read_at, self._steady_at = at, (asked + answered) / 2
        self._known.set()
        self._say_apart(self._own() - self._carried_on())
        return True

    async def check(self) -> str | None:
        """Say when the own clock does not agree with the database's. For readiness: which one is wrong is not known."""
        if not self._known.is_set():
            if self._is_unknown_said:
                return health.Degraded(f"PostgreSQL's clock cannot be read: {self._why_unknown}")
            return health.Note("not compared with PostgreSQL's yet")
        apart = self._own() - self._carried_on()
        if abs(apart) <= APART_MAX:
            return None
        return health.Degraded(f"the clock is {apart.total_seconds():+.0f} s ahead of PostgreSQL's")

    def _carried_on(self) -> datetime:
        return self._read_at + timedelta(seconds=_steady() - self._steady_at)

    def _say_unknown(self, seconds: float) -> None:
        if self._is_unknown_said and self._known.is_set():
            self._is_unknown_said = False
            log.info("clock_known")
        elif not self._known.is_set() and not self._is_unknown_said and seconds > UNKNOWN_SECONDS_MAX:
            self._is_unknown_said = True
            log.warning(
                "clock_unknown",
                reason=self._why_unknown,
                advice="see why PostgreSQL answers so late, or not at all; nothing begins without its time",
            )

    def _say_apart(self, apart: timedelta) -> None:
        apart_seconds.set(apart.total_seconds())
        was_wrong, self._is_wrong = self._is_wrong, abs(apart) > APART_MAX
        if self._is_wrong and not was_wrong:
            log.warning(
                "clock_wrong",
                seconds_ahead=round(apart.total_seconds(), 1),
                advice="let NTP set the clock; until then this goes by PostgreSQL's, which may be the wrong one",
            )
        elif was_wrong and not self._is_wrong:
            log.info("clock_right_again")
