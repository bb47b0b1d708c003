"""What processes use that live through a soak: it must be flat.

One that is killed every half minute never grows old enough to show a leak. So one replica of each kind is spared: it is
frozen, its servers die and its peers die, but nobody ends it. PostgreSQL and NATS are not spared, and measured
whenever they are there.
"""

import asyncio
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field

import psutil

from tests.faults import checker
from tests.faults.parts import Part, Service
from tests.faults.system import System

SAMPLE_SECONDS_MAX = 30.0
SAMPLES_MIN = 20
"""In a short soak samples are taken more often: of so few something can be said."""
WARM_UP_SHARE = 0.2
"""Of all samples, the first, that do not count: caches and pools are filled then."""
MEMORY_MB = "memory_mb"
MORE_MAX = {
    "tasks": (1.1, 30.0),
    "threads": (1.0, 2.0),
    "files": (1.1, 20.0),
    "connections": (1.0, 9.0),
    MEMORY_MB: (1.1, 8.0),
}
"""What the last third may use: so many times what the first third did, and so much more. Medians of both.

A feeder that stands by leads later, with two dozen tasks more; readers and watchers come and go with the other gateway;
a pool of ten may be filled only by the last freeze. What is left behind by each of some hundreds of faults is more.
"""
SERVER_MORE_MAX = {MEMORY_MB: (1.5, 50.0)}
"""Of servers, which are new every few minutes: what they have to load at their start must not grow, say."""

Sample = Mapping[str, float]


def spared(system: System, seed: int) -> list[Service]:
    """Return the replica of each kind that is not to be ended; with the next seed it is another."""
    return [replicas[seed % len(replicas)] for replicas in system.services.values()]


@dataclass
class Soak:
    """Samples of what those used who must live, and the servers, in the order of time."""

    system: System
    alive: Sequence[Service]
    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    _pids: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pids = {service.name: service.pids() for service in self.alive}

    @asynccontextmanager
    async def watched(self, seconds: float) -> AsyncIterator[None]:
        """Take samples while the block runs, which is to take about so many seconds."""
        watching = asyncio.create_task(self._watch(min(SAMPLE_SECONDS_MAX, seconds / SAMPLES_MIN)))
        try:
            yield
        finally:
            watching.cancel()
            outcome = (await asyncio.gather(watching, return_exceptions=True))[0]
        if not isinstance(outcome, asyncio.CancelledError):
            raise outcome or AssertionError("ended by itself")

    async def _watch(self, every_seconds: float) -> None:
        while True:
            for service in self.alive:
                used = None if service.spell else await checker.usage_of(service)
                if used is not None:
                    self.samples[service.name].append(asdict(used))
            for server in self.system.servers:
                memory_mb = await asyncio.to_thread(_memory_mb, server)
                if memory_mb:
                    self.samples[server.name].append({MEMORY_MB: memory_mb})
            await asyncio.sleep(every_seconds)

    def verdict(self) -> tuple[str, list[str]]:
        """Return the figures in words, and who grew, or did not live to the end."""
        said, found = [], []
        for service in self.alive:
            if service.pids() != self._pids[service.name]:
                found.append(f"{service.name} did not live through it: {service.last_error()}")
        for part in (*self.alive, *self.system.servers):
            bounds = MORE_MAX if part in self.alive else SERVER_MORE_MAX
            figures, grown = compared(part.name, self.samples[part.name], bounds)
            said.append(figures)
            found += grown
        return "; ".join(said), found


def compared(
    name: str, samples: Sequence[Sample], bounds: Mapping[str, tuple[float, float]]
) -> tuple[str, list[str]]:
    """Compare what the last third of the samples shows with the first third; return it in words, and what grew."""
    counted = samples[int(len(samples) * WARM_UP_SHARE) :]
    third = len(counted) // 3
    if not third:
        return f"{name} {len(samples)} samples", [f"{name}: {len(samples)} samples are too few"]
    said, found = [], []
    for what, (times, more) in bounds.items():
        first = statistics.median(sample[what] for sample in counted[:third])
        last = statistics.median(sample[what] for sample in counted[-third:])
        said.append(f"{what} {first:.0f} → {last:.0f}")
        if last > first * times + more:
            found.append(f"{name}: {what} grew from {first:.0f} to {last:.0f}")
    return f"{name} {', '.join(said)}", found


def _memory_mb(server: Part) -> float:
    """Return the memory of a server's processes, what they share counted once; 0 when it is not there."""
    memory = 0
    for pid in server.pids():
        with suppress(psutil.NoSuchProcess):
            memory += psutil.Process(pid).memory_full_info().pss
    return memory / 1e6
