"""Reads from a replica of PostgreSQL while it is known to be little behind the primary, else from the primary.

How far it is behind is known from both: about once a second the primary says how much log it has written, and the
replica how much of it it has replayed. The replica shows everything up to the newest of those moments that it has
passed; the lag is the time since then. So it grows when the replica stands still, and also when either of the two
cannot be asked; an idle primary is not mistaken for a lagging replica, nor a replica that is cut off for a current one.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from prometheus_client import Counter, Gauge

from services.api_gateway import queries
from services.api_gateway.queries import PrimaryPosition, ReplicaPosition, Row, Source
from services.api_gateway.settings import Settings
from shared import database as databases
from shared import health, logs
from shared.database import SCHEMA_REVISION, Database, DatabaseUnavailable, NewConnection, SchemaMissing
from shared.deadlines import Deadlines

LOOK_SECONDS = 1.0
"""Between two looks at where the servers are; less when the lag may not be much more than that."""
LOOKS_PER_LAG = 5
LOOK_PAUSE_SECONDS = 0.05
"""Between two looks when somebody waits for the replica to get somewhere."""
ANSWER_SECONDS_MAX = 1.0
"""What a read waits for the replica before it goes to the primary. A statement takes milliseconds, but for a chart of
which nothing is cached yet."""
AWAY_SECONDS_MIN, AWAY_SECONDS_MAX = 1.0, 60.0
"""How long a replica that failed a read is left alone; twice as long each time that it soon fails again."""
MOMENTS_MAX = 600
CLOSE_SECONDS_MAX = 1.0

T = TypeVar("T")
log = logs.get_logger()
lag_seconds = Gauge(
    "gateway_read_replica_lag_seconds",
    "How far the read replica is behind at most; +Inf while it is not known, NaN without a replica",
)
lag_seconds.set(math.nan)
reads = Counter(
    "gateway_reads", "Rows read while there is a read replica, by the server they came from", ["from"]
)
_reads_from_primary, _reads_from_replica = reads.labels("primary"), reads.labels("replica")


class _Moment(NamedTuple):
    at: float
    """Monotonic seconds; whatever was committed before is in the log written."""
    written: int


class Progress:
    """What is known of a replica: until when it shows everything."""

    def __init__(self) -> None:
        self._moments: deque[_Moment] = deque()  # of the primary, from the one that the replica has passed on
        self._log: tuple[int, int] | None = None  # the cluster and the timeline that the moments belong to
        self._passed: _Moment | None = None

    def lag_seconds(self, now: float) -> float:
        return now - self._passed.at if self._passed else math.inf

    def shows(self, moment: float) -> bool:
        """Tell whether the replica is known to show all that was committed before that moment."""
        return self._passed is not None and self._passed.at >= moment

    @property
    def replayed_min(self) -> int:
        """What a server has replayed at least that can show what this one shows."""
        return self._passed.written if self._passed else 0

    def forget(self) -> None:
        """Know nothing of the replica any more; the primary's moments stay good."""
        self._passed = None

    def primary_was(self, at: float, position: PrimaryPosition) -> None:
        """Learn where the primary was, asked at `at` or later."""
        if self._log != (position.cluster, position.timeline):  # another primary, after a failover say
            self._log = position.cluster, position.timeline
            self._moments.clear()
            self._passed = None
        self._moments.append(_Moment(at, position.written))
        if (
            len(self._moments) > MOMENTS_MAX
        ):  # far behind: the lag is then overstated until it is past the gap
            del self._moments[1]

    def replica_is(self, position: ReplicaPosition) -> str | None:
        """Learn where the replica is; return None, or why it does not count as one."""
        self._passed = None  # it may have gone back: a restart begins where the last checkpoint was
        if not position.is_replica:
            return "it is no replica; was it promoted?"
        if self._log is None:
            return "the primary has not been reached yet"
        cluster, timeline = self._log
        if position.cluster != cluster:
            return "it belongs to another cluster than the primary"
        if position.timeline != timeline:
            return f"it is on timeline {position.timeline}, the primary on {timeline}"
        if position.schema_revision is None or position.schema_revision < SCHEMA_REVISION:
            return f"its schema is {position.schema_revision or 'empty'}, needed is {SCHEMA_REVISION}"
        while len(self._moments) > 1 and self._moments[1].written <= position.replayed:
            self._moments.popleft()
        if self._moments[0].written <= position.replayed:
            self._passed = self._moments[0]
        return None


