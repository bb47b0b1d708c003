"""The price cache."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from bench.seed_like.models import AssetPrice
from shared.clock import utc_now

FRESH_FOR = timedelta(minutes=5)


class PriceService:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get_prices(self, symbols: Sequence[str]) -> dict[str, AssetPrice]:
        """Return the cached prices of the symbols, by symbol, in one query."""
        found = await self._session.scalars(select(AssetPrice).where(AssetPrice.symbol.in_(symbols)))
        return {price.symbol: price for price in found}

    @staticmethod
    def is_price_fresh(price: AssetPrice) -> bool:
        return utc_now() - price.updated_at < FRESH_FOR
