"""One durable PostgreSQL for all three ways; databases that are kept between runs, and copies to measure on."""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from bench.progress import say
from local.settings import ROOT

STATEMENT_SECONDS_MAX = 1800.0

_HISTORY_SCHEMA = """
SELECT string_agg(
    concat_ws(' ', relname, relkind, reloptions, pg_get_partkeydef(oid),
        (
            SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), ', ' ORDER BY attnum)
            FROM pg_attribute
            WHERE attrelid = pg_class.oid AND attnum > 0
        ),
        (SELECT string_agg(pg_get_indexdef(indexrelid), '; ' ORDER BY 1) FROM pg_index WHERE indrelid = pg_class.oid)
    ),
    E'\\n' ORDER BY relname
)
FROM pg_class
WHERE relkind IN ('r', 'p') AND NOT relispartition AND relname LIKE 'portfolio\\_%'
"""

Builder = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Databases:
    """The databases of a running server."""

    server_url: str

    async def kept(self, name: str, description: str, build: Builder, *, template: str = "template0") -> str:
        """Return the URL of a database that `build` fills, built only when its description has changed.

        The description is stored as the database's comment, and the name is given last, so that an interrupted
        build is never taken for a whole one.
        """
        digest = hashlib.sha256(description.encode()).hexdigest()
        stored = await self._fetch_value(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", name
        )
        if stored != digest:
            say(f"building the database {name}")
            unfinished = f"{name}_unfinished"
            await self.drop(unfinished)
            await self._execute(f"CREATE DATABASE {unfinished} TEMPLATE {template}")
            await build(self._url(unfinished))
            await self.drop(name)
            await self._execute(f"COMMENT ON DATABASE {unfinished} IS '{digest}'")
            await self._execute(f"ALTER DATABASE {unfinished} RENAME TO {name}")
            await self._execute("CHECKPOINT")
        return self._url(name)

    async def migrated(self) -> str:
        """Return the name of a kept database with the project's schema and nothing in it."""
        await self.kept("migrated", migrations_text(), migrate)
        return "migrated"

    async def history_schema(self) -> str:
        """Describe the history's tables as the migrations make them: nothing else of the schema changes its data."""
        async with connected(self._url(await self.migrated())) as connection:
            description: str = await connection.fetchval(_HISTORY_SCHEMA)
        return description

    @asynccontextmanager
    async def copy(self, of: str) -> AsyncIterator[str]:
        """Copy a kept database for the block, and yield the copy's URL: what is kept stays as it was built."""
        name = f"{of}_measured"
        await self.drop(name)
        await self._execute(f"CREATE DATABASE {name} TEMPLATE {of} STRATEGY file_copy")
        try:
            yield self._url(name)
        finally:
            await self.drop(name)

    async def drop(self, name: str) -> None:
        await self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    async def size_bytes(self) -> int:
        size: int = await self._fetch_value("SELECT sum(pg_database_size(oid))::bigint FROM pg_database")
        return size

    def _url(self, name: str) -> str:
        return urlunsplit(urlsplit(self.server_url)._replace(path=f"/{name}"))

    async def _execute(self, statement: str) -> None:
        async with connected(self.server_url) as connection:
            await connection.execute(statement)

    async def _fetch_value(self, statement: str, *args: object) -> Any:
        async with connected(self.server_url) as connection:
            return await connection.fetchval(statement, *args)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Open a bare connection for the block."""
    connection = await asyncpg.connect(
        url, timeout=10, command_timeout=STATEMENT_SECONDS_MAX, server_settings={"timezone": "UTC"}
    )
    try:
        yield connection
    finally:
        await connection.close()


async def migrate(url: str) -> None:
    """Bring the database to the project's schema."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the tables cannot be made: {done.stderr.strip().splitlines()[-1]}")


def migrations_text() -> str:
    """Return all migrations as one text: data in another schema is other data."""
    return "".join(path.read_text() for path in sorted(Path(ROOT, "migrations", "versions").glob("*.py")))
