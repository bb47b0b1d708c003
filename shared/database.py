"""PostgreSQL: a pool as a context manager, deadlines on every statement, and what counts as unavailable."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar
from weakref import WeakSet

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from asyncpg.transaction import Transaction
from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from shared import clock, logs
from shared.deadlines import Deadlines
from shared.hosts import Hosts, NoPrimary, ServerConnection, hosts_of

SCHEMA_REVISION = "0003"
"""The migration that this code needs; a database may be ahead of it."""

CONNECT_TIMEOUT_SECONDS = 2.5
"""What a statement waits for its connection at most: for its turn, and for a new one to be made."""
STATEMENT_TIMEOUT_SECONDS = 2.0
CANCEL_SECONDS_MAX = 1.0
"""How long a server may take to confirm that a statement was cut off; then its connection is ended."""
CHECK_TIMEOUT_SECONDS = 1.0
CLOSE_SECONDS_MAX = 1.0
"""What connections may take to close at the end; those of a server that does not answer are then ended."""
WATCH_SECONDS = 2.0
"""How often a pool of several servers sees whether its primary answers."""
LOOK_EVERY_SECONDS = 30.0
"""How often it sees whether another one has become the primary, although its own answers."""
IDLE_SECONDS_MAX = 300.0
"""A connection that nobody has used for so long is ended."""

LISTEN_CHECK_SECONDS = 1.0
LISTEN_PAUSE_SECONDS = 0.5
"""Between two attempts to listen again."""
_KEEPALIVE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}

Connection = PoolConnectionProxy
NewConnection: TypeAlias = ServerConnection
"""One that the pool does not lend yet."""
T = TypeVar("T")
log = logs.get_logger()
unavailable = Counter(
    "database_unavailable",
    "Statements that PostgreSQL did not carry out, by pool and reason",
    ["pool", "reason"],
)
second_tries = Counter(
    "database_second_tries", "Statements that were tried once more, as their connection was gone", ["pool"]
)
turn_seconds = Histogram(
    "database_turn_seconds",
    "Time that statements waited for a connection while all were in use",
    ["pool"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, CONNECT_TIMEOUT_SECONDS),
)


class DatabaseUnavailable(Exception):
    """PostgreSQL did not answer, refused, or dropped the statement; the same call may succeed later."""


class SchemaMissing(Exception):
    """The database lacks the tables that this code needs."""


# The statement may have been cut off half way: connection lost, shutdown, failover, conflict, no room.
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.InterfaceError,
    asyncpg.PostgresSystemError,
    asyncpg.InvalidCachedStatementError,  # inside a transaction, after a migration; else the driver prepares it anew
    NoPrimary,
)
# Programming errors that asyncpg derives from InterfaceError.
_NOT_UNAVAILABLE = (ValueError, asyncpg.UnsupportedClientFeatureError)
# A connection of the pool whose other end has gone: worth one immediate second try on a fresh one.
_CONNECTION_GONE = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InternalClientError,
)
# One that has ended without that being read yet, or whose server is a primary no more.
_USELESS = (asyncpg.InternalClientError, asyncpg.ReadOnlySQLTransactionError)
_CUT_OFF = (TimeoutError, asyncio.CancelledError)
_CANNOT_WRITE = (asyncpg.ReadOnlySQLTransactionError, asyncpg.DiskFullError, asyncpg.PostgresSystemError)
_SCHEMA_MISSING = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError)
# In metrics: the first that fits.
_REASONS: tuple[tuple[str, tuple[type[Exception], ...]], ...] = (
    ("no_answer", (TimeoutError, asyncpg.QueryCanceledError)),
    ("no_primary", (NoPrimary,)),
    ("read_only", (asyncpg.ReadOnlySQLTransactionError,)),
    ("starting_or_stopping", (asyncpg.OperatorInterventionError,)),
    ("no_room", (asyncpg.InsufficientResourcesError, asyncpg.PostgresSystemError)),
    (
        "conflict",
        (
            asyncpg.TransactionRollbackError,
            asyncpg.ObjectNotInPrerequisiteStateError,
            asyncpg.InvalidCachedStatementError,
        ),
    ),
    (
        "refused",
        (
            ConnectionRefusedError,
            asyncpg.InvalidAuthorizationSpecificationError,
            asyncpg.InvalidCatalogNameError,
        ),
    ),
    ("lost", (Exception,)),
)


class _Connection(asyncpg.Connection):
    async def close(self, *, timeout: float | None = None) -> None:
        """Close, or else end, the connection: the pool closes some in tasks of its own, whose failure nobody awaits."""
        with suppress(*_UNAVAILABLE):
            await super().close(timeout=timeout)


class _NoTurn(TimeoutError):
    """All connections were in use for too long."""


def _named(error: Exception) -> Exception:
    """Turn the driver's many errors into the two that callers can act on; a bug stays as it is."""
    if isinstance(error, _NOT_UNAVAILABLE):
        return error
    if isinstance(error, _SCHEMA_MISSING):
        return SchemaMissing(f"{error}: run `alembic upgrade head`")
    if isinstance(error, _UNAVAILABLE):
        return DatabaseUnavailable(_words(error))
    return error


