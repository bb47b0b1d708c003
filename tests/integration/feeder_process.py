"""The price feeder as a process of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.integration.service_process import SECRET, Process, service

__all__ = ["Process", "price_feeder"]


@asynccontextmanager
async def price_feeder(
    database_url: str, nats_url: str, market_url: str, port: int, **settings: str
) -> AsyncIterator[Process]:
    chosen = {
        "DATABASE_URL": database_url,
        "NATS_URL": nats_url,
        "ALPACA_API_KEY": "key",
        "ALPACA_SECRET_KEY": SECRET,
        "ALPACA_DATA_URL": market_url,
        "ALPACA_BASE_URL": market_url,
        "PRICE_STREAM_ENABLED": "false",
        "PRICE_CLOSED_INTERVAL_SECONDS": "0.5",
        "PRICE_UPDATE_INTERVAL_SECONDS": "0.5",
        **settings,
    }
    async with service("price_feeder", port, chosen) as running:
        yield running
