"""PostgreSQL: a pool as a context manager, deadlines on every statement, and what counts as unavailable."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from shared import logs

SCHEMA_REVISION = "0002"
"""The migration that this code needs; a database may be ahead of it."""

CONNECT_TIMEOUT_SECONDS = 3.0
STATEMENT_TIMEOUT_SECONDS = 2.0
CHECK_TIMEOUT_SECONDS = 1.0

Connection = PoolConnectionProxy
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


@contextmanager
def _failures_named() -> Iterator[None]:
    """Turn the driver's many errors into the two that callers can act on; a bug stays as it is."""
    try:
        yield
    except _NOT_UNAVAILABLE:
        raise
    except _SCHEMA_MISSING as error:
        raise SchemaMissing(f"{error}: run `alembic upgrade head`") from error
    except _UNAVAILABLE as error:
        raise DatabaseUnavailable(str(error) or type(error).__name__) from error


class Database:
    """A pool of connections; every statement has a deadline, and one second try when its connection was gone.

    All statements of this project may run twice without harm, which makes the second try safe.
    Methods raise DatabaseUnavailable or SchemaMissing; any other error is a bug in the statement or its data.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", connections_max: int) -> None:
        self._pool = pool
        # The pool's own queue lets newcomers overtake those who wait, some of them for ever; a semaphore does not.
        self._turns = asyncio.Semaphore(connections_max)

    async def fetch(
        self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT_SECONDS
    ) -> list[asyncpg.Record]:
        return await self.run(lambda connection: connection.fetch(statement, *args, timeout=timeout))

    async def fetch_row(
        self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT_SECONDS
    ) -> asyncpg.Record | None:
        return await self.run(lambda connection: connection.fetchrow(statement, *args, timeout=timeout))

    async def fetch_value(
        self, statement: str, *args: object, timeout: float = STATEMENT_TIMEOUT_SECONDS
    ) -> Any:
        return await self.run(lambda connection: connection.fetchval(statement, *args, timeout=timeout))

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Run `work` with a connection of the pool; twice when the first connection turned out to be gone."""
        with _failures_named():
            try:
                return await self._attempt(work)
            except _CONNECTION_GONE:
                return await self._attempt(work)

    async def _attempt(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        await self._wait_for_turn()
        try:
            async with self._pool.acquire(timeout=CONNECT_TIMEOUT_SECONDS) as connection:
                try:
                    return await work(connection)
                except asyncpg.InternalClientError:
                    connection.terminate()  # the server has ended it, but its end has not been read yet
                    raise
        finally:
            self._turns.release()

    async def _wait_for_turn(self) -> None:
        if not self._turns.locked():
            await self._turns.acquire()
            return
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            await self._turns.acquire()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Hold a connection inside a transaction that commits at the end of the block."""
        with _failures_named():
            await self._wait_for_turn()
            try:
                async with (
                    self._pool.acquire(timeout=CONNECT_TIMEOUT_SECONDS) as connection,
                    connection.transaction(),
                ):
                    yield connection
            finally:
                self._turns.release()

    @property
    def connections_open(self) -> int:
        return self._pool.get_size()

    @property
    def connections_idle(self) -> int:
        return self._pool.get_idle_size()

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
    reads_only: bool = False,
) -> AsyncIterator[Database]:
    """Open a pool that connects when it is first used, so that a service can start before its database.

    `statement_timeout_seconds` is the server's own bound, for statements whose client has gone. With `reads_only`
    the server refuses to write, and a connection goes back to the pool without the reset that costs a round trip.
    """
    pool = asyncpg.create_pool(
        url,
        min_size=0,
        max_size=connections_max,
        max_inactive_connection_lifetime=300.0,
        timeout=CONNECT_TIMEOUT_SECONDS,
        command_timeout=STATEMENT_TIMEOUT_SECONDS,
        server_settings={
            "application_name": application_name,
            "timezone": "UTC",
            "jit": "off",
            "statement_timeout": f"{int(statement_timeout_seconds * 1000)}ms",
            "idle_in_transaction_session_timeout": f"{int(statement_timeout_seconds * 1000)}ms",
            "tcp_keepalives_idle": "10",
            "tcp_keepalives_interval": "5",
            "tcp_keepalives_count": "3",
            **({"default_transaction_read_only": "on"} if reads_only else {}),
            **(server_settings or {}),
        },
        reset=_leave_as_it_is if reads_only else None,
    )
    async with pool:
        try:
            yield Database(pool, connections_max)
        finally:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                    await pool.close()
            except TimeoutError:
                log.warning("database_pool_terminated", reason="connections did not close in time")
                pool.terminate()