def _words(error: Exception) -> str:
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def _reason(error: Exception) -> str:
    if isinstance(error, _NoTurn):
        return "no_turn"
    return next(reason for reason, kinds in _REASONS if isinstance(error, kinds))


class Database:
    """A pool of connections; every statement has a deadline, and one second try when its connection was gone.

    All statements of this project may run twice without harm, which makes the second try safe. Both tries together,
    with the wait for a connection, take no longer than CONNECT_TIMEOUT_SECONDS and the statement's own timeout.
    Methods raise DatabaseUnavailable or SchemaMissing; any other error is a bug in the statement or its data.
    """

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        hosts: Hosts,
        connections_max: int,
        *,
        name: str,
        keeps_connections: bool,
        answer_seconds_max: float,
    ) -> None:
        self._pool = pool
        self._hosts = hosts
        self.name = name
        self.connections_max = connections_max
        self._answer_seconds_max = answer_seconds_max
        self._turns_free = connections_max
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._patience = Deadlines(CONNECT_TIMEOUT_SECONDS, _give_up)
        self._turn_seconds = turn_seconds.labels(name)
        # The pool makes two tasks and three timers of each lending. Connections that need no reset are therefore not
        # returned to it after a statement that went well, but handed to the next statement. Those kept and those
        # at work are together never more than `connections_max`, so the pool always has one for whoever gets none.
        self._keeps_connections = keeps_connections
        self._kept: list[Connection] = []
        self._idle = Deadlines(IDLE_SECONDS_MAX, self._end)
        self._clearing: set[asyncio.Task[None]] = set()
        self._cannot_write: str | None = None
        self.watching: asyncio.Task[None] | None = None

    async def fetch(
        self, statement: str, *args: object, timeout: float | None = None
    ) -> list[asyncpg.Record]:
        seconds = timeout or self._answer_seconds_max
        return await self.run(lambda connection: connection.fetch(statement, *args, timeout=seconds), seconds)

    async def fetch_row(
        self, statement: str, *args: object, timeout: float | None = None
    ) -> asyncpg.Record | None:
        seconds = timeout or self._answer_seconds_max
        return await self.run(
            lambda connection: connection.fetchrow(statement, *args, timeout=seconds), seconds
        )

    async def fetch_value(self, statement: str, *args: object, timeout: float | None = None) -> Any:
        seconds = timeout or self._answer_seconds_max
        return await self.run(
            lambda connection: connection.fetchval(statement, *args, timeout=seconds), seconds
        )

    async def run(
        self, work: Callable[[Connection], Awaitable[T]], seconds_max: float = STATEMENT_TIMEOUT_SECONDS
    ) -> T:
        """Run `work` with a connection of the pool; twice when the first connection turned out to be gone.

        `work` sees to it that it takes no longer than `seconds_max`.
        """
        self._see_to_watching()
        began_at = time.monotonic()
        try:
            try:
                return await self._attempt(work, began_at)
            except _CONNECTION_GONE:
                await self._find_gone()
                remaining = began_at + CONNECT_TIMEOUT_SECONDS + seconds_max - time.monotonic()
                async with asyncio.timeout(remaining):
                    return await self._attempt(work, time.monotonic())
        except Exception as error:
            self._raise(error)

    def _see_to_watching(self) -> None:
        if self.watching is not None and self.watching.done():
            self.watching.result()  # it ends by a bug alone, which must not stay unseen

    async def _attempt(self, work: Callable[[Connection], Awaitable[T]], began_at: float) -> T:
        connection = await self._borrow(began_at)
        try:
            result = await work(connection)
        except BaseException as error:
            await self._return_after(error, connection)
            raise
        if self._keeps_connections:
            self._pass_turn(connection)
        else:
            await self._give_back(connection)
        return result

    def _raise(self, error: Exception) -> NoReturn:
        """Raise the error under the name that callers can act on, and remember what operators want to see."""
        named = _named(error)
        if named is not error and isinstance(named, DatabaseUnavailable):
            unavailable.labels(self.name, _reason(error)).inc()
            if isinstance(error, _CANNOT_WRITE):
                self._cannot_write = str(named)
        if named is error:
            raise error
        raise named from error

    async def _borrow(self, began_at: float) -> Connection:
        """Wait for a turn, and return a connection; whoever gets it gives it back or passes it on."""
        kept = await self._turn()
        if kept is not None and _is_open(kept):
            return kept
        try:
            if kept is not None:
                await self._release(kept)
            return await self._pool.acquire(timeout=began_at + CONNECT_TIMEOUT_SECONDS - time.monotonic())
        except BaseException:
            self._pass_turn(None)
            raise

    async def _release(self, connection: Connection) -> None:
        """Let the pool have its connection back; it ends one that it cannot clean in time."""
        with suppress(*_UNAVAILABLE):
            await self._pool.release(connection, timeout=CANCEL_SECONDS_MAX)

    async def _give_back(self, connection: Connection) -> None:
        """Return the connection to the pool, and pass the turn."""
        try:
            await self._release(connection)
        finally:
            self._pass_turn(None)

    async def _return_after(
        self, error: BaseException, connection: Connection, transaction: Transaction | None = None
    ) -> None:
        """Return a connection on which `error` happened, its transaction undone."""
        if isinstance(error, _CUT_OFF):
            # The server is told, which takes seconds if it is frozen: nobody waits for that.
            clearing = asyncio.create_task(self._clear(connection, transaction))
            self._clearing.add(clearing)
            clearing.add_done_callback(self._clearing.discard)
            return
        try:
            if isinstance(error, _USELESS):
                _terminate(connection)
            elif transaction is not None and _is_open(connection):
                # Where this fails, the server has undone it already.
                with suppress(*_UNAVAILABLE):
                    await transaction.rollback()
        finally:
            await self._give_back(connection)
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            await self._hosts.look()

    async def _clear(self, connection: Connection, transaction: Transaction | None) -> None:
        """Return a connection whose statement was cut off. If its server is silent, all idle ones are ended as well."""
        try:
            async with asyncio.timeout(CANCEL_SECONDS_MAX):
                if transaction is not None and _is_open(connection):
                    await transaction.rollback()
                await self._pool.release(connection)
        except _UNAVAILABLE:
            _terminate(connection)
            await self._end_idle()
        finally:
            await self._give_back(connection)
        await self._hosts.look()

    async def _turn(self) -> Connection | None:
        """Wait for a turn, in the order of arrival; return the kept connection that comes with it, if there is one.

        The pool's own queue lets newcomers overtake those who wait, some of them for ever.
        """
        if self._turns_free > 0:
            self._turns_free -= 1
            if not self._kept:
                return None
            connection = self._kept.pop()  # the one used last, so that those not needed become old
            self._idle.end(connection)
            return connection
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._patience.start(waiter)
        since = time.monotonic()
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self._pass_turn(waiter.result())  # it came together with the cancellation
            raise
        finally:
            self._patience.end(waiter)
            self._turn_seconds.observe(time.monotonic() - since)

    def _pass_turn(self, connection: Connection | None) -> None:
        """End a turn: it goes, with its connection, to the first who waits."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._turns_free += 1
        if connection is not None:
            self._kept.append(connection)
            self._idle.start(connection)

    def _end(self, connection: Connection) -> None:
        """End a kept connection that has been idle for too long."""
        self._kept.remove(connection)
        if _is_open(connection):
            connection.terminate()

    async def _find_gone(self) -> None:
        """Prepare for a second try after a connection was found to be gone."""
        second_tries.labels(self.name).inc()
        await self._end_idle()

    async def _end_idle(self) -> None:
        """End all connections that are not in use: what has ended one of them has most likely ended them all."""
        for connection in self._kept[:]:
            self._idle.end(connection)
            self._end(connection)
        await self._pool.expire_connections()

    async def close(self) -> None:
        """Wait until all statements have ended, and close the pool."""
        self._keeps_connections = False
        while self._kept:
            connection = self._kept.pop()
            self._idle.end(connection)
            await self._release(connection)
        if self._clearing:
            await asyncio.wait(self._clearing)
        await self._pool.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Hold a connection inside a transaction that commits at the end of the block."""
        self._see_to_watching()
        try:
            connection, transaction = await self._begin()
            try:
                yield connection
            except BaseException as error:
                await self._return_after(error, connection, transaction)
                raise
            try:
                await transaction.commit()
            except BaseException as error:
                await self._return_after(error, connection)
                raise
            await self._give_back(connection)
        except Exception as error:
            self._raise(error)

    async def transact(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` in a transaction of its own; twice when the connection was gone, so it must do no harm twice."""

        async def attempt() -> T:
            async with self.transaction() as connection:
                return await work(connection)

        try:
            return await attempt()
        except DatabaseUnavailable as error:
            # Between two statements the driver says of a lost connection that it is closed, which is an InterfaceError.
            if not isinstance(error.__cause__, (*_CONNECTION_GONE, asyncpg.InterfaceError)):
                raise
        return await attempt()

    async def _begin(self) -> tuple[Connection, Transaction]:
        """Borrow a connection and begin a transaction on it; on another one when the first turned out to be gone."""
        began_at = time.monotonic()
        try:
            return await self._begin_on(await self._borrow(began_at))
        except _CONNECTION_GONE:
            await self._find_gone()
            return await self._begin_on(await self._borrow(began_at))

    async def _begin_on(self, connection: Connection) -> tuple[Connection, Transaction]:
        transaction = connection.transaction()
        try:
            await transaction.start()
        except BaseException as error:
            _terminate(connection)  # the pool would mind the transaction that has half begun
            await self._return_after(error, connection)
            raise
        return connection, transaction

    @property
    def connections_open(self) -> int:
        return self._pool.get_size()

    @property
    def connections_idle(self) -> int:
        return self._pool.get_idle_size() + len(self._kept)

    async def check(self) -> str | None:
        """Return None when the database does what this pool is for, else why not. For readiness."""
        try:
            is_read_only = await self.fetch_value(_IS_READ_ONLY, timeout=CHECK_TIMEOUT_SECONDS)
        except DatabaseUnavailable as error:
            return str(error)
        if self._keeps_connections:  # which only reads
            return None
        if is_read_only:
            return "cannot write: the server is read-only"
        if self._cannot_write is not None:
            await self._try_to_write()
        return self._cannot_write and f"cannot write: {self._cannot_write}"

    async def _try_to_write(self) -> None:
        """See whether writing is possible again: a service that writes seldom would not learn of it for minutes."""
        try:
            await self.fetch(_WRITE, timeout=CHECK_TIMEOUT_SECONDS)
        except DatabaseUnavailable as error:
            self._cannot_write = str(error)
        except asyncpg.InsufficientPrivilegeError:
            self._cannot_write = (
                None  # it may make no temporary tables: the next statement that writes will tell
            )
        else:
            self._cannot_write = None

    async def check_schema(self) -> str | None:
        """Return None when the schema is at least the one that this code needs, else what is missing."""
        try:
            revision = await self.fetch_value(
                "SELECT max(version_num) FROM alembic_version", timeout=CHECK_TIMEOUT_SECONDS
            )
        except SchemaMissing:
            revision = None
        except DatabaseUnavailable as error:
            return str(error)
        if revision is None or revision < SCHEMA_REVISION:
            return f"schema is {revision or 'empty'}, needed is {SCHEMA_REVISION}: run `alembic upgrade head`"
        return None


_IS_READ_ONLY = "SELECT current_setting('transaction_read_only')::boolean"
# A megabyte, so that it needs room on the disk and not only in a page that is there; nothing of it stays.
_WRITE = """
CREATE TEMPORARY TABLE room ON COMMIT DROP AS SELECT number FROM generate_series(1, 30000) AS number
"""
_open_pools: WeakSet[Database] = WeakSet()


async def _watch(database: Database, hosts: Hosts) -> None:
    """Follow the primary also while nobody connects, or while all wait for one that does not answer."""
    looked_at = time.monotonic()
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        problem = await database.check()
        if problem is not None or time.monotonic() - looked_at > LOOK_EVERY_SECONDS:
            looked_at = time.monotonic()
            await hosts.look()


class _Connections(Collector):
    """Counts the connections of all pools when somebody asks."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = GaugeMetricFamily(
            "database_connections", "Connections to PostgreSQL, by pool and state", labels=["pool", "state"]
        )
        bounds = GaugeMetricFamily(
            "database_connections_max", "The most connections that a pool opens", labels=["pool"]
        )
        for database in list(_open_pools):
            idle = database.connections_idle
            counts.add_metric([database.name, "in_use"], database.connections_open - idle)
            counts.add_metric([database.name, "idle"], idle)
            bounds.add_metric([database.name], database.connections_max)
        yield counts
        yield bounds


REGISTRY.register(_Connections())


def _give_up(waiter: asyncio.Future[Connection | None]) -> None:
    if not waiter.done():
        waiter.set_exception(_NoTurn("no connection became free in time"))


def _terminate(connection: Connection) -> None:
    if _is_open(connection):
        connection.terminate()


def _is_open(connection: Connection) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:  # it has ended, and the pool has taken it back
        return False


async def _leave_as_it_is(_: object) -> None:
    """Reset nothing: single reading statements leave no lock, cursor, listener or setting behind."""


@asynccontextmanager
async def connect(
    url: str,
    *,
    application_name: str,
    connections_max: int,
    statement_timeout_seconds: float = 30.0,
    server_settings: Mapping[str, str] | None = None,
    answer_seconds_max: float = STATEMENT_TIMEOUT_SECONDS,
    reads_only: bool = False,
    admit: Callable[[NewConnection], Coroutine[Any, Any, None]] | None = None,
) -> AsyncIterator[Database]:
    """Open a pool that connects when it is first used, so that a service can start before its database.

    `answer_seconds_max` is what a statement may take unless it says otherwise; `statement_timeout_seconds` is the
    server's own bound, for statements whose client has gone. With `reads_only`
    the server refuses to write, and a connection goes to the next statement without the reset that costs a round trip.
    `admit` sees every new connection first; what it raises ends the connection, and the statement that wanted it.
    """
    hosts = hosts_of(url)

    async def make_connection(dsn: str | None = None, **options: Any) -> NewConnection:  # noqa: ARG001 - the pool's
        return await hosts.connect(**options)

    pool = asyncpg.create_pool(
        url,
        connect=make_connection,
        connection_class=_Connection,
        min_size=0,
        max_size=connections_max,
        max_inactive_connection_lifetime=IDLE_SECONDS_MAX,
        timeout=CONNECT_TIMEOUT_SECONDS,
        command_timeout=answer_seconds_max,
        server_settings={
            "application_name": application_name,
            "timezone": "UTC",
            "jit": "off",
            "statement_timeout": f"{int(statement_timeout_seconds * 1000)}ms",
            "idle_in_transaction_session_timeout": f"{int(statement_timeout_seconds * 1000)}ms",
            **_KEEPALIVE,
            **({"default_transaction_read_only": "on"} if reads_only else {}),
            **(server_settings or {}),
        },
        reset=_leave_as_it_is if reads_only else None,
        init=admit,
    )
    async with pool:
        database = Database(
            pool,
            hosts,
            connections_max,
            name=application_name,
            keeps_connections=reads_only,
            answer_seconds_max=answer_seconds_max,
        )
        _open_pools.add(database)
        if hosts.are_several:
            database.watching = asyncio.create_task(_watch(database, hosts))
        try:
            yield database
        finally:
            _open_pools.discard(database)
            if (watching := database.watching) is not None:
                database.watching = None
                watching.cancel()
                await asyncio.wait([watching])
            try:
                async with asyncio.timeout(CLOSE_SECONDS_MAX):
                    await database.close()
            except TimeoutError:
                log.warning(
                    "database_pool_terminated",
                    advice="nothing: they were cut; see why PostgreSQL does not answer",
                    reason="connections did not close in time",
                )
                pool.terminate()


class Notified(Protocol):
    """Hears notifications; every method is called in the event loop, must be quick and must not raise."""

    def notified(self, payload: str) -> None:
        """Take a notification: what it tells of is committed."""

    def interrupted(self) -> None:
        """Learn that notifications may have been missed, and may be until `resumed`."""

    def resumed(self) -> None:
        """Learn that from now on every notification is heard."""


async def listen(
    url: str, channel: str, listener: Notified, stop: asyncio.Event, *, application_name: str
) -> None:
    """Let `listener` hear what is notified on the channel, until `stop` is set. Of a primary alone: replicas have none.

    It has a connection of its own, made again whenever it is lost or the server does not answer in time.
    """
    hosts = hosts_of(url)
    problem: str | None = None
    while not stop.is_set():
        connection: NewConnection | None = None
        hears = False
        try:
            connection = await hosts.connect(
                timeout=CONNECT_TIMEOUT_SECONDS,
                command_timeout=CHECK_TIMEOUT_SECONDS,
                server_settings={"application_name": application_name, **_KEEPALIVE},
            )
            await connection.add_listener(
                channel, lambda _connection, _process, _channel, payload: listener.notified(str(payload))
            )
            while not stop.is_set():
                await connection.execute("SELECT")  # answered after all that was notified before
                if not hears:
                    hears, problem = True, None
                    listener.resumed()
                await clock.wait_for_stop(stop, LISTEN_CHECK_SECONDS)
        except Exception as error:
            named = _named(error)
            if not isinstance(named, DatabaseUnavailable):
                raise
            if str(named) != problem:
                problem = str(named)
                log.warning(
                    "notifications_interrupted",
                    advice="see /readyz and PostgreSQL; DATABASE_LISTEN_URL must lead past a pooler",
                    reason=problem,
                )
        finally:
            if hears:
                listener.interrupted()
            if connection is not None:
                connection.terminate()
        await clock.wait_for_stop(stop, LISTEN_PAUSE_SECONDS)
