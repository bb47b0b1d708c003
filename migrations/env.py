"""Alembic's entry: one connection to the primary of DATABASE_URL, one transaction for each revision.

A revision never waits long for a lock, as all who come after it would wait with it: it gives up, is undone, and tries
again. See docs/decisions/0016-expand-then-contract.md.
"""

import asyncio
import sys
import time

import asyncpg
from alembic import context
from pydantic import Field
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from shared import logs, settings
from shared.hosts import NoPrimary, hosts_of
from shared.settings import DatabaseUrl, LogSettings, SettingsError

# Two migrators at once wait for each other. The number only has to differ from other uses of the database.
ADVISORY_LOCK = 4_201_764
CONNECT_TIMEOUT_SECONDS = 10.0
LOCK_TIMEOUT = "40ms"
"""What readers and writers may have to wait behind a revision that waits for a lock."""
LOCK_SECONDS_MAX = 600.0
"""For so long a revision is tried again, and another migrator waited for."""
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.2, 2.0
_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED = "55P03", "40P01"

OLDEST_TRANSACTION = """
SELECT format(
    '%s (pid %s, for %s s)', application_name, pid, round(extract(epoch FROM clock_timestamp() - xact_start))
)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
ORDER BY xact_start
LIMIT 1
"""

log = logs.get_logger()


class MigrationSettings(LogSettings):
    database_url: DatabaseUrl = Field(description="PostgreSQL 16 or later, the database to migrate.")


def migrate(connection: Connection) -> None:
    """Run the revisions that are missing; those done stay done when a later one fails."""
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


async def migrate_patiently(connection: AsyncConnection) -> None:
    """Migrate, trying again while a revision cannot have its locks at once."""
    pause, ends_at = PAUSE_SECONDS_MIN, time.monotonic() + LOCK_SECONDS_MAX
    while True:
        try:
            await connection.run_sync(migrate)
        except DBAPIError as error:
            sqlstate = getattr(error.orig, "sqlstate", None)
            if sqlstate not in (_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED) or time.monotonic() > ends_at:
                raise
            await connection.rollback()
            oldest = await connection.scalar(text(OLDEST_TRANSACTION))
            await connection.rollback()
            log.info("migration_waits", reason="a table is in use", oldest_transaction=oldest)
        else:
            return
        await asyncio.sleep(pause)
        pause = min(pause * 2, PAUSE_SECONDS_MAX)


async def take_turn(connection: AsyncConnection) -> None:
    """Keep other migrators out until the connection ends, once the one at work has ended.

    By asking again and again: one who waits inside a transaction is waited for by an index that is built concurrently.
    """
    ends_at, was_said = time.monotonic() + LOCK_SECONDS_MAX, False
    while True:
        has_turn = await connection.scalar(text(f"SELECT pg_try_advisory_lock({ADVISORY_LOCK})"))
        await connection.commit()
        if has_turn:
            return
        if time.monotonic() > ends_at:
            raise TimeoutError("another migrator has been at work all the while")
        if not was_said:
            was_said = True
            log.info("migration_waits", reason="another migrator is at work")
        await asyncio.sleep(PAUSE_SECONDS_MIN)


async def migrate_online(url: str) -> None:
    # asyncpg reads the URL itself, as in the services: SQLAlchemy would not know all of its parameters.
    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=NullPool,
        async_creator=lambda: hosts_of(url).connect(
            timeout=CONNECT_TIMEOUT_SECONDS,
            server_settings={"application_name": "migrations", "lock_timeout": LOCK_TIMEOUT},
        ),
    )
    async with engine.connect() as connection:
        await take_turn(connection)
        await migrate_patiently(connection)
    await engine.dispose()


def main() -> None:
    if context.is_offline_mode():
        context.configure(dialect_name="postgresql", literal_binds=True, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    try:
        loaded = settings.load(MigrationSettings)
    except SettingsError as error:
        sys.exit(f"migrations cannot start: {error}")
    logs.configure("migrations", loaded.log_level)
    try:
        asyncio.run(migrate_online(loaded.database_url.get_secret_value()))
    except (
        OSError,
        ValueError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        DBAPIError,
        NoPrimary,
    ) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        log.error(
            "migration_failed",
            error=reason[0],
            advice="mend that and run it again: revisions that are done stay done",
        )
        sys.exit(1)
    log.info("migrated")


main()
