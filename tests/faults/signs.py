"""What an operator sees of a fault: a check that is not well, a metric that moves, a line that says what to do."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.faults.parts import Service
from tests.faults.system import System

LOOK_SECONDS = 0.4
GONE = "no answer"
"""In place of a check: the process itself does not answer."""


@dataclass(frozen=True)
class Sign:
    """Three ways in which a fault shows, in whichever services; one that is empty is not to be seen."""

    check: str = ""
    """A check of `/readyz` that is not well, or GONE."""
    metric: str = ""
    """A metric that moves, with one of its labels if need be: `snapshot_shards_total{outcome="skipped"}`."""
    line: str = ""
    """An event of the log; as a warning or error it has an `advice`."""

    def __str__(self) -> str:
        check = self.check if self.check == GONE else f"`/readyz` `{self.check}`" if self.check else ""
        return ", ".join(filter(None, (check, *(f"`{each}`" for each in (self.metric, self.line) if each))))


POSTGRES_AWAY = Sign("postgres", "database_unavailable_total", "check_failed")
NATS_AWAY = Sign("nats", "bus_problems_total", "bus_problem")


@dataclass
class Lookout:
    """Looks at all services again and again, as an operator's tools do."""

    services: Sequence[Service]
    metrics: Sequence[str]
    checks: set[str] = field(default_factory=set)
    """Those that were seen not to be well."""
    moved: set[str] = field(default_factory=set)
    """Metrics that were seen to move."""
    _first: dict[tuple[int, str], float] = field(default_factory=dict)
    _log_sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._log_sizes = {
            service.name: service.log.stat().st_size for service in self.services if service.log.exists()
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop` is set; what a process had moved before does not count."""
        async with asyncio.TaskGroup() as tasks:
            for service in self.services:
                tasks.create_task(self._watch(service, stop))

    async def _watch(self, service: Service, stop: asyncio.Event) -> None:
        pids = service.pids()
        while not stop.is_set():
            status, text = await service.ask("readyz")
            if not status:
                self.checks.add(GONE)
            elif (said := json.loads(text))["status"] != "ready":
                self.checks |= {check for check, result in said["checks"].items() if result != "ok"}
            if self.metrics and status:
                _, text = await service.ask("metrics")
                self._compare(service, text, is_new=service.pids() != pids)
            await asyncio.sleep(LOOK_SECONDS)

    def _compare(self, service: Service, text: str, *, is_new: bool) -> None:
        pid = next(iter(service.pids()), 0)
        for metric in self.metrics:
            value = sum(_values(metric, text))
            first = self._first.setdefault((pid, metric), 0.0 if is_new else value)
            if abs(value - first) >= 0.5:
                self.moved.add(metric)

    def missing(self, signs: Sequence[Sign]) -> list[str]:
        """Return which of these signs were not to be seen."""
        said = list(self._lines())
        found = []
        for sign in signs:
            if sign.check and sign.check not in self.checks:
                found.append(f"/readyz does not show {sign.check}, but {sorted(self.checks)}")
            if sign.metric and sign.metric not in self.moved:
                found.append(f"{sign.metric} has not moved")
            if sign.line:
                lines = [line for line in said if line["event"] == sign.line]
                mute = [line for line in lines if line["level"] != "info" and not line.get("advice")]
                if not lines or mute:
                    found.append(f"the log has no {sign.line} with an advice{f': {mute[0]}' if mute else ''}")
        return found

    def _lines(self) -> Iterator[dict[str, object]]:
        """Yield what the services have logged since the lookout began."""
        for service in self.services:
            with service.log.open("rb") as log:
                log.seek(self._log_sizes.get(service.name, 0))
                for line in log:
                    if line.startswith(b"{") and line.endswith(b"}\n"):
                        yield json.loads(line)


@asynccontextmanager
async def looking_out(system: System, signs: Sequence[Sign]) -> AsyncIterator[Lookout]:
    """Look out for these signs while the block runs."""
    stop = asyncio.Event()
    lookout = Lookout(system.all_services, sorted({sign.metric for sign in signs if sign.metric}))
    looking = asyncio.create_task(lookout.run(stop))
    try:
        yield lookout
    finally:
        stop.set()
        await looking


def _values(metric: str, text: str) -> Iterator[float]:
    """Yield the values of the samples of a metric, those with its label if it names one."""
    name, _, label = metric.rstrip("}").partition("{")
    for line in text.splitlines():
        if line.startswith((f"{name} ", f"{name}{{")) and label in line:
            yield float(line.rpartition(" ")[2])
