"""Users whose portfolios are known, and those of them who place orders while everything falls over."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from decimal import Decimal

import asyncpg

from services.market_simulator.listings import LISTINGS

SYMBOLS = tuple(sorted(LISTINGS))[:20]
UNKNOWN_SYMBOL = "NOPE"
"""One that no market has: its position is never priced."""
CASH = Decimal("100000.00")
COST_BASIS = Decimal("1000.00")
ORDER_SECONDS_MAX = 4.0
ORDER_PAUSE_SECONDS = 0.2
_FAILURES = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

_INSERT_USER = "INSERT INTO users (subject, cash_balance, is_active) VALUES ($1, $2, $3) RETURNING id"
_INSERT_POSITION = "INSERT INTO positions (user_id, ticker, shares, cost_basis) VALUES ($1, $2, $3, $4)"
# An order that was held up must not undo a later one.
_ORDER = """
WITH paid AS (
    UPDATE users SET cash_balance = $2 WHERE id = $1 AND cash_balance > $2 RETURNING id
)
UPDATE positions SET shares = $4 FROM paid WHERE user_id = paid.id AND ticker = $3
"""


@dataclass
class Order:
    """The `number`th order of a user: it adds so many shares to the first position, and costs so many dollars."""

    number: int
    asked_at: float
    committed_at: float | None = None
    """When it was acknowledged; None when nobody knows whether it is there."""


@dataclass
class User:
    subject: str
    cash: Decimal
    shares: dict[str, Decimal]
    """At the beginning, by symbol."""
    is_active: bool = True
    id: int = 0
    orders: list[Order] = field(default_factory=list)

    @property
    def ordered_symbol(self) -> str:
        """Of which the user's orders are."""
        return next(iter(self.shares))

    def holdings(self, number: int) -> tuple[Decimal, dict[str, Decimal]]:
        """Return cash and shares after the `number`th order, with 0 before the first."""
        symbol = self.ordered_symbol if number else None
        return self.cash - number, {
            each: shares + (number if each == symbol else 0) for each, shares in self.shares.items()
        }

    def orders_between(self, began_at: float, ended_at: float) -> range:
        """Return after which orders a reader may have seen the portfolio between two moments."""
        least = max(
            (
                order.number
                for order in self.orders
                if order.committed_at is not None and order.committed_at <= began_at
            ),
            default=0,
        )
        most = max((order.number for order in self.orders if order.asked_at <= ended_at), default=0)
        return range(least, most + 1)


@dataclass
class Population:
    users: list[User]

    @property
    def active(self) -> list[User]:
        return [user for user in self.users if user.is_active]

    @property
    def ordering(self) -> list[User]:
        """Those who place orders: every tenth."""
        return [user for user in self.active[::10] if user.shares]

    @property
    def orders_committed(self) -> int:
        return sum(order.committed_at is not None for user in self.users for order in user.orders)

    async def insert(self, database_url: str) -> None:
        """Insert everybody."""
        connection = await asyncpg.connect(database_url)
        try:
            async with connection.transaction():
                for user in self.users:
                    user.id = await connection.fetchval(_INSERT_USER, user.subject, user.cash, user.is_active)
                    await connection.executemany(
                        _INSERT_POSITION,
                        [(user.id, symbol, shares, COST_BASIS) for symbol, shares in user.shares.items()],
                    )
        finally:
            await connection.close()

    async def place_orders(self, database_url: str, stop: asyncio.Event, seed: int) -> None:
        """Let users order, one after the other, until `stop`; what fails may be there or not."""
        chance = random.Random(seed)
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        while not stop.is_set():
            user = chance.choice(self.ordering)
            order = Order(len(user.orders) + 1, time.monotonic())
            user.orders.append(order)
            cash, shares = user.holdings(order.number)
            symbol = user.ordered_symbol
            try:
                async with asyncio.timeout(ORDER_SECONDS_MAX):
                    if connection is None or connection.is_closed():
                        connection = await asyncpg.connect(database_url)
                    await connection.execute(_ORDER, user.id, cash, symbol, shares[symbol])
                order.committed_at = time.monotonic()
            except _FAILURES:
                if connection is not None:
                    connection.terminate()
                connection = None
            await asyncio.sleep(ORDER_PAUSE_SECONDS)
        if connection is not None:
            connection.terminate()


def drawn(users: int, seed: int) -> Population:
    """Draw users: most hold some symbols, every tenth one that has no price, some nothing; the last is deactivated."""
    chance = random.Random(seed)
    people = []
    for number in range(users):
        held = chance.sample(SYMBOLS, chance.randint(2, 6)) if number % 25 != 24 else []
        shares = {symbol: Decimal(chance.randint(1, 4000)) / 8 for symbol in held}
        if number % 10 == 9 and held:
            shares[UNKNOWN_SYMBOL] = Decimal(5)
        people.append(User(f"user{number}", CASH + number, shares))
    people[-1].is_active = False
    return Population(people)
