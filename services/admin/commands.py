"""What each command does with the database; returns the text for the person who asked."""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal

from services.admin import queries
from services.admin.portfolio_file import Position
from shared.database import Database


class CommandFailed(Exception):
    """Nothing was done, or else the text says what; it says why."""


async def create_user(
    database: Database, subject: str, *, cash: Decimal, positions: Sequence[Position], if_missing: bool
) -> str:
    async with database.transaction() as connection:
        user_id = await queries.create_user(connection, subject, cash)
        if user_id is not None and positions:
            await queries.import_positions(connection, user_id, positions, replace=False)
    if user_id is None:
        if if_missing:
            return f"user {subject} exists already and was left as it is"
        raise CommandFailed(f"user {subject} exists already")
    return f"user {subject} created with {cash:.2f} cash and {counted(len(positions), 'position')}"


async def set_cash(database: Database, subject: str, cash: Decimal) -> str:
    if not await queries.set_cash(database, subject, cash):
        raise _unknown(subject)
    return f"user {subject} has {cash:.2f} cash"


async def import_positions(
    database: Database, subject: str, positions: Sequence[Position], *, replace: bool
) -> str:
    async with database.transaction() as connection:
        user_id = await queries.lock_user(connection, subject)
        if user_id is None:
            raise _unknown(subject)
        imported = await queries.import_positions(connection, user_id, positions, replace=replace)
    counts = ", ".join(f"{count} {what}" for what, count in imported._asdict().items())
    return f"{counted(len(positions), 'position')} imported for user {subject}: {counts}"


async def set_active(database: Database, subject: str, *, active: bool) -> str:
    if not await queries.set_active(database, subject, active):
        raise _unknown(subject)
    return f"user {subject} is {'active' if active else 'deactivated'}"


async def delete_user(database: Database, subject: str, *, confirmed: bool) -> str:
    if not confirmed:
        raise CommandFailed(f"user {subject} is still there: say --yes to delete the whole history for good")
    if not await queries.delete_user(database, subject):
        raise _unknown(subject)
    return f"user {subject} deleted"


async def show_user(database: Database, subject: str) -> str:
    user = await queries.user(database, subject)
    if user is None:
        raise _unknown(subject)
    holdings = await queries.holdings(database, user.user_id)
    unpriced = f", {counted(user.unpriced_positions, 'position')} without a price left out"
    lines = [
        f"subject    {user.subject}",
        f"active     {_yes(user.is_active)}",
        f"created    {instant(user.created_at)}",
        f"cash       {user.cash_balance}",
        f"value      {user.total_value}{' (simulated prices)' if user.simulated else ''}"
        + (unpriced if user.unpriced_positions else ""),
        f"snapshots  {user.snapshots}"
        + (f", the last for {instant(user.last_snapshot_at)}" if user.last_snapshot_at else ""),
        f"positions  {len(holdings)}",
    ]
    if holdings:
        rows = [
            (
                holding.ticker,
                _plain(holding.shares),
                str(holding.cost_basis),
                _or_dash(holding.price_per_share),
                _or_dash(holding.current_value),
                instant(holding.updated_at) if holding.updated_at else "-",
            )
            for holding in holdings
        ]
        header = ("ticker", "shares", "cost_basis", "price", "value", "price confirmed")
        lines += ["", *table(header, rows, left=(0, 5))]
    return "\n".join(lines)


async def list_users(database: Database, *, limit: int) -> str:
    found = await queries.users(database, limit=limit + 1)
    rows = [
        (user.subject, _yes(user.is_active), str(user.cash_balance), str(user.positions))
        for user in found[:limit]
    ]
    if not rows:
        return "no users"
    lines = table(("subject", "active", "cash", "positions"), rows, left=(0, 1))
    if len(found) > limit:
        lines.append(f"more than {limit} users: say --limit")
    return "\n".join(lines)


def _unknown(subject: str) -> CommandFailed:
    return CommandFailed(f"there is no user {subject}")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def instant(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _plain(value: Decimal) -> str:
    """Return the number without the zeros at its end and without an exponent."""
    return f"{value.normalize():f}"


def _or_dash(value: Decimal | None) -> str:
    return "-" if value is None else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
