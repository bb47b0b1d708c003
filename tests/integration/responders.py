"""The services that do what users ask for by hand, as tests run them beside a gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

from services.price_feeder import refreshes
from services.price_feeder.feed import Feed
from services.price_feeder.lease import Lease
from services.price_feeder.market_data import MarketData
from services.snapshotter import requested
from shared import database as databases
from shared.bus import Bus
from shared.database import Database
from shared.market_calendar import Calendar
from tests.integration.fake_alpaca import FakeAlpaca
from tests.market import open_now

SNAPSHOT_COOLDOWN = timedelta(seconds=60)
PRICES_COOLDOWN = timedelta(seconds=30)


@asynccontextmanager
async def snapshotter(
    database_url: str, bus: Bus, *, replicas: int = 1, cooldown: timedelta = SNAPSHOT_COOLDOWN
) -> AsyncIterator[None]:
    """Answer requests for snapshots while the block runs."""
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        pools = [
            await stack.enter_async_context(
                databases.connect(database_url, application_name="tests", connections_max=2)
            )
            for _ in range(replicas)
        ]
        async with asyncio.TaskGroup() as tasks:
            for pool in pools:
                tasks.create_task(requested.run(pool, bus, cooldown, stop))
            yield
            stop.set()


@asynccontextmanager
async def feeder(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease, *, cooldown: timedelta = PRICES_COOLDOWN
) -> AsyncIterator[Feed]:
    """Answer requests for prices as in a term of the lease, without rounds of its own, while the block runs."""
    over = asyncio.Event()
    async with (
        MarketData(
            api_key="key", secret_key="secret", url=alpaca.url, feed="iex", requests_per_minute=10_000
        ) as market,
        asyncio.TaskGroup() as tasks,
    ):
        feed = Feed(database, bus, market, lease, calendar=Calendar(open_now()))
        publishing = tasks.create_task(feed.outbox.keep_publishing())
        tasks.create_task(
            refreshes.run(
                database, bus, feed.refresh, lease.holds, over, cooldown=cooldown, requests_per_minute=10_000
            )
        )
        yield feed
        publishing.cancel()
        over.set()
