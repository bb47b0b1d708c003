"""The data that everything is measured on: 10,000 users with 10 positions each in 500 symbols."""

import asyncio
import os
import subprocess
import sys

from local.settings import ROOT
from shared import database as databases

USERS = 10_000
SYMBOLS = 500
POSITIONS = 10
TIMEOUT_SECONDS = 120.0

_STATEMENTS = (
    f"INSERT INTO users (subject, cash_balance) SELECT 'user' || n, n FROM generate_series(1, {USERS}) AS n",
    f"""
    INSERT INTO asset_prices (symbol, price, traded_at, received_at, updated_at, feed)
    SELECT 'S' || n, 10 + n * 1.37, now(), now(), now() + interval '1 hour', 'iex'
    FROM generate_series(1, {SYMBOLS}) AS n
    """,
    f"""
    INSERT INTO positions (user_id, ticker, shares, cost_basis)
    SELECT users.id, 'S' || (1 + (users.id * 7 + n * 13) % {SYMBOLS}), 10.5 + n, 1000 + n
    FROM users, generate_series(1, {POSITIONS}) AS n
    """,
    "VACUUM ANALYZE",
)


async def prepared(database_url: str) -> None:
    """Migrate the database and fill it."""
    await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": database_url},
        check=True,
        capture_output=True,
    )
    async with databases.connect(database_url, application_name="bench", connections_max=1) as database:
        for statement in _STATEMENTS:
            await database.fetch(statement, timeout=TIMEOUT_SECONDS)
