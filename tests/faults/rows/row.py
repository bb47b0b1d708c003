"""What a row is, and what is common to looking for what it must show."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from shared.clock import next_boundary, utc_now
from tests.faults import telemetry
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.population import Population
from tests.faults.signs import Sign
from tests.faults.system import SLOT, Options, System, running
from tests.faults.tampered import WHEN, runner
from tests.waiting import eventually

ARMED = "armed"
STRUCK_SECONDS_MAX = 20.0
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
    signs: tuple[Sign, ...] = ()
    """How an operator sees it."""


async def next_slots(slots: int) -> None:
    """Wait until so many slots have begun."""
    until = next_boundary(utc_now(), SLOT) + (slots - 1) * SLOT
    await asyncio.sleep((until - utc_now()).total_seconds() + 0.05)


async def metric(service: Service, sample: str) -> float:
    """Return the sum of a service's samples, such as `snapshot_shards_total{outcome="taken"}`; 0 without one."""
    _, text = await service.ask("metrics")
    return sum(each.value for each in telemetry.samples(text, sample))


async def total(services: list[Service], sample: str) -> float:
    """Return the sum of a sample over several services."""
    return sum([await metric(service, sample) for service in services])


def said(service: Service, event: str, *, since: datetime) -> list[dict[str, Any]]:
    """Return what a service has logged of an event since then; a line that is just being written comes later."""
    return [
        line
        for line in telemetry.log_lines(service.log)
        if line["event"] == event and datetime.fromisoformat(line["timestamp"]) >= since
    ]


async def control(system: System, method: str, path: str, body: object = None) -> Any:
    """Ask something of the market simulator, past what Alpaca has."""
    async with system.http.request(
        method, f"{system.market.health_url}/simulator/{path}", json=body
    ) as answer:
        assert answer.status < 300, await answer.text()
        return await answer.json()


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


def tampered_when_armed(service: str, tampering: str) -> Callable[[Path], Options]:
    """Return options in which the first replica of a service that comes to a point after `arm` is struck there."""

    def options(folder: Path) -> Options:
        return Options(wrapper={service: runner(service, tampering)}, environment={WHEN: str(folder / ARMED)})

    return options


def arm(system: System, whom: str = "") -> None:
    """Let the fault strike from now on, with what concerns `whom`: those who look on do so already."""
    (system.folder / ARMED).write_text(whom)


async def armed_to_die(system: System, kind: str) -> Service:
    """Arm the tampering with a kind of service; return the replica that has killed itself, as soon as it has."""
    before = deaths(system, kind)
    arm(system)
    return await died_since(system, kind, before)


def deaths(system: System, kind: str) -> dict[str, int]:
    """Return how many processes each replica of a service has been, and is no more."""
    return {each.name: len(each.exit_codes) for each in system.services[kind]}


async def died_since(system: System, kind: str, before: Mapping[str, int]) -> Service:
    """Wait until a replica has died of SIGKILL that had died so often `before`; return it."""

    async def dead() -> Service | None:
        return next(
            (
                each
                for each in system.services[kind]
                if -signal.SIGKILL in each.exit_codes[before[each.name] :]
            ),
            None,
        )

    found = await eventually(dead, timeout=STRUCK_SECONDS_MAX)
    assert found is not None
    return found


async def all_are_ready(system: System) -> bool:
    """Tell whether all services are ready."""
    return all(await asyncio.gather(*(service.is_ready() for service in system.all_services)))


async def seconds_to_health(system: System, seconds_max: float) -> float:
    """Wait until all services are ready; return how long that takes from now."""
    return await seconds_until(partial(all_are_ready, system), seconds_max)


async def confirmed_at(system: System) -> datetime:
    """Return when a price was last confirmed."""
    async with session(system) as connection:
        at: datetime = await connection.fetchval("SELECT max(updated_at) FROM asset_prices")
    return at


async def seconds_to_prices(system: System, seconds_max: float) -> float:
    """Wait until a price is confirmed as of a later time than now; return how long that takes.

    A write that is under way already has an earlier time: it does not count.
    """
    since = system.now()

    async def is_confirmed() -> bool:
        return await confirmed_at(system) > since

    seconds = await seconds_until(is_confirmed, 2 * seconds_max)
    assert seconds <= seconds_max, f"prices after {seconds:.1f} s"
    return seconds


def environment(**settings: str) -> Callable[[Path], Options]:
    """Return options with these settings for all services."""

    def options(_: Path) -> Options:
        values: Mapping[str, str] = settings
        return Options(environment=values)

    return options
