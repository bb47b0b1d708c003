"""Rows for tests, in few words. Amounts are given as text, so that no float comes near them."""

from datetime import datetime, timedelta
from decimal import Decimal

from shared.clock import utc_now
from shared.database import Database


async def create_user(
    database: Database,
    subject: str = "demo",
    *,
    cash: str = "0",
    positions: dict[str, tuple[str, str]] | None = None,
    active: bool = True,
) -> int:
    """Insert a user; `positions` maps a ticker to (shares, cost basis). Return the user's id."""
    user_id: int = await database.fetch_value(
        "INSERT INTO users (subject, cash_balance, is_active) VALUES ($1, $2, $3) RETURNING id",
        subject,
        Decimal(cash),
        active,
    )
    for ticker, (shares, cost_basis) in (positions or {}).items():
        await set_position(database, user_id, ticker, shares, cost_basis)
    return user_id


async def set_position(
    database: Database, user_id: int, ticker: str, shares: str, cost_basis: str = "0"
) -> None:
    await database.fetch(
        """
        INSERT INTO positions (user_id, ticker, shares, cost_basis) VALUES ($1, $2, $3, $4)
        ON CONFLICT (user_id, ticker)
        DO UPDATE SET shares = EXCLUDED.shares, cost_basis = EXCLUDED.cost_basis
        """,
        user_id,
        ticker,
        Decimal(shares),
        Decimal(cost_basis),
    )


async def set_price(
    database: Database,
    symbol: str,
    price: str,
    *,
    age: timedelta = timedelta(0),
    traded_at: datetime | None = None,
    feed: str = "iex",
) -> None:
    """Put a price into the cache that the feed confirmed `age` ago."""
    confirmed_at = utc_now() - age
    await database.fetch(
        """
        INSERT INTO asset_prices (symbol, price, traded_at, received_at, updated_at, feed)
        VALUES ($1, $2, $3, $4, $4, $5)
        ON CONFLICT (symbol) DO UPDATE SET price = EXCLUDED.price, traded_at = EXCLUDED.traded_at,
            received_at = EXCLUDED.received_at, updated_at = EXCLUDED.updated_at, feed = EXCLUDED.feed,
            sequence = asset_prices.sequence + 1
        """,
        symbol,
        Decimal(price),
        traded_at or confirmed_at,
        confirmed_at,
        feed,
    )


async def add_snapshot(
    database: Database, user_id: int, at: datetime, total: str, *, cash: str = "0", unpriced: int = 0
) -> None:
    """Insert a portfolio snapshot without position details."""
    await make_partitions(database, at, at)
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots
            (user_id, timestamp, total_value, cash_balance, investment_value, unpriced_positions)
        VALUES ($1, $2, $3::numeric, $4::numeric, $3::numeric - $4::numeric, $5)
        """,
        user_id,
        at,
        Decimal(total),
        Decimal(cash),
        unpriced,
    )


async def make_partitions(database: Database, first: datetime, last: datetime) -> None:
    """Make room for history of that time."""
    await database.fetch("SELECT make_history_partitions($1, $2)", first, last, timeout=60)
