"""What changes in a portfolio is notified after its commit; listening heals."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from shared import database as databases
from shared.database import Database
from tests.factories import create_user
from tests.waiting import eventually


class Heard:
    def __init__(self) -> None:
        self.payloads: list[str] = []
        self.is_heard = False
        self.interruptions = 0

    def notified(self, payload: str) -> None:
        self.payloads.append(payload)

    def interrupted(self) -> None:
        self.is_heard = False
        self.interruptions += 1

    def resumed(self) -> None:
        self.is_heard = True


@asynccontextmanager
async def listening(database_url: str) -> AsyncIterator[Heard]:
    heard, stop = Heard(), asyncio.Event()
    task = asyncio.create_task(
        databases.listen(database_url, "portfolios", heard, stop, application_name="listener")
    )

    async def is_heard() -> bool:
        return heard.is_heard

    await eventually(is_heard)
    yield heard
    stop.set()
    await task


async def expect(heard: Heard, *payloads: str) -> None:
    async def are_there() -> bool:
        return sorted(heard.payloads) == sorted(payloads)

    await eventually(are_there)
    heard.payloads.clear()


async def test_every_change_of_cash_and_positions_is_notified_once(
    database: Database, database_url: str
) -> None:
    demo = await create_user(database, "demo")
    other = await create_user(database, "other")
    async with listening(database_url) as heard:
        await database.fetch("UPDATE users SET cash_balance = 5 WHERE id = $1", demo)
        await expect(heard, str(demo))
        await database.fetch("INSERT INTO positions VALUES ($1, 'AAPL', 1, 1), ($1, 'IBM', 1, 1)", demo)
        await expect(heard, str(demo))
        await database.fetch("UPDATE positions SET shares = 2")
        await expect(heard, str(demo))
        await database.fetch("UPDATE positions SET user_id = $1 WHERE ticker = 'IBM'", other)
        await expect(heard, str(demo), str(other))
        await database.fetch("DELETE FROM positions WHERE user_id = $1", other)
        await expect(heard, str(other))
        await database.fetch("DELETE FROM users WHERE id = $1", other)
        await expect(heard, str(other))
        await database.fetch("UPDATE positions SET shares = 2 WHERE ticker = 'MSFT'")
        await database.fetch("UPDATE positions SET shares = 2 WHERE ticker = 'AAPL'")  # which it is
        await database.fetch("UPDATE users SET created_at = now(), cash_balance = 5")
        await database.fetch("UPDATE users SET is_active = FALSE WHERE id = $1", demo)
        await expect(heard, str(demo))
        await database.fetch("TRUNCATE positions")
        await expect(heard, "")


async def test_a_statement_that_changes_many_portfolios_is_one_notification(
    database: Database, database_url: str
) -> None:
    await database.fetch("INSERT INTO users (subject) SELECT 'user-' || n FROM generate_series(1, 101) AS n")
    async with listening(database_url) as heard:
        await database.fetch("UPDATE users SET cash_balance = 5")
        await expect(heard, "")


async def test_a_transaction_that_is_undone_notifies_nothing(database: Database, database_url: str) -> None:
    demo = await create_user(database, "demo")
    async with listening(database_url) as heard:
        with suppress(asyncpg.CheckViolationError):
            async with database.transaction() as connection:
                await connection.execute("UPDATE users SET cash_balance = 5 WHERE id = $1", demo)
                await connection.execute("UPDATE users SET cash_balance = 1e15")
        await database.fetch("UPDATE users SET cash_balance = 6 WHERE id = $1", demo)
        await expect(heard, str(demo))


async def test_listening_goes_on_after_its_connection_was_ended(
    database: Database, database_url: str
) -> None:
    demo = await create_user(database, "demo")
    async with listening(database_url) as heard:
        await database.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'listener'"
        )

        async def is_heard_again() -> bool:
            return heard.interruptions == 1 and heard.is_heard

        await eventually(is_heard_again)
        await database.fetch("UPDATE users SET cash_balance = 5 WHERE id = $1", demo)
        await expect(heard, str(demo))