class Reads:
    """Reads rows from the replica where that is good, and from the primary where it is not.

    Raises what the primary's Database raises; nothing that goes wrong with the replica gets past.
    """

    def __init__(self, primary: Database, *, lag_seconds_max: float) -> None:
        self._primary = primary
        self._replica: Database | None = None
        self._lag_seconds_max = lag_seconds_max
        self._progress = Progress()
        self._problem: str | None = None
        self._is_used = False
        self._is_left = False  # and it was said why
        self._used_since = -math.inf
        self._away_until = -math.inf
        self._away_seconds = AWAY_SECONDS_MIN
        self._wanted = asyncio.Event()
        self._deadlines = Deadlines(ANSWER_SECONDS_MAX, _give_up)
        self._abandoned: set[asyncio.Task[Any]] = set()

    # ---- reading -------------------------------------------------------------------------------------

    async def fetch_row(self, statement: str, *args: object) -> Row | None:
        """Read from the replica; from the primary when it fails, is late or has no such row yet."""
        if self.is_near():
            assert self._replica is not None
            try:
                row = await self._in_time(self._replica.fetch_row(statement, *args))
            except (DatabaseUnavailable, SchemaMissing) as error:
                self._fail(f"a read failed: {error}")
            except TimeoutError:
                self._fail(f"a read took more than {ANSWER_SECONDS_MAX:g} s")
            else:
                if row is not None:
                    _reads_from_replica.inc()
                    return row
        return await self.fetch_row_from_primary(statement, *args)

    async def fetch_row_from_primary(self, statement: str, *args: object) -> Row | None:
        _reads_from_primary.inc()
        return await self._primary.fetch_row(statement, *args)

    def showing(self, moment: float) -> Source:
        """Return what shows all that was committed before that moment, in monotonic seconds."""
        if self._progress.shows(moment):
            return self
        if self.is_near():
            self._wanted.set()  # it is about to show it
        return _Primary(self)

    def is_near(self) -> bool:
        """Tell whether the replica is in use, and known to be near enough behind at this very moment."""
        return self._is_used and self.lag_seconds() <= self._lag_seconds_max

    def lag_seconds(self) -> float:
        return self._progress.lag_seconds(time.monotonic())

    async def check(self) -> str | None:
        """Say for readiness how the replica is; the gateway is ready without it."""
        if self.is_near():
            return None
        return health.Degraded(f"not used: {self._problem or 'it is not known yet'}")

    # ---- watching ------------------------------------------------------------------------------------

    async def watch(self, replica: Database) -> None:
        """Look where both servers are, now and then, until cancelled."""
        self._replica = replica
        pause = min(LOOK_SECONDS, self._lag_seconds_max / LOOKS_PER_LAG)
        while True:
            await self._look(replica)
            await asyncio.sleep(LOOK_PAUSE_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause - LOOK_PAUSE_SECONDS):
                    await self._wanted.wait()
            self._wanted.clear()

    async def _look(self, replica: Database) -> None:
        at = time.monotonic()
        with suppress(DatabaseUnavailable, TimeoutError):  # its silence shows as lag
            position = await self._in_time(queries.primary_position(self._primary))
            self._progress.primary_was(at, position)
        try:
            found = await self._in_time(queries.replica_position(replica))
            problem = self._progress.replica_is(found)
        except (DatabaseUnavailable, SchemaMissing) as error:
            problem = str(error)
        except TimeoutError:
            problem = f"no answer within {ANSWER_SECONDS_MAX:g} s"
        lag = self.lag_seconds()
        if problem is None and lag > self._lag_seconds_max:
            problem = f"it is {lag:.1f} s behind" if lag < math.inf else "it is behind, not known how far"
        if problem is not None:
            self._leave(problem)
        # It must have caught up well, so that it is not taken and left in turns.
        elif not self._is_used and lag <= self._lag_seconds_max / 2 and at >= self._away_until:
            self._use(lag)

    def _use(self, lag: float) -> None:
        self._is_used, self._is_left, self._problem = True, False, None
        self._used_since = time.monotonic()
        log.info("read_replica_used", lag_seconds=round(lag, 3))

    def _leave(self, problem: str) -> None:
        self._is_used, self._problem = False, problem
        if not self._is_left:
            self._is_left = True
            log.warning(
                "read_replica_left",
                reason=problem,
                advice="mend what the reason names; the primary carries all reads meanwhile",
            )

    def _fail(self, problem: str) -> None:
        """Leave the replica alone for a while: a read of it failed."""
        if not self._is_used:  # the first of many that failed together has said it
            return
        now = time.monotonic()
        soon = now - self._used_since < AWAY_SECONDS_MAX
        self._away_seconds = min(self._away_seconds * 2, AWAY_SECONDS_MAX) if soon else AWAY_SECONDS_MIN
        self._away_until = now + self._away_seconds
        self._leave(problem)

    async def admit(self, connection: NewConnection) -> None:
        """Refuse a new connection unless what is known of the replica holds for the server at its other end.

        That may be a server which has just started anew, from its last checkpoint on. From here on it only goes ahead.
        """
        replayed_min = self._progress.replayed_min
        replayed = await queries.replayed(connection)
        if replayed_min and (replayed is None or replayed < replayed_min):
            self._progress.forget()
            raise DatabaseUnavailable("it went back, or is another server")

    # ---- waiting no longer than that -----------------------------------------------------------------

    async def _in_time(self, reading: Coroutine[Any, Any, T]) -> T:
        """Wait for the outcome, or raise TimeoutError at once when the time is over; half of what `asyncio.wait` costs.

        The cancelled statement of a frozen server takes seconds to end: it does so by itself.
        """
        task = asyncio.create_task(reading)
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task.add_done_callback(lambda _: _give_up(over))
        self._deadlines.start(over)
        try:
            await over
        finally:
            self._deadlines.end(over)
            if not task.done():
                task.cancel()
                self._abandoned.add(task)
                task.add_done_callback(self._bury)
        if not task.done():
            raise TimeoutError
        return task.result()

    def _bury(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()  # nobody asks for it any more

    async def close(self) -> None:
        """Wait a little for what was abandoned; the pools are closed, so that it ends."""
        if self._abandoned:
            await asyncio.wait(self._abandoned, timeout=CLOSE_SECONDS_MAX)


def _give_up(over: asyncio.Future[None]) -> None:
    """End the wait; whether it was in vain is seen from what was waited for."""
    if not over.done():
        over.set_result(None)


class _Primary:
    """The primary as a source, its reads counted."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    async def fetch_row(self, statement: str, *args: object) -> Row | None:
        return await self._reads.fetch_row_from_primary(statement, *args)


def showing(source: Source, moment: float) -> Source:
    """Return what shows all that was committed before that moment, in monotonic seconds: a primary always does."""
    return source.showing(moment) if isinstance(source, Reads) else source


@asynccontextmanager
async def reading(settings: Settings, primary: Database) -> AsyncIterator[Database | Reads]:
    """Watch the replica, if there is one, while the block runs, and yield what to read from.

    The replica has a pool of its own. The block's error comes out in an exception group.
    """
    if settings.database_read_url is None:
        yield primary
        return
    source = Reads(primary, lag_seconds_max=settings.read_replica_lag_seconds_max)
    lag_seconds.set_function(source.lag_seconds)
    try:
        async with (
            databases.connect(
                settings.database_read_url.get_secret_value(),
                application_name="api_gateway_reads",
                connections_max=settings.gateway_database_connections,
                statement_timeout_seconds=databases.STATEMENT_TIMEOUT_SECONDS,
                server_settings=queries.SERVER_SETTINGS,
                reads_only=True,
                admit=source.admit,
            ) as replica,
            asyncio.TaskGroup() as tasks,
        ):
            watching = tasks.create_task(source.watch(replica))
            try:
                yield source
            finally:
                watching.cancel()
    finally:
        lag_seconds.set_function(lambda: math.nan)
        await source.close()
