"""Networks that are slow, cut connections or swallow everything, on each link in turn."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.links import Link, disturbed, kind_of
from tests.faults.mix import Life
from tests.faults.proxy import FAIR, Weather
from tests.faults.rows.feeders import TAKEOVER_SECONDS_MAX, lease_holder
from tests.faults.rows.row import Row, next_slots, seconds_to_health, seconds_to_prices
from tests.faults.rows.servers import seconds_of_slowest, usage_of_all
from tests.faults.signs import NATS_AWAY, POSTGRES_AWAY, Sign, shown
from tests.faults.system import READER, Options, System
from tests.waiting import eventually

HEALTHY_SECONDS_MAX = 5.0
MORE_MAX = 30
"""Tasks or files: what readers and watchers that all came from the other gateway need, and a pool that is filled."""
MORE_IN_SILENCE_MAX = 12
"""The same in a black hole, in which a gateway refuses half as many again: none may leave a task behind."""
SIGNS = {
    "postgres": POSTGRES_AWAY,
    "nats": NATS_AWAY,
    "market": Sign("rounds", 'price_feeder_rounds_total{outcome="failed"}', "prices_not_updated"),
}
"""Of a black hole on the way there. Readers who are cut off show nothing to an operator."""


@dataclass(frozen=True)
class _Fault:
    name: str
    weather: Weather
    seconds: float
    resets: bool = False


LATENCY = _Fault("latency", Weather(latency_seconds=0.2, jitter_seconds=0.1), 4.0)
RESETS = _Fault("resets", FAIR, 4.0, resets=True)
BLACK_HOLE = _Fault("black hole", Weather(is_silent=True), 12.0)
"""Longer than every deadline: of a request 5 s, of a statement 2 s, of a lease 10 s."""

LINKS = (
    ("api_gateway", "postgres"),
    ("snapshotter", "postgres"),
    ("price_feeder", "postgres"),
    ("api_gateway", "nats"),
    ("snapshotter", "nats"),
    ("price_feeder", "nats"),
    ("price_feeder", "market"),
    (READER, "api_gateway"),
)


async def _every_link(system: System, life: Life) -> str:
    seen, slowest = [], 0.0
    for kind, target in LINKS:
        links = system.links_of(kind, target)
        assert links, f"no link from {kind} to {target}"
        for fault in (LATENCY, RESETS, BLACK_HOLE):
            try:
                seen.append(f"{kind} → {target}, {fault.name}: {await _endure(system, links, fault)}")
            except AssertionError as error:
                raise AssertionError(f"{kind} → {target}, {fault.name}: {error}") from error
        if kind != READER:  # who is cut off himself waits as long as he likes
            slowest = seconds_of_slowest(life)
    counts = dict(sorted(life.readers.counts.items()))
    return "\n                 ".join([*seen, f"answers {counts}, the slowest after {slowest:.1f} s"])


async def _endure(system: System, links: list[Link], fault: _Fault) -> str:
    """Let the links of all replicas of a kind be disturbed; return what was seen."""
    kind, target = kind_of(links[0].source), kind_of(links[0].target)
    before = await usage_of_all(system)
    resets_before = _resets(links)
    async with (
        _shown_if_silent(system, kind, target, fault),
        disturbed(links, fault.weather, resets=fault.resets),
    ):
        until = time.monotonic() + fault.seconds
        bytes_before = _bytes(links)
        if fault is BLACK_HOLE and target == "postgres":
            await _are_red_and_live(system, kind)
        await asyncio.sleep(until - time.monotonic())
        during = await usage_of_all(system)
        passed = _bytes(links) - bytes_before
    more_max = MORE_IN_SILENCE_MAX if fault is BLACK_HOLE else MORE_MAX
    more = max(used.tasks - before[name].tasks for name, used in during.items())
    for name, used in during.items():
        assert used.tasks <= before[name].tasks + more_max, f"{name} has {used.tasks} tasks"
        assert used.files <= before[name].files + more_max, f"{name} has {used.files} files"
    if fault is BLACK_HOLE:
        assert passed == 0, f"{passed} bytes passed through a black hole"
    else:
        assert passed > 0, "nothing passed: the link is not what it should be"
    resets = _resets(links) - resets_before
    assert bool(resets) == fault.resets
    seconds = await seconds_to_health(system, 60)
    assert seconds <= HEALTHY_SECONDS_MAX, f"healthy after {seconds:.1f} s"
    said = [f"{more} tasks more", f"healthy after {seconds:.1f} s", *([f"{resets} resets"] if resets else [])]
    if kind == "price_feeder":
        said.append(f"prices after {await seconds_to_prices(system, TAKEOVER_SECONDS_MAX):.1f} s")
    await next_slots(2)
    return ", ".join(said)


@asynccontextmanager
async def _shown_if_silent(system: System, kind: str, target: str, fault: _Fault) -> AsyncIterator[None]:
    """Demand that a link that swallows everything is seen by all who have it; latency and resets need not be."""
    if fault is not BLACK_HOLE or target not in SIGNS:
        yield
        return
    by = [await lease_holder(system)] if target == "market" else system.services[kind]
    async with shown(system, SIGNS[target], by=by):
        yield


async def _are_red_and_live(system: System, kind: str) -> None:
    services = system.services[kind]

    async def are_red() -> bool:
        return not any([await service.is_ready() for service in services])

    await eventually(are_red, timeout=BLACK_HOLE.seconds)
    for service in services:
        status, _ = await service.ask("healthz")
        assert status == 200, f"{service.name} is not live"


def _bytes(links: list[Link]) -> int:
    return sum(link.proxy.bytes_there + link.proxy.bytes_back for link in links)


def _resets(links: list[Link]) -> int:
    return sum(link.proxy.resets for link in links)


def _through_proxies(_: Path) -> Options:
    return Options(has_links=True)


ROWS = (
    Row(
        13,
        "network latency, resets, black hole on any link",
        f"TCP proxies on {len(LINKS)} kinds of links: 200 ms ± 100, resets, {BLACK_HOLE.seconds:g} s of silence",
        _every_link,
        _through_proxies,
        signs=tuple(SIGNS.values()),
    ),
)
