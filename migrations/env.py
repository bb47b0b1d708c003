"""Alembic's entry: one connection to DATABASE_URL, one transaction for all revisions."""

import asyncio
import sys

import asyncpg
from alembic import context
from pydantic import Field
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from shared import logs, settings
from shared.settings import DatabaseUrl, LogSettings, SettingsError

# Two migrators at once wait for each other. The number only has to differ from other uses of the database.
ADVISORY_LOCK = 4_201_764
CONNECT_TIMEOUT_SECONDS = 10.0


class MigrationSettings(LogSettings):
    database_url: DatabaseUrl = Field(description="PostgreSQL 16 or later, the database to migrate.")


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, transaction_per_migration=False)
    with context.begin_transaction():
        connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
        # A migration that cannot have its lock at once must not queue up the readers behind it.
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        context.run_migrations()


async def migrate_online(url: str) -> None:
    # asyncpg reads the URL itself, as in the services: SQLAlchemy would not know all of its parameters.
    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=NullPool,
        async_creator=lambda: asyncpg.connect(url, timeout=CONNECT_TIMEOUT_SECONDS),
    )
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


def main() -> None:
    if context.is_offline_mode():
        context.configure(dialect_name="postgresql", literal_binds=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    try:
        loaded = settings.load(MigrationSettings)
    except SettingsError as error:
        sys.exit(f"migrations cannot start: {error}")
    logs.configure("migrations", loaded.log_level)
    log = logs.get_logger()
    try:
        asyncio.run(migrate_online(loaded.database_url.get_secret_value()))
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError, DBAPIError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        log.error("migration_failed", error=reason[0])
        sys.exit(1)
    log.info("migrated")


main()
