"""Clocks that leap an hour ahead and back, one replica's and everybody's, and changes of clocks in New York."""

import asyncio
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from shared.clock import utc_now
from tests.faults import clocks
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.rows.feeders import lease_holder
from tests.faults.rows.row import Row, confirmed_at, next_slots, session
from tests.faults.signs import Sign
from tests.faults.system import Options, System
from tests.waiting import eventually

HOUR = timedelta(hours=1)
DAY_SECONDS = 86_400
CLOSE = timedelta(seconds=5)
SLOTS = 6
READ_SECONDS_MAX = 15.0
"""Until a service has noticed, at its next look at PostgreSQL's clock."""
BEFORE_CHANGE = timedelta(seconds=75)
"""What the system has to start."""
AFTER_CHANGE = timedelta(seconds=10)

ENDS_AT, OPENS_AFTER_END = datetime(2026, 11, 1, 6, tzinfo=UTC), "2026-11-02T14:30:00Z"
"""New York goes from 02:00 to 01:00; on Monday its market opens at 09:30 of standard time."""
BEGINS_AT, OPENS_AFTER_BEGIN = datetime(2026, 3, 8, 7, tzinfo=UTC), "2026-03-09T13:30:00Z"
"""New York goes from 02:00 to 03:00; on Monday its market opens at 09:30 of daylight time."""

_SAID = re.compile(r"the clock is ([+-]\d+) s ahead of PostgreSQL's")
_STRAY = """
SELECT count(*) FROM portfolio_snapshots
WHERE timestamp > clock_timestamp() + interval '5 seconds' OR timestamp < $1
"""
_OLDEST = "SELECT min(timestamp) FROM portfolio_snapshots"


async def _leaps(system: System, life: Life) -> str:
    # A gateway goes by its own clock when it judges tokens; the readers' would not last.
    life.readers.token_seconds = DAY_SECONDS
    seen = []
    async with session(system) as connection:
        oldest = await connection.fetchval(_OLDEST)
    assert utc_now() - oldest < HOUR, (
        f"the oldest slot is of {oldest}: one of an hour ago would not be noticed"
    )
    for name, services in (
        ("snapshotter", [system.services["snapshotter"][0]]),
        ("feeder with the lease", [await lease_holder(system)]),
        ("gateway", [system.services["api_gateway"][0]]),
        ("all services", system.all_services),
        ("market and all services", [system.market, *system.all_services]),
    ):
        for ahead in (HOUR, -HOUR):
            try:
                await _leap(system, services, ahead, oldest)
            except AssertionError as error:
                raise AssertionError(f"{name} {ahead.total_seconds():+g} s: {error}") from error
        seen.append(name)
    return f"{', '.join(seen)}: each an hour ahead and an hour behind, noted in /readyz; slots and prices went on"


async def _leap(system: System, services: Sequence[Service], ahead: timedelta, oldest: datetime) -> None:
    """Let the clocks of some leap, and back again."""
    for service in services:
        system.clocks[service.name].set_ahead(ahead)
    for service in services:
        if service is not system.market:
            await eventually(partial(_notes_its_clock, service, ahead), timeout=READ_SECONDS_MAX, every=0.2)
    await next_slots(SLOTS)
    await _check_ages(system)
    async with session(system) as connection:
        stray = await connection.fetchval(_STRAY, oldest)
        assert not stray, (
            f"{stray} snapshots ahead of their time, or of before {oldest:%H:%M:%S}, the first slot"
        )
        newest = await connection.fetchval("SELECT max(timestamp) FROM portfolio_snapshots")
        assert utc_now() - newest < CLOSE, f"the newest slot is of {newest}"
    if system.market not in services:  # a market in another time is not believed
        await eventually(partial(_is_confirmed_now, system), timeout=READ_SECONDS_MAX, every=0.2)
    for service in services:
        system.clocks[service.name].set_ahead(timedelta(0))
    await eventually(partial(_is_confirmed_now, system), timeout=READ_SECONDS_MAX, every=0.2)
    await next_slots(2)


