"""PostgreSQL: a pool as a context manager, deadlines on every statement, and what counts as unavailable."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeAlias, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from shared import clock, logs
from shared.deadlines import Deadlines

SCHEMA_REVISION = "0003"
"""The migration that this code needs; a database may be ahead of it."""

CONNECT_TIMEOUT_SECONDS = 3.0
STATEMENT_TIMEOUT_SECONDS = 2.0
CHECK_TIMEOUT_SECONDS = 1.0
CLOSE_SECONDS_MAX = 1.0
"""What connections may take to close at the end; those of a server that does not answer are then ended."""
IDLE_SECONDS_MAX = 300.0
"""A connection that nobody has used for so long is ended."""

LISTEN_CHECK_SECONDS = 1.0
LISTEN_PAUSE_SECONDS = 0.5
"""Between two attempts to listen again."""
_KEEPALIVE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}

Connection = PoolConnectionProxy
NewConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
"""One that the pool does not lend yet."""
T = TypeVar("T")
log = logs.get_logger()


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
_SCHEMA_MISSING = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError)


def _named(error: Exception) -> Exception:
    """Turn the driver's many errors into the two that callers can act on; a bug stays as it is."""
    if isinstance(error, _NOT_UNAVAILABLE):
        return error
    if isinstance(error, _SCHEMA_MISSING):
        return SchemaMissing(f"{error}: run `alembic upgrade head`")
    if isinstance(error, _UNAVAILABLE):
        return DatabaseUnavailable(str(error) or type(error).__name__)
    return error


class Database:
    """A pool of connections; every statement has a deadline, and one second try when its connection was gone.

    All statements of this project may run twice without harm, which makes the second try safe.
    Methods raise DatabaseUnavailable or SchemaMissing; any other error is a bug in the statement or its data.
    """

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        connections_max: int,
        *,
        keeps_connections: bool,
        answer_seconds_max: float,
    ) -> None:
        self._pool = pool
        self._answer_seconds_max = answer_seconds_max
        self._turns_free = connections_max
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._patience = Deadlines(CONNECT_TIMEOUT_SECONDS, _give_up)
        # The pool makes two tasks and three timers of each lending. Connections that need no reset are therefore not
        # returned to it after a statement that went well, but handed to the next statement. Those kept and those
        # at work are together never more than `connections_max`, so the pool always has one for whoever gets none.
        self._keeps_connections = keeps_connections
        self._kept: list[Connection] = []
        self._idle = Deadlines(IDLE_SECONDS_MAX, self._end)

    async def fetch(
        self, statement: str, *args: object, timeout: float | None = None
    ) -> list[asyncpg.Record]:
        seconds = timeout or self._answer_seconds_max
        return await self.run(lambda connection: connection.fetch(statement, *args, timeout=seconds))

    async def fetch_row(
        self, statement: str, *args: object, timeout: float | None = None
    ) -> asyncpg.Record | None:
        seconds = timeout or self._answer_seconds_max
        return await self.run(lambda connection: connection.fetchrow(statement, *args, timeout=seconds))

    async def fetch_value(self, statement: str, *args: object, timeout: float | None = None) -> Any:
        seconds = timeout or self._answer_seconds_max
        return await self.run(lambda connection: connection.fetchval(statement, *args, timeout=seconds))

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` with a connection of the pool; twice when the first connection turned out to be gone."""
        try:
            try:
                return await self._attempt(work)
            except _CONNECTION_GONE:
                return await self._attempt(work)
        except Exception as error:
            named = _named(error)
            if named is error:
                raise
            raise named from error

    async def _attempt(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        connection = await self._borrow()
        try:
            result = await work(connection)
        except BaseException as error:
            if isinstance(error, asyncpg.InternalClientError):
                connection.terminate()  # the server has ended it, but its end has not been read yet
            await self._give_back(connection)
            raise
        if self._keeps_connections:
            self._pass_turn(connection)
        else:
            await self._give_back(connection)
        return result

    async def _borrow(self) -> Connection:
        """Wait for a turn, and return a connection; whoever gets it gives it back or passes it on."""
        kept = await self._turn()
        if kept is not None and _is_open(kept):
            return kept
        try:
            if kept is not None:
                await self._pool.release(kept)
            return await self._pool.acquire(timeout=CONNECT_TIMEOUT_SECONDS)
        except BaseException:
            self._pass_turn(None)
            raise

    async def _give_back(self, connection: Connection) -> None:
        """Return the connection to the pool, which cleans it or ends it, and pass the turn."""
        try:
            await self._pool.release(connection)
        finally:
            self._pass_turn(None)

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
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self._pass_turn(waiter.result())  # it came together with the cancellation
            raise
        finally:
            self._patience.end(waiter)

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

    async def close(self) -> None:
        """Wait until all statements have ended, and close the pool."""
        self._keeps_connections = False
        while self._kept:
            connection = self._kept.pop()
            self._idle.end(connection)
            await self._pool.release(connection)
        await self._pool.close()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Hold a connection inside a transaction that commits at the end of the block."""
        try:
            connection = await self._borrow()
            try:
                async with connection.transaction():
                    yield connection
            finally:
                await self._give_back(connection)
        except Exception as error:
            named = _named(error)
            if named is error:
                raise
            raise named from error

    @property
    def connections_open(self) -> int:
        return self._pool.get_size()

    @property
    def connections_idle(self) -> int:
        return self._pool.get_idle_size() + len(self._kept)

    async def check(self) -> str | None:
        """Return None when the database answers, else why not. For readiness."""
        try:
            await self.fetch_value("SELECT 1", timeout=CHECK_TIMEOUT_SECONDS)
        except DatabaseUnavailable as error:
            return str(error)
        return None

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


def _give_up(waiter: asyncio.Future[Connection | None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError("no connection became free in time"))


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
    pool = asyncpg.create_pool(
        url,
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
            pool, connections_max, keeps_connections=reads_only, answer_seconds_max=answer_seconds_max
        )
        try:
            yield database
        finally:
            try:
                async with asyncio.timeout(CLOSE_SECONDS_MAX):
                    await database.close()
            except TimeoutError:
                log.warning("database_pool_terminated", reason="connections did not close in time")
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
    problem: str | None = None
    while not stop.is_set():
        connection: NewConnection | None = None
        hears = False
        try:
            connection = await asyncpg.connect(
                url,
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
                log.warning("notifications_interrupted", reason=problem)
        finally:
            if hears:
                listener.interrupted()
            if connection is not None:
                connection.terminate()
        await clock.wait_for_stop(stop, LISTEN_PAUSE_SECONDS)
