"""What a row is, and what is common to looking for what it must show."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from shared.clock import next_boundary, utc_now
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.population import Population
from tests.faults.system import SLOT, Options, System, running
from tests.waiting import eventually

START = Callable[[Path, Population, Options], AbstractAsyncContextManager[System]]


@dataclass(frozen=True)
class Row:
    """A fault: how it is injected, and what must be seen."""

    number: int
    name: str
    injected: str
    play: Callable[[System, Life], Awaitable[str]]
    """Injects it and heals it; returns what was seen, raises AssertionError when that is not what must be."""
    options: Callable[[Path], Options] = field(default=lambda _: Options())
    """What the system is like; those with the usual one share a system."""
    needs: Callable[[], str | None] = field(default=lambda: None)
    """Says what this machine lacks; None when it has all."""
    start: START = running


async def next_slots(slots: int) -> None:
    """Wait until so many slots have begun."""
    until = next_boundary(utc_now(), SLOT) + (slots - 1) * SLOT
    await asyncio.sleep((until - utc_now()).total_seconds() + 0.05)


async def metric(service: Service, sample: str) -> float:
    """Return a sample of a service's metrics, such as `snapshot_shards_total{outcome="taken"}`; 0 without one."""
    _, text = await service.ask("metrics")
    for line in text.splitlines():
        if line.startswith(f"{sample} "):
            return float(line.rpartition(" ")[2])
    return 0.0


async def total(services: list[Service], sample: str) -> float:
    """Return the sum of a sample over several services."""
    return sum([await metric(service, sample) for service in services])


async def seconds_until(probe: Callable[[], Awaitable[object]], seconds_max: float) -> float:
    """Wait until `probe` returns something true; return how many seconds that took."""
    began = time.monotonic()
    await eventually(probe, timeout=seconds_max, every=0.02)
    return time.monotonic() - began


@asynccontextmanager
async def session(system: System) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Connect to the database, past whatever the services go through."""
    connection = await asyncpg.connect(system.database_url, timeout=10)
    try:
        yield connection
    finally:
        await connection.close()


def environment(**settings: str) -> Callable[[Path], Options]:
    """Return options with these settings for all services."""

    def options(_: Path) -> Options:
        values: Mapping[str, str] = settings
        return Options(environment=values)

    return options
