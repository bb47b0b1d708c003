"""PostgreSQL and NATS that restart, die and freeze."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.faults import checker
from tests.faults.mix import Life
from tests.faults.parts import frozen
from tests.faults.readers import DEADLINE_SECONDS, LATE_SECONDS_MAX
from tests.faults.rows.row import Row, confirmed_at, next_slots, seconds_to_health, session
from tests.faults.signs import NATS_AWAY, POSTGRES_AWAY, Sign
from tests.faults.system import System
from tests.waiting import eventually

HEALTHY_SECONDS_MAX = 3.0
FROZEN_SECONDS = 12.0
CROWD = 200
"""Clients besides the usual ones; each asks either gateway, and again when it is refused."""
TASKS_OF_A_CLIENT = 2
"""Its connection, and its request."""
FEW = 40
"""Tasks and files more for the usual readers, and streams that are opened again."""
REFUSED_MIN = TASKS_OF_A_CLIENT * CROWD + 2 * FEW
"""By each gateway, on the average: if each left a task behind, there would be too many."""


async def _postgres_restarts(system: System, life: Life) -> str:
    seen = []
    for what in ("fast", "kill -9"):
        if what == "fast":
            await system.postgres.terminate()
        else:
            system.postgres.kill()
        await system.postgres.wait_until_ready()
        seconds = await seconds_to_health(system, 60)
        assert seconds <= HEALTHY_SECONDS_MAX, f"healthy {seconds:.1f} s after it was back ({what})"
        seen.append(f"{what}: healthy {seconds:.1f} s after its return")
        await next_slots(2)
    refused = len(life.readers.refused)
    return f"{'; '.join(seen)}; {refused} refused with 503"


async def _postgres_frozen(system: System, life: Life) -> str:
    gateways = system.services["api_gateway"]
    before = await checker.usage(system)
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
        during = await checker.usage(system)
        refused = len(life.readers.refused) - refused
    seconds = await seconds_to_health(system, 60)
    assert seconds <= HEALTHY_SECONDS_MAX, f"healthy {seconds:.1f} s after it went on"
    slowest = life.readers.slowest_seconds
    assert slowest <= DEADLINE_SECONDS + LATE_SECONDS_MAX, f"an answer after {slowest:.1f} s"
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
    for what in ("stopped", "killed", "frozen"):
        before = await confirmed_at(system)
        if what == "frozen":
            async with frozen(system.nats):
                await asyncio.sleep(5)
        elif what == "killed":
            system.nats.kill()
        else:
            await system.nats.terminate(signal.SIGTERM)
        assert await confirmed_at(system) > before or what != "frozen", "prices were not written meanwhile"
        await system.nats.wait_until_ready()
        seconds = await seconds_to_health(system, 60)
        assert seconds <= HEALTHY_SECONDS_MAX, f"healthy {seconds:.1f} s after it was {what}"
        seen.append(f"{what}: healthy {seconds:.1f} s after its return")
        await next_slots(2)
    assert not life.readers.refused, f"reads were refused: {life.readers.refused[0]}"
    return f"{'; '.join(seen)}; no read refused"


ROWS = (
    Row(7, "PostgreSQL restarts", "fast shutdown, kill -9", _postgres_restarts, signs=(POSTGRES_AWAY,)),
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
    Row(10, "NATS restarts, is killed, is frozen", "signals", _nats_away, signs=(NATS_AWAY,)),
)
