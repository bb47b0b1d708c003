"""NATS restarts, is killed or freezes: how soon all goes on, and that nothing piles up."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from local.servers import NatsNode, nats_node
from services.snapshotter import timer
from shared.bus import Bus, Unanswered
from shared.clock import utc_now
from shared.messages import ALL_PRICES, TIMER, Message, Probe, SnapshotDue
from tests.integration.test_bus import Heard, listening
from tests.metrics import sample
from tests.waiting import eventually

RESTARTS = 20
RECOVERY_SECONDS_MAX = 10.0
"""Two on a machine that has nothing else to do."""
SUBJECT = "tests.v1.question"


class Everything:
    """A process that publishes, consumes, listens, answers and asks; `works` when all of it does."""

    def __init__(self, bus: Bus, heard: Heard, consumed: set[int]) -> None:
        self.bus = bus
        self.heard = heard
        self.consumed = consumed
        self.numbers = 0

    async def publishes(self) -> bool:
        self.numbers += 1
        return not await self.bus.publish_all([timer.due(utc_now(), self.numbers, 1024)])

    async def works(self) -> bool:
        is_there = await self.bus.check() is None and self.heard.told[-1:] == ["resumed"]
        if not is_there or not await self.publishes():
            return False
        number = self.numbers
        try:
            await self.bus.request(SUBJECT, Probe(probed_at=utc_now()), Probe, timeout_seconds=1)
        except Unanswered:
            return False

        async def is_consumed() -> bool:
            return number in self.consumed

        await eventually(is_consumed, timeout=30)
        return True


@asynccontextmanager
async def everything(url: str) -> AsyncIterator[Everything]:
    stop = asyncio.Event()
    consumed: set[int] = set()

    async def consume(bus: Bus) -> None:
        async for delivery in bus.consume(TIMER, durable="tests", ack_wait_seconds=2, stop=stop):
            consumed.add(SnapshotDue.model_validate_json(delivery.payload).shard)
            await delivery.acknowledge()

    async def answer(payload: bytes) -> Message:
        return Probe.model_validate_json(payload)

    async with (
        Bus(url, name="tests") as bus,
        listening(bus, [ALL_PRICES]) as heard,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(consume(bus))
        tasks.create_task(bus.serve(SUBJECT, answer, stop))
        process = Everything(bus, heard, consumed)
        await eventually(process.works, timeout=30)
        yield process
        stop.set()


async def at_rest(process: Everything) -> tuple[int, int]:
    """Return the fewest tasks and subscriptions within a second: each fetch has some for a while."""
    counted = []
    for _ in range(20):
        counted.append((len(asyncio.all_tasks()), len(process.bus._client._subs)))
        await asyncio.sleep(0.05)
    return min(tasks for tasks, _ in counted), min(subscriptions for _, subscriptions in counted)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NatsNode]:
    with nats_node(tmp_path / "nats") as started:
        yield started


async def test_twenty_restarts_and_kills_are_each_over_soon_and_leave_nothing_behind(node: NatsNode) -> None:
    async with everything(node.url) as process:

        async def publishes() -> bool:
            return await process.bus.check() is None and await process.publishes()

        before = await at_rest(process)
        slowest = 0.0
        for number in range(RESTARTS):
            (node.kill if number % 2 else node.stop)()
            node.start()
            began = time.monotonic()
            await eventually(publishes, timeout=30)
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < RECOVERY_SECONDS_MAX
        await eventually(process.works, timeout=30)

        async def is_as_before() -> bool:
            tasks, subscriptions = await at_rest(process)
            assert (tasks, subscriptions) <= before, [task.get_coro() for task in asyncio.all_tasks()]
            assert subscriptions <= before[1], process.bus._client._subs
            return True

        await eventually(is_as_before)


async def test_frozen_server_is_said_within_seconds_and_all_goes_on_when_it_does(node: NatsNode) -> None:
    """The pings of the library would need 20 to 30 seconds."""
    async with everything(node.url) as process:
        assert node.process is not None
        node.process.send_signal(signal.SIGSTOP)
        try:

            async def is_said() -> bool:
                return await process.bus.check() == "the server does not answer"

            async with asyncio.timeout(15):
                await eventually(is_said, timeout=15)
        finally:
            node.process.send_signal(signal.SIGCONT)
        began = time.monotonic()
        await eventually(process.works, timeout=30)
        assert time.monotonic() - began < RECOVERY_SECONDS_MAX
        assert process.bus.streams_found == 1  # on the same connection


async def test_services_start_before_their_server(tmp_path: Path) -> None:
    with nats_node(tmp_path / "nats") as node:
        node.stop()
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(starts(node.url))

            async def has_tried() -> bool:
                return sample("bus_problems_total") > problems

            problems = sample("bus_problems_total")
            await eventually(has_tried)
            assert not starting.done()
            node.start()


async def starts(url: str) -> None:
    async with everything(url):
        pass