async def _check_ages(system: System) -> None:
    """Check that no gateway takes prices for an hour older than they are."""
    holder = next(user for user in system.population.active if user.shares)
    token = system.token(holder.subject, lasts_seconds=DAY_SECONDS)
    for gateway, port in system.gateway_ports.items():
        found = await _current(system, port, token)
        assert found["positions"], found
        statuses = {position["price_status"] for position in found["positions"]}
        assert "stale" not in statuses, f"{gateway} shows prices as {statuses}"


async def _notes_its_clock(service: Service, ahead: timedelta) -> bool:
    """Tell whether a service says how wrong its clock is, and is ready all the same."""
    status, text = await service.ask("readyz")
    if status != 200:
        return False
    said = str(json.loads(text)["checks"]["clock"])
    found = _SAID.fullmatch(said)
    assert found, f"{service.name} says of its clock: {said}"
    return abs(timedelta(seconds=int(found[1])) - ahead) < CLOSE


async def _is_confirmed_now(system: System) -> bool:
    return abs(utc_now() - await confirmed_at(system)) < CLOSE


# ---- daylight saving -----------------------------------------------------------------------------


async def _change(system: System, _: Life, *, at: datetime, opens: str) -> str:
    left = (at - system.now()).total_seconds()
    assert left > 0, f"the system needed {-left:.0f} s too long to start before the clocks changed"
    before = await _next_open(system)
    await asyncio.sleep((at + AFTER_CHANGE - system.now()).total_seconds())
    after = await _next_open(system)
    assert before == after == opens, f"the market opens at {before}, then at {after}, and should at {opens}"
    async with session(system) as connection:
        slots = await connection.fetchval(
            "SELECT count(DISTINCT timestamp) FROM portfolio_snapshots WHERE timestamp > $1 AND timestamp <= $2",
            at - AFTER_CHANGE / 2,
            at + AFTER_CHANGE / 2,
        )
    seconds = AFTER_CHANGE.total_seconds()
    assert slots == seconds, f"{slots} slots in the {seconds:g} s around the change"
    return f"{slots} slots in the {seconds:g} s around {at:%Y-%m-%d %H:%M} UTC; the market opens at {opens}"


async def _next_open(system: System) -> str:
    """Return when the market opens next, as a gateway says."""
    token = system.token(system.population.active[0].subject, lasts_seconds=DAY_SECONDS)
    found = await _current(system, next(iter(system.gateway_ports.values())), token)
    return str(found["market"]["next_open"])


async def _current(system: System, port: int, token: str) -> Any:
    async with system.http.get(
        f"http://127.0.0.1:{port}/api/portfolio/current",
        headers={"Authorization": f"Bearer {token}"},
        timeout=aiohttp.ClientTimeout(total=10),
    ) as answer:
        assert answer.status == 200, f"{answer.status}"
        return await answer.json()


def _true_clocks(_: Path) -> Options:
    return Options(clocks_ahead=timedelta(0))


def _shortly_before(at: datetime, _: Path) -> Options:
    return Options(clocks_ahead=at - BEFORE_CHANGE - utc_now())


ROWS = (
    Row(
        14,
        "clocks leap an hour ahead and an hour back",
        "libfaketime: a snapshotter's, a feeder's, a gateway's, all services', and the market's with them",
        _leaps,
        _true_clocks,
        clocks.missing,
        signs=(Sign("clock", "foliotick_clock_apart_seconds", "clock_wrong"),),
    ),
    *(
        Row(
            14,
            f"daylight saving {what} in New York",
            f"libfaketime: the whole system runs at {at:%Y-%m-%d %H:%M} UTC",
            partial(_change, at=at, opens=opens),
            partial(_shortly_before, at),
            clocks.missing,
        )
        for what, at, opens in (
            ("ends", ENDS_AT, OPENS_AFTER_END),
            ("begins", BEGINS_AT, OPENS_AFTER_BEGIN),
        )
    ),
)
