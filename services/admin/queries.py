"""The administrator's statements."""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from services.admin.portfolio_file import Position
from shared.database import Connection, Database

DELETE_TIMEOUT_SECONDS = 600.0
LIST_TIMEOUT_SECONDS = 30.0


class User(NamedTuple):
    user_id: int
    subject: str
    is_active: bool
    created_at: datetime
    cash_balance: Decimal
    total_value: Decimal
    simulated: bool
    unpriced_positions: int
    snapshots: int
    last_snapshot_at: datetime | None


class Holding(NamedTuple):
    ticker: str
    shares: Decimal
    cost_basis: Decimal
    price_per_share: Decimal | None
    current_value: Decimal | None
    updated_at: datetime | None


class Listed(NamedTuple):
    subject: str
    is_active: bool
    cash_balance: Decimal
    positions: int


class Imported(NamedTuple):
    added: int
    changed: int
    unchanged: int
    removed: int


async def create_user(connection: Connection, subject: str, cash_balance: Decimal) -> int | None:
    """Insert a user; return the id, or None when the subject is taken."""
    user_id: int | None = await connection.fetchval(
        """
        INSERT INTO users (subject, cash_balance)
        VALUES ($1, $2)
        ON CONFLICT (subject) DO NOTHING
        RETURNING id
        """,
        subject,
        cash_balance,
    )
    return user_id


async def lock_user(connection: Connection, subject: str) -> int | None:
    """Return the user's id and keep other imports for the user waiting until the transaction ends."""
    user_id: int | None = await connection.fetchval(
        "SELECT id FROM users WHERE subject = $1 FOR NO KEY UPDATE", subject
    )
    return user_id


async def import_positions(
    connection: Connection, user_id: int, positions: Sequence[Position], *, replace: bool
) -> Imported:
    """Add or overwrite the positions given; with `replace` remove all others. The user must be locked."""
    row = await connection.fetchrow(
        """
        WITH given AS (
            SELECT * FROM unnest($2::text[], $3::numeric[], $4::numeric[]) AS given (ticker, shares, cost_basis)
        ),
        removed AS (
            DELETE FROM positions
            WHERE user_id = $1 AND $5 AND ticker NOT IN (SELECT ticker FROM given)
            RETURNING ticker
        ),
        stored AS (
            INSERT INTO positions (user_id, ticker, shares, cost_basis)
            SELECT $1, ticker, shares, cost_basis
            FROM given
            ON CONFLICT (user_id, ticker)
            DO UPDATE SET shares = EXCLUDED.shares, cost_basis = EXCLUDED.cost_basis
            WHERE (positions.shares, positions.cost_basis) <> (EXCLUDED.shares, EXCLUDED.cost_basis)
            RETURNING ticker
        ),
        -- All parts of the statement see the table as it was before.
        known AS (
            SELECT ticker FROM positions WHERE user_id = $1
        )
        SELECT
            (SELECT count(*) FROM stored WHERE ticker NOT IN (SELECT ticker FROM known))::integer AS added,
            (SELECT count(*) FROM stored WHERE ticker IN (SELECT ticker FROM known))::integer AS changed,
            (SELECT count(*) FROM given)::integer - (SELECT count(*) FROM stored)::integer AS unchanged,
            (SELECT count(*) FROM removed)::integer AS removed
        """,
        user_id,
        [position.ticker for position in positions],
        [position.shares for position in positions],
        [position.cost_basis for position in positions],
        replace,
        timeout=LIST_TIMEOUT_SECONDS,
    )
    assert row is not None
    return Imported(**row)


async def set_cash(database: Database, subject: str, cash_balance: Decimal) -> bool:
    """Tell whether there is such a user."""
    return (
        await database.fetch_value(
            "UPDATE users SET cash_balance = $2 WHERE subject = $1 RETURNING TRUE", subject, cash_balance
        )
        is not None
    )


async def set_active(database: Database, subject: str, active: bool) -> bool:
    """Tell whether there is such a user."""
    return (
        await database.fetch_value(
            "UPDATE users SET is_active = $2 WHERE subject = $1 RETURNING TRUE", subject, active
        )
        is not None
    )


async def delete_user(database: Database, subject: str) -> bool:
    """Delete the user with all positions and snapshots; tell whether there was one."""
    return (
        await database.fetch_value(
            "DELETE FROM users WHERE subject = $1 RETURNING TRUE", subject, timeout=DELETE_TIMEOUT_SECONDS
        )
        is not None
    )


async def user(database: Database, subject: str) -> User | None:
    row = await database.fetch_row(
        """
        SELECT
            users.id AS user_id,
            users.subject,
            users.is_active,
            users.created_at,
            users.cash_balance,
            portfolio_valuations.total_value,
            portfolio_valuations.simulated,
            portfolio_valuations.unpriced_positions,
            (SELECT count(*) FROM portfolio_snapshots WHERE user_id = users.id) AS snapshots,
            (SELECT max(timestamp) FROM portfolio_snapshots WHERE user_id = users.id) AS last_snapshot_at
        FROM users
        JOIN portfolio_valuations ON portfolio_valuations.user_id = users.id
        WHERE users.subject = $1
        """,
        subject,
        timeout=LIST_TIMEOUT_SECONDS,
    )
    return User(**row) if row else None


async def holdings(database: Database, user_id: int) -> list[Holding]:
    """Return all positions of the user, also those of no shares, by ticker."""
    rows = await database.fetch(
        """
        SELECT
            positions.ticker,
            positions.shares,
            positions.cost_basis,
            priced_positions.price_per_share,
            priced_positions.current_value,
            priced_positions.updated_at
        FROM positions
        LEFT JOIN priced_positions
            ON priced_positions.user_id = positions.user_id AND priced_positions.ticker = positions.ticker
        WHERE positions.user_id = $1
        ORDER BY positions.ticker
        """,
        user_id,
        timeout=LIST_TIMEOUT_SECONDS,
    )
    return [Holding(**row) for row in rows]


async def users(database: Database, *, limit: int) -> list[Listed]:
    """Return the first users by subject."""
    rows = await database.fetch(
        """
        SELECT
            subject,
            is_active,
            cash_balance,
            (SELECT count(*) FROM positions WHERE user_id = users.id)::integer AS positions
        FROM users
        ORDER BY subject
        LIMIT $1
        """,
        limit,
        timeout=LIST_TIMEOUT_SECONDS,
    )
    return [Listed(**row) for row in rows]
