"""The chart: the snapshots of the window are loaded, and bucketed here."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Protocol, cast
from zoneinfo import ZoneInfo

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from bench.seed_like.models import PortfolioSnapshot

MARKET_TIMEZONE = ZoneInfo("America/New_York")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WINDOW_AND_WIDTH = {
    "1D": (timedelta(days=1), timedelta(minutes=5)),
    "1W": (timedelta(days=7), timedelta(minutes=30)),
    "1M": (timedelta(days=30), timedelta(hours=1)),
    "3M": (timedelta(days=90), timedelta(hours=3)),
}


class _Valued(Protocol):
    """A snapshot, or the two columns of it that a chart shows."""

    timestamp: datetime
    total_value: Decimal


async def data_points(
    session: AsyncSession, user_id: int, timeframe: str, now: datetime, *, columns_only: bool = False
) -> list[tuple[datetime, float]]:
    """Return the last snapshot of each bucket of the timeframe, oldest first.

    With `columns_only` no entities are made, only rows of two columns: a later improvement that is measured as well.
    """
    entities = (
        (PortfolioSnapshot.timestamp, PortfolioSnapshot.total_value) if columns_only else (PortfolioSnapshot,)
    )
    statement: Select[Any] = select(*entities)
    statement = statement.where(PortfolioSnapshot.user_id == user_id, PortfolioSnapshot.timestamp <= now)
    since = window_start(timeframe, now)
    if since is not None:
        statement = statement.where(PortfolioSnapshot.timestamp > since)
    statement = statement.order_by(PortfolioSnapshot.timestamp)
    snapshots: Iterable[_Valued]
    if columns_only:
        snapshots = cast(Iterable[_Valued], await session.execute(statement))
    else:
        snapshots = await session.scalars(statement)
    return [(bucket, float(snapshot.total_value)) for bucket, snapshot in _bucketed(timeframe, snapshots)]


def window_start(timeframe: str, now: datetime) -> datetime | None:
    """Return where the timeframe begins; None when it has everything."""
    if timeframe in _WINDOW_AND_WIDTH:
        return now - _WINDOW_AND_WIDTH[timeframe][0]
    if timeframe == "YTD":
        return datetime(now.astimezone(MARKET_TIMEZONE).year, 1, 1, tzinfo=MARKET_TIMEZONE)
    return None


def _bucketed(timeframe: str, snapshots: Iterable[_Valued]) -> list[tuple[datetime, _Valued]]:
    """Keep the last of each bucket; the snapshots come in the order of time."""
    last: dict[datetime, _Valued] = {}
    if timeframe in _WINDOW_AND_WIDTH:
        width = _WINDOW_AND_WIDTH[timeframe][1]
        for snapshot in snapshots:
            last[snapshot.timestamp - (snapshot.timestamp - _EPOCH) % width] = snapshot
    else:
        for snapshot in snapshots:
            local = snapshot.timestamp.astimezone(MARKET_TIMEZONE)
            last[local.replace(hour=0, minute=0, second=0, microsecond=0)] = snapshot
    return list(last.items())
