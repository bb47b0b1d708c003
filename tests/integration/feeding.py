"""A price feeder in the test's own process: leading, streaming and polling against a market that is told what to do."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import nats
from nats.aio.msg import Msg

from services.price_feeder import feed, streams
from services.price_feeder.feed import Feed
from services.price_feeder.lease import Lease
from services.price_feeder.market_data import MarketData
from services.price_feeder.queries import cached_price
from services.price_feeder.streaming import Streaming
from shared.bus import Bus
from shared.clock import Now, utc_now
from shared.database import Database
from shared.market_calendar import Calendar
from shared.market_hours import MarketHours
from shared.messages import ALL_PRICES, FEED_STATUS, FeedStatus, PriceTick
from tests.market import open_now
from tests.waiting import eventually, settled

SELDOM = timedelta(minutes=30)
"""Between two rounds: what is seen after the first was streamed."""
OFTEN = timedelta(seconds=0.3)


@dataclass
class Feeding:
    database: Database
    feed: Feed
    streaming: Streaming
    lease: Lease
    ticks: list[PriceTick] = field(default_factory=list)
    statuses: list[FeedStatus] = field(default_factory=list)

    async def price_becomes(self, symbol: str, price: str, *, timeout: float = 10.0) -> None:
        async def it_has() -> bool:
            cached = await cached_price(self.database, symbol)
            return cached is not None and str(cached.tick.price) == price

        await eventually(it_has, timeout=timeout)

    async def streams(self, *symbols: str, timeout: float = 10.0) -> None:
        async def it_does() -> bool:
            return self.streaming.streamed == frozenset(symbols) and self.streaming.is_whole

        await eventually(it_does, timeout=timeout)

    async def says(self, state: str) -> None:
        async def it_does() -> bool:
            return bool(self.statuses) and self.statuses[-1].state == state

        await eventually(it_does)


@asynccontextmanager
async def market_data(url: str, **options: Any) -> AsyncIterator[MarketData]:
    chosen: dict[str, Any] = {"feed": "iex", "requests_per_minute": 100_000} | options
    async with MarketData(api_key="key", secret_key="secret", url=url, **chosen) as client:
        yield client


@asynccontextmanager
async def feeding(
    database: Database,
    bus: Bus,
    nats_url: str,
    url: str,
    *,
    interval: timedelta = SELDOM,
    symbols_max: int = 30,
    hours: MarketHours | None = None,
    holder: str = "tests",
    now: Now = utc_now,
) -> AsyncIterator[Feeding]:
    """Lead from the beginning to the end of the block; the lease must be free."""
    lease = Lease(database, holder=holder)
    stop = asyncio.Event()
    begun: asyncio.Future[Feeding] = asyncio.get_running_loop().create_future()
    listener = await nats.connect(nats_url)
    async with market_data(url) as market:

        async def lead(over: asyncio.Event) -> None:
            connections = streams.connections(
                url.replace("http", "ws", 1), "iex", api_key="key", secret_key="secret"
            )
            streaming = Streaming(connections, feed="iex", symbols_max=symbols_max, now=now)
            leading = Feed(
                database,
                bus,
                market,
                lease,
                calendar=Calendar(hours or open_now()),
                streaming=streaming,
                now=now,
            )
            if not begun.done():
                begun.set_result(Feeding(database, leading, streaming, lease))
            await feed.run(leading, interval, over)

        running = asyncio.create_task(lease.lead(lead, stop))
        try:
            async with asyncio.timeout(15):
                fed = await begun

            async def heard(message: Msg) -> None:
                if message.subject == FEED_STATUS:
                    fed.statuses.append(FeedStatus.model_validate_json(message.data))
                else:
                    fed.ticks.append(PriceTick.model_validate_json(message.data))

            for subject in (ALL_PRICES, FEED_STATUS):
                await listener.subscribe(subject, cb=heard)
            await settled(listener)
            yield fed
        finally:
            stop.set()
            async with asyncio.timeout(10):
                await running
            await listener.close()
