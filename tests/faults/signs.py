"""What an operator sees of a fault: a check that is not well, a metric that moves, a line that says what to do."""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from shared.health import REMEMBERED_SECONDS
from tests.faults.parts import Service
from tests.faults.system import System
from tests.faults.telemetry import COUNTER, log_lines, log_size, samples
from tests.waiting import eventually

LOOK_SECONDS = 0.4
SEEN_SECONDS_MAX = 8.0
"""After a strike is over its signs may still come for so long: a process looks by itself every five seconds."""
WELL_SECONDS_MAX = 75.0
"""After all is healed no check may show it for longer: some tell for a minute of what has happened."""
MOVED_MIN = 0.5
GONE = "no answer"
"""In place of a check: the process itself does not answer."""


@dataclass(frozen=True)
class Sign:
    """Three ways in which a fault shows, in whichever services; one that is empty is not to be seen."""

    check: str = ""
    """A check of `/readyz` that is not well, or GONE."""
    metric: str = ""
    """A metric that moves, with some of its labels if need be: `snapshot_shards_total{outcome="skipped"}`."""
    line: str = ""
    """An event of the log; as a warning or error it has an `advice`."""
    words: str = ""
    """What the check says, if it must say more than that something is the matter."""

    def __str__(self) -> str:
        check = self.check if self.check == GONE else f"`/readyz` `{self.check}`" if self.check else ""
        return ", ".join(filter(None, (check, *(f"`{each}`" for each in (self.metric, self.line) if each))))


POSTGRES_AWAY = Sign("postgres", "database_unavailable_total", "check_failed")
NATS_AWAY = Sign("nats", "bus_problems_total", "bus_problem")


