"""PostgreSQL and NATS that restart, die and freeze."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.faults import checker
from tests.faults.mix import Life
from tests.faults.parts import Part, frozen
from tests.faults.readers import DEADLINE_SECONDS, LATE_SECONDS_MAX
from tests.faults.rows.market_streams import watched
from tests.faults.rows.row import Row, next_slots, seconds_to_health, session
from tests.faults.signs import NATS_AWAY, POSTGRES_AWAY, Sign, shown
from tests.faults.system import System
from tests.waiting import eventually

HEALTHY_SECONDS_MAX = 3.0
POSTGRES_AWAY_SECONDS = 3.0
FROZEN_SECONDS = 12.0
NATS_AWAY_SECONDS = 12.0
CONFIRMED_SECONDS_MAX = 6.0
"""How old a price may become while NATS is away: a round begins every second, and waits 3 s for acknowledgements."""
USAGE_SECONDS_MAX = 10.0
STOPPED, KILLED, FROZEN = "stopped", "killed", "frozen"
CROWD = 200
"""Clients besides the usual ones; each asks either gateway, and again when it is refused."""
TASKS_OF_A_CLIENT = 2
"""Its connection, and its request."""
FEW = 40
"""Tasks and files more for the usual readers, and streams that are opened again."""
REFUSED_MIN = TASKS_OF_A_CLIENT * CROWD + 2 * FEW
"""By each gateway, on the average: if each left a task behind, there would be too many."""


@asynccontextmanager
async def away(part: Part, how: str) -> AsyncIterator[None]:
    """Let a part be STOPPED, KILLED or FROZEN while the block runs, and come back after it."""
    if how == FROZEN:
        async with frozen(part):
            yield
        return
    if how == KILLED:
        part.lose()
    await part.end()
    try:
        yield
    finally:
        await part.start()


async def usage_of_all(system: System) -> dict[str, checker.Usage]:
    """Return what each service uses, as soon as all say so: one that is in trouble must not be left out."""
    names = {service.name for service in system.all_services}

    async def is_said() -> dict[str, checker.Usage]:
        used = await checker.usage(system)
        assert used.keys() == names, f"{sorted(names - used.keys())} do not say what they use"
        return used

    return await eventually(is_said, timeout=USAGE_SECONDS_MAX, every=0.2)


def seconds_of_slowest(life: Life) -> float:
    """Check that everybody who was not cut off was answered in time; return after how long the slowest was."""
    unexcused = life.readers.unexcused()
    assert not unexcused, f"{len(unexcused)} requests went wrong without an excuse: {unexcused[0]}"
    slowest = life.readers.slowest_seconds
    assert slowest < DEADLINE_SECONDS + LATE_SECONDS_MAX, f"an answer after {slowest:.1f} s"
    return slowest


async def _postgres_restarts(system: System, life: Life) -> str:
    seen = []
    for how, words in ((STOPPED, "fast"), (KILLED, "kill -9")):
        async with shown(system, POSTGRES_AWAY):
            async with away(system.postgres, how):
                await asyncio.sleep(POSTGRES_AWAY_SECONDS)
            await system.postgres.wait_until_ready()
            seconds = await seconds_to_health(system, 60)
        assert seconds <= HEALTHY_SECONDS_MAX, f"healthy {seconds:.1f} s after it was back ({words})"
        seen.append(f"{words}: healthy {seconds:.1f} s after its return")
        await next_slots(2)
    refused = len(life.readers.refused)
    return f"{'; '.join(seen)}; {refused} refused with 503"


async def _postgres_frozen(system: System, life: Life) -> str:
    gateways = system.services["api_gateway"]
    before = await usage_of_all(system)
    async with frozen(system.postgres), _crowd(life):
        until = time.monotonic() + FROZEN_SECONDS
        refused = len(life.readers.refused)

        async def are_red() -> bool:
            return not any([await gateway.is_ready() for gateway in gateways])

        await eventually(are_red, timeout=FROZEN_SECONDS)
        for gateway in gateways:
            status, _ = await gateway.ask("healthz")
            assert status == 200, f"{gateway.name} is not live"
        await asyncio.sleep(until - time.monotonic())
        during = await usage_of_all(system)
        refused = len(life.readers.refused) - refused
    seconds = await seconds_to_health(system, 60)
    assert seconds <= HEALTHY_SECONDS_MAX, f"healthy {seconds:.1f} s after it went on"
    slowest = seconds_of_slowest(life)
    assert refused >= len(gateways) * REFUSED_MIN, f"only {refused} refused: that is no crowd"
    for service in system.all_services:
        connected = CROWD if service in gateways else 0
        tasks, files = (getattr(during[service.name], what) for what in ("tasks", "files"))
        tasks_max = before[service.name].tasks + TASKS_OF_A_CLIENT * connected + FEW
        assert tasks <= tasks_max, f"{service.name} has {tasks} tasks, more than {tasks_max}"
        files_max = before[service.name].files + connected + FEW
        assert files <= files_max, f"{service.name} has {files} files, more than {files_max}"
    most = max(during[gateway.name].tasks for gateway in gateways)
    return (
        f"ready red, live green, {refused} refused, the slowest after {slowest:.1f} s, {most} tasks at most for "
        f"{CROWD} clients; healthy {seconds:.1f} s after it went on"
    )


@asynccontextmanager
async def _crowd(life: Life) -> AsyncIterator[None]:
    """Let many more read while the block runs: each that is refused asks again at once."""
    stop = asyncio.Event()
    reading = asyncio.create_task(life.readers.run(CROWD, stop, CROWD))
    try:
        yield
    finally:
        stop.set()
        await reading


async def _backends_terminated(system: System, life: Life) -> str:
    ended = 0
    async with session(system) as connection:
        for _ in range(20):
            ended += await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() "
                "AND application_name IN ('api_gateway', 'snapshotter', 'price_feeder', 'price_feeder_lease')"
            )
            await asyncio.sleep(0.37)  # not in step with the slots
    assert not life.readers.refused, f"{len(life.readers.refused)} refused: {life.readers.refused[0]}"
    return f"{ended} backends terminated, no request refused"


async def _nats_away(system: System, life: Life) -> str:
    seen = []
    for how in (STOPPED, KILLED, FROZEN):
        async with shown(system, NATS_AWAY):
            async with watched(system) as floor, away(system.nats, how):
                await asyncio.sleep(NATS_AWAY_SECONDS)
            await system.nats.wait_until_ready()
            seconds = await seconds_to_health(system, 60)
        oldest = floor.oldest_seconds
        assert oldest <= CONFIRMED_SECONDS_MAX, f"a price of {oldest:.1f} s while NATS was {how}"
        assert seconds <= HEALTHY_SECONDS_MAX, f"healthy {seconds:.1f} s after it was {how}"
        seen.append(f"{how}: no price older than {oldest:.1f} s, healthy {seconds:.1f} s after its return")
        await next_slots(2)
    assert not life.readers.refused, f"reads were refused: {life.readers.refused[0]}"
    return f"{'; '.join(seen)}; no read refused"


ROWS = (
    Row(
        7,
        "PostgreSQL restarts",
        f"fast shutdown, kill -9, back after {POSTGRES_AWAY_SECONDS:g} s",
        _postgres_restarts,
        signs=(POSTGRES_AWAY,),
    ),
    Row(
        8,
        "PostgreSQL frozen",
        f"SIGSTOP of all its processes for {FROZEN_SECONDS:g} s",
        _postgres_frozen,
        signs=(POSTGRES_AWAY,),
    ),
    Row(
        9,
        "backends terminated",
        "pg_terminate_backend, 20 times",
        _backends_terminated,
        signs=(Sign(metric="database_second_tries_total"),),
    ),
    Row(
        10,
        "NATS restarts, is killed, is frozen",
        f"SIGTERM, SIGKILL, SIGSTOP, each for {NATS_AWAY_SECONDS:g} s",
        _nats_away,
        signs=(NATS_AWAY,),
    ),
)
