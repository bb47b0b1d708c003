"""Kills and freezes by a seeded schedule, while users read and order and prices move."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from shared.clock import next_boundary
from tests.faults import checker
from tests.faults.checker import Verdict
from tests.faults.parts import START_SECONDS_MAX, Part, Postgres, Service
from tests.faults.readers import Readers
from tests.faults.soak import Soak, spared
from tests.faults.system import SLOT, System
from tests.faults.watchers import Watchers
from tests.waiting import eventually

READERS = 6
WATCHERS = 6
SERVER_SHARE = 0.2
"""So many of all acts befall PostgreSQL and NATS."""
FREEZE_SECONDS = (0.5, 6.0)
SERVER_FREEZE_SECONDS = (0.3, 3.0)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Act:
    """Something that is done to a part, so many seconds after the beginning."""

    at_seconds: float
    part: str
    what: str
    """`kill`, `freeze` or `stop`."""
    for_seconds: float = 0.0
    """How long it stays frozen."""


def schedule(
    system: System, seed: int, *, acts: int, seconds: float, spared: Sequence[Service] = ()
) -> list[Act]:
    """Draw so many acts, spread over so many seconds; those who are spared are frozen, and not ended."""
    chance = random.Random(seed)
    services = [service.name for service in system.all_services]
    mortal = [service.name for service in system.all_services if service not in spared]
    servers = [server.name for server in system.servers]
    drawn = []
    for number in range(acts):
        at = seconds * (number + chance.random()) / acts
        is_server = chance.random() < SERVER_SHARE
        what = chance.choices(("kill", "freeze", "stop"), (5, 4, 1))[0]
        part = chance.choice(servers if is_server else services if what == "freeze" else mortal)
        lasts = chance.uniform(*(SERVER_FREEZE_SECONDS if is_server else FREEZE_SECONDS))
        drawn.append(Act(at, part, what, lasts if what == "freeze" else 0.0))
    return drawn


async def play(system: System, acts: Sequence[Act], say: Say) -> Counter[str]:
    """Do all that is scheduled; return how many acts of each sort were done."""
    began = time.monotonic()
    done: Counter[str] = Counter()
    async with asyncio.TaskGroup() as tasks:
        for act in acts:
            await asyncio.sleep(max(0.0, began + act.at_seconds - time.monotonic()))
            part = system.part(act.part)
            # One that has just ended is struck as soon as it comes up: there is nothing to be killed yet.
            await eventually(partial(_is_there, part), timeout=START_SECONDS_MAX)
            lasts = f" for {act.for_seconds:.1f} s" if act.for_seconds else ""
            say(f"{time.monotonic() - began:7.1f} s  {act.what:<7} {act.part}{lasts}")
            done[act.what] += 1
            tasks.create_task(_do(part, act))
    return done


async def _is_there(part: Part) -> bool:
    return bool(part.pids())


async def _do(part: Part, act: Act) -> None:
    if act.what == "kill":
        part.kill()
    elif act.what == "stop":
        await part.terminate(signal.SIGINT if isinstance(part, Postgres) else signal.SIGTERM)
    else:
        struck = part.process
        part.freeze()
        await asyncio.sleep(act.for_seconds)
        if part.process is struck:
            part.thaw()


@dataclass
class Life:
    """What goes on in a system while faults are injected."""

    readers: Readers
    watchers: Watchers
    used: dict[str, checker.Usage]
    first: datetime
    """The first slot that is due."""

    async def verdict(self, system: System) -> Verdict:
        """Wait until all is quiet, and compare everything up to now with what must be there."""
        last = next_boundary(system.now(), SLOT)
        verdict = await checker.check(system, self.readers, self.first, last, used=self.used)
        verdict.counts["streams"] = dict(sorted(self.watchers.counts.items()))
        verdict.add("stream", self.watchers.wrong)
        return verdict


@asynccontextmanager
async def lively(
    system: System, seed: int, *, readers: int = READERS, watchers: int = WATCHERS
) -> AsyncIterator[Life]:
    """Let users read, watch and order while the block runs."""
    stop = asyncio.Event()
    used = await checker.usage(system)
    life = Life(Readers(system), Watchers(system), used, next_boundary(system.now(), SLOT))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(life.readers.run(readers, stop, seed))
        tasks.create_task(life.watchers.run(watchers, stop, seed))
        tasks.create_task(system.population.place_orders(system.database_url, stop, seed))
        try:
            yield life
        finally:
            stop.set()


async def run(
    system: System, seed: int, *, acts: int, seconds: float, say: Say
) -> tuple[Counter[str], Verdict]:
    """Play a mix, heal everything, and return how many acts of each sort there were and what the checker says."""
    async with lively(system, seed) as life:
        done = await play(system, schedule(system, seed, acts=acts, seconds=seconds), say)
        say(f"{'':7}    healing")
        await system.heal()
    return done, await life.verdict(system)


async def run_soak(
    system: System, seed: int, *, acts: int, seconds: float, say: Say
) -> tuple[Counter[str], Verdict]:
    """Play a mix that spares one replica of each kind; what these use at its end must be what they used before."""
    soak = Soak(system, spared(system, seed))
    say(f"{'':7}    {', '.join(service.name for service in soak.alive)} must live")
    async with lively(system, seed) as life:
        async with soak.watched(seconds):
            drawn = schedule(system, seed, acts=acts, seconds=seconds, spared=soak.alive)
            done = await play(system, drawn, say)
        say(f"{'':7}    healing")
        await system.heal()
    verdict = await life.verdict(system)
    verdict.counts["flat"], grown = soak.verdict()
    verdict.add("growth", grown)
    return done, verdict
