"""A lease that is held while a test runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.price_feeder.lease import Lease
from shared.database import Database


@asynccontextmanager
async def held_lease(database: Database, holder: str = "tests") -> AsyncIterator[Lease]:
    """Hold the lease, which must be free, while the block runs, and release it."""
    lease = Lease(database, holder=holder)
    stop, has_begun = asyncio.Event(), asyncio.Event()

    async def work(over: asyncio.Event) -> None:
        has_begun.set()
        await over.wait()

    leading = asyncio.create_task(lease.lead(work, stop))
    try:
        async with asyncio.timeout(15):
            await has_begun.wait()
        yield lease
    finally:
        stop.set()
        await leading