@dataclass
class Sight:
    """What was seen of one service."""

    service: Service
    metrics: Sequence[str]
    checks: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Those that were seen not to be well, and what they said."""
    unwell: set[str] = field(default_factory=set)
    """Those that were not, at the last look."""
    moved: set[str] = field(default_factory=set)
    """Metrics that were seen to move."""
    looked_at: float = 0.0
    """When the last look began, by `time.monotonic`."""
    _log_size: int = 0
    _old_pids: list[int] = field(default_factory=list)
    """Of the process that was there before anything happened."""
    _read: set[int] = field(default_factory=set)
    """Processes whose metrics were read."""
    _first: dict[tuple[Any, ...], float] = field(default_factory=dict)

    async def begin(self) -> None:
        """Note how all is before anything happens: what moved before does not count."""
        self._log_size = log_size(self.service.log)
        self._old_pids = self.service.pids()
        await self._look_at_metrics()

    async def look(self) -> None:
        """Ask it once, as an operator's tools do."""
        began_at = time.monotonic()
        status, text = await self.service.ask("readyz")
        if not status:
            found = {GONE: ""}
        elif (said := json.loads(text))["status"] == "ready":
            found = {}
        else:
            found = {check: result for check, result in said["checks"].items() if result != "ok"}
        for check, result in found.items():
            self.checks[check].add(result)
        self.unwell, self.looked_at = set(found), began_at
        await self._look_at_metrics()

    async def _look_at_metrics(self) -> None:
        """Compare its metrics with the first that were read of this process, or with zero if it is a new one."""
        pids = self.service.pids()
        if not self.metrics or not pids:
            return
        status, text = await self.service.ask("metrics")
        if status != 200 or self.service.pids() != pids:  # whose answer it is, nobody knows
            return
        is_counted_from_zero = pids != self._old_pids or pids[0] in self._read
        for metric in self.metrics:
            for sample in samples(text, metric):
                # A counter that was not there stood at zero; a gauge is set for the first time, and has not moved.
                base = 0.0 if is_counted_from_zero and sample.kind == COUNTER else sample.value
                first = self._first.setdefault((pids[0], metric, sample.labels), base)
                if abs(sample.value - first) >= MOVED_MIN:
                    self.moved.add(metric)
        self._read.add(pids[0])

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return what it has logged of an event since the first look."""
        return [line for line in log_lines(self.service.log, self._log_size) if line["event"] == event]


@dataclass
class Lookout:
    """Looks at services again and again, as an operator's tools do."""

    services: Sequence[Service]
    signs: Sequence[Sign]
    sights: list[Sight] = field(init=False)
    never_well: list[str] = field(default_factory=list)
    """Which checks showed something as long as they were waited for, though all was healed."""

    def __post_init__(self) -> None:
        metrics = sorted({sign.metric for sign in self.signs if sign.metric})
        self.sights = [Sight(service, metrics) for service in self.services]

    async def begin(self) -> None:
        """Note how all is before anything happens."""
        await asyncio.gather(*(sight.begin() for sight in self.sights))

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop` is set."""
        async with asyncio.TaskGroup() as tasks:
            for sight in self.sights:
                tasks.create_task(_look_until(stop, sight))

    async def wait_until_shown(self, seconds_max: float) -> None:
        """Wait until each of the services has shown each of the signs."""

        async def are_shown() -> bool:
            return not self.unshown()

        try:
            await eventually(are_shown, timeout=seconds_max, every=LOOK_SECONDS)
        except AssertionError:
            raise AssertionError("; ".join(self.unshown())) from None

    async def wait_until_well(self, seconds_max: float) -> None:
        """Wait until no check that a sign names shows anything any more, in any service; note those that do."""
        checks = {sign.check for sign in self.signs if sign.check}
        fresh_at = time.monotonic() + REMEMBERED_SECONDS  # what was found before may still be told until then

        async def are_well() -> bool:
            return all(sight.looked_at >= fresh_at and not checks & sight.unwell for sight in self.sights)

        with suppress(AssertionError):
            await eventually(are_well, timeout=seconds_max, every=0.1)
        self.never_well += [
            f"{sight.service.name} goes on showing {check}"
            for sight in self.sights
            for check in sorted(checks & sight.unwell)
        ]

    def missing(self, signs: Sequence[Sign]) -> list[str]:
        """Return which of these signs no service has shown, and which were there to the end."""
        return [each for sign in signs for each in _missing(sign, self.sights)] + self.never_well

    def unshown(self) -> list[str]:
        """Return which signs were not to be seen in which of the services."""
        return [
            f"{sight.service.name}: {each}"
            for sight in self.sights
            for sign in self.signs
            for each in _missing(sign, [sight])
        ]


async def _look_until(stop: asyncio.Event, sight: Sight) -> None:
    while not stop.is_set():
        await sight.look()
        await asyncio.sleep(LOOK_SECONDS)


def _missing(sign: Sign, sights: Sequence[Sight]) -> Iterator[str]:
    """Yield which parts of a sign were not to be seen in any of these services."""
    if sign.check:
        said = [text for sight in sights for text in sight.checks.get(sign.check, ())]
        if not said:
            seen = sorted({check for sight in sights for check in sight.checks})
            yield f"/readyz does not show {sign.check}, but {seen}"
        elif not any(sign.words in text for text in said):
            yield f"/readyz does not say of {sign.check} {sign.words!r}, but {sorted(said)[:3]}"
    if sign.metric and not any(sign.metric in sight.moved for sight in sights):
        yield f"{sign.metric} has not moved"
    if sign.line:
        lines = [line for sight in sights for line in sight.lines(sign.line)]
        mute = [line for line in lines if line["level"] != "info" and not line.get("advice")]
        if not lines or mute:
            yield f"the log has no {sign.line} with an advice{f': {mute[0]}' if mute else ''}"


@asynccontextmanager
async def looking_out(
    system: System, signs: Sequence[Sign], *, well_seconds_max: float = WELL_SECONDS_MAX
) -> AsyncIterator[Lookout]:
    """Look out for these signs while the block runs, at whose end all is healed, and until they are gone."""
    async with _looking(Lookout(system.all_services, signs)) as lookout:
        yield lookout
        await lookout.wait_until_well(well_seconds_max)


@asynccontextmanager
async def shown(
    system: System, *signs: Sign, by: Sequence[Service] | None = None, seconds_max: float = SEEN_SECONDS_MAX
) -> AsyncIterator[Lookout]:
    """Demand that each of these services, or of all, shows each of the signs while the block runs, or soon after it."""
    services = system.all_services if by is None else by
    async with _looking(Lookout(services, signs)) as calm:
        await calm.wait_until_well(seconds_max)  # else it would show what was done before
    assert not calm.never_well, f"before anything was done: {'; '.join(calm.never_well)}"
    async with _looking(Lookout(services, signs)) as lookout:
        yield lookout
        await lookout.wait_until_shown(seconds_max)


@asynccontextmanager
async def _looking(lookout: Lookout) -> AsyncIterator[Lookout]:
    stop = asyncio.Event()
    await lookout.begin()
    looking = asyncio.create_task(lookout.run(stop))
    try:
        yield lookout
    finally:
        stop.set()
        await looking
