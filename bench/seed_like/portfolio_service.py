"""A portfolio valued at the cached prices."""

from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from bench.seed_like.models import AssetPrice, Position, User
from bench.seed_like.price_service import PriceService

_CENT = Decimal("0.01")


@dataclass(frozen=True)
class ValuedPosition:
    position: Position
    price: AssetPrice
    current_value: Decimal


@dataclass(frozen=True)
class ValuedPortfolio:
    positions: list[ValuedPosition]
    investment_value: Decimal
    total_value: Decimal


async def valued_portfolio(session: AsyncSession, user: User) -> ValuedPortfolio:
    """Value the user's positions, one query for them and one for their prices; those without a price are skipped."""
    held = (
        await session.scalars(select(Position).where(Position.user_id == user.id, Position.shares > 0))
    ).all()
    prices = await PriceService(session).get_prices([position.ticker for position in held])
    valued = [
        ValuedPosition(position, price, (position.shares * price.price).quantize(_CENT))
        for position in held
        if (price := prices.get(position.ticker)) is not None
    ]
    investment_value = sum((each.current_value for each in valued), Decimal(0))
    return ValuedPortfolio(valued, investment_value, user.cash_balance + investment_value)
