"""SIGTERM at any moment, and a rolling restart of everything under load."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path

from shared.lifecycle import STOP_GRACE_SECONDS
from tests.faults import telemetry
from tests.faults.balancer import Balancer
from tests.faults.mix import Life
from tests.faults.parts import Service, frozen
from tests.faults.rows.row import Row, next_slots
from tests.faults.signs import Sign
from tests.faults.system import System
from tests.waiting import eventually

SEED = 21
MOMENTS = 2
"""In each situation, of each service."""
STARTING, WORKING, POSTGRES_FROZEN, NATS_FROZEN, MARKET_HANGING = (
    "starting",
    "working",
    "PostgreSQL frozen",
    "NATS frozen",
    "market hanging",
)
SITUATIONS = (STARTING, WORKING, POSTGRES_FROZEN, NATS_FROZEN, MARKET_HANGING)
FIRST_SECONDS, LAST_SECONDS = 0.2, 4.0
"""Within which the signal comes, since the situation began; imports take most of it."""
EXIT_SECONDS_MAX = STOP_GRACE_SECONDS
BALANCED_READERS = 6
ANSWERS_PER_SECOND_MIN = 10.0
"""Of all readers together, while each process is restarted; they ask ten times as often on an idle machine."""
SIGINT_CAUGHT = 0x2
"""In the mask of signals that a process catches: Python's interpreter catches SIGINT once it is about to run code."""


async def _at_any_moment(system: System, _: Life) -> str:
    """Let one replica of each service get SIGTERM in every situation; the other one carries on."""
    chance = random.Random(SEED)
    stopped: list[float] = []
    for situation, _moment in product(SITUATIONS, range(MOMENTS)):
        services = [chance.choice(replicas) for replicas in system.services.values()]
        moments = [chance.uniform(FIRST_SECONDS, LAST_SECONDS) for _ in services]
        async with _situation(system, situation):
            stopped += await asyncio.gather(
                *(
                    _stop(service, seconds, situation)
                    for service, seconds in zip(services, moments, strict=True)
                )
            )
        await system.heal()
        await next_slots(2)
    return (
        f"{len(stopped)} signals in {len(SITUATIONS)} situations: exit code 0 each time and no traceback, "
        f"after {max(stopped):.1f} s at most"
    )


@asynccontextmanager
async def _situation(system: System, situation: str) -> AsyncIterator[None]:
    if situation == POSTGRES_FROZEN:
        async with frozen(system.postgres):
            yield
    elif situation == NATS_FROZEN:
        async with frozen(system.nats):
            yield
    elif situation == MARKET_HANGING:
        url = f"{system.market.health_url}/simulator/faults"
        async with system.http.post(url, json={"kind": "hang", "times": 1000}) as answer:
            assert answer.status == 201, await answer.text()
        try:
            yield
        finally:
            async with system.http.delete(url) as answer:
                assert answer.ok, await answer.text()
    else:
        yield


async def _stop(service: Service, seconds: float, situation: str) -> float:
    """Send SIGTERM so many seconds into the situation; return how long the process then took to end."""
    if situation == STARTING:
        await _start_anew(service)
    await asyncio.sleep(seconds)
    said = telemetry.log_size(service.log)
    began = time.monotonic()
    code = await service.terminate()
    took = time.monotonic() - began
    what = f"{service.name} ({situation}, after {seconds:.1f} s)"
    assert code == 0, f"{what} ended with {code} after {took:.1f} s"
    assert took <= EXIT_SECONDS_MAX, f"{what} took {took:.1f} s to end"
    traces = telemetry.traces(service.log, said)
    assert not traces, f"{what} left a traceback in its log: {traces[0][:500]}"
    return took


async def _start_anew(service: Service) -> None:
    """Kill the service, and wait until its next process is about to run the first line of code."""
    before = service.process
    service.kill()

    async def is_running() -> bool:
        process = service.process
        return process is not None and process is not before and _catches_sigint(process.pid)

    await eventually(is_running, timeout=30, every=0.005)


def _catches_sigint(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & SIGINT_CAUGHT)


async def _rolling_restart(system: System, _: Life) -> str:
    """Restart every replica, one after the other, while a balancer reads through the gateways that are ready."""
    stop = asyncio.Event()
    balancer = Balancer(system)
    stopped, rates = [], []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(balancer.run(BALANCED_READERS, stop, SEED))
        try:
            await next_slots(2)
            for service in system.all_services:
                began, answered = time.monotonic(), balancer.readers.counts["200"]
                stopped.append(await _stop(service, 0.0, "rolling restart"))
                await service.wait_until_ready()
                await next_slots(1)
                answered = balancer.readers.counts["200"] - answered
                rates.append(answered / (time.monotonic() - began))
                assert rates[-1] >= ANSWERS_PER_SECOND_MIN, (
                    f"only {answered} answers while {service.name} was restarted"
                )
        finally:
            stop.set()
    lost = balancer.lost()
    assert not lost, f"{len(lost)} of {balancer.readers.counts.total()} requests were lost: {lost[0]}"
    assert not balancer.readers.wrong, balancer.readers.wrong[0]
    return (
        f"{len(stopped)} processes restarted in turn, each gone after {max(stopped):.1f} s at most; "
        f"{balancer.readers.counts['200']} requests answered, {min(rates):.0f} a second at least, none lost, "
        f"{balancer.retries} sent to another gateway"
    )


STOPPING = (Sign("draining", "gateway_draining", "draining"),)
ROWS = (
    Row(
        21,
        "SIGTERM at any moment",
        f"SIGTERM, {MOMENTS} times for each service while {', '.join(SITUATIONS)}",
        _at_any_moment,
        signs=STOPPING,
    ),
    Row(
        21,
        "rolling restart under load",
        "SIGTERM to one replica after the other",
        _rolling_restart,
        signs=STOPPING,
    ),
)
