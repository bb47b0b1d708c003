"""The bus on a real cluster of three NATS servers, one of which is killed and comes back."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import nats
import pytest
from nats.aio.client import Client

from local.servers import NatsNode, nats_cluster
from services.snapshotter import snapshots, timer
from shared.bus import Bus, Outgoing
from shared.clock import aligned_ticks, wait_for_stop
from shared.database import Database
from shared.messages import PRICES, STREAMS, TIMER, PriceTick, price_subject
from tests.factories import create_user
from tests.waiting import eventually

AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
MINUTE, SECOND = timedelta(minutes=1), timedelta(seconds=1)
SLOTS_BEFORE, SLOTS_AFTER = 3, 4
USERS = 5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NatsNode]]:
    with nats_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
async def client(cluster: list[NatsNode]) -> AsyncIterator[Client]:
    """Another party's client; the cluster has no streams then."""
    password = urlsplit(cluster[0].url).password or ""
    # Beside the URL: a server that the client learns of later has a URL without.
    connected = await nats.connect(
        [node.url for node in cluster], user="foliotick", password=password, max_reconnect_attempts=-1
    )

    async def has_a_leader() -> bool:
        try:
            for stream in await connected.jetstream(timeout=1).streams_info():
                await connected.jetstream().delete_stream(stream.config.name or "")
        except (nats.errors.Error, TimeoutError):
            return False
        return True

    await eventually(has_a_leader, timeout=30, every=0.2)
    yield connected
    await connected.close()


async def information(client: Client, stream: str) -> dict[str, Any]:
    answer = await client.request(f"$JS.API.STREAM.INFO.{stream}", timeout=2)
    said: dict[str, Any] = json.loads(answer.data)
    return said


@asynccontextmanager
async def ready(url: str, **options: Any) -> AsyncIterator[Bus]:
    async with Bus(url, name="tests", **options) as bus:
        async with asyncio.timeout(60):
            assert await bus.wait_until_ready(asyncio.Event())
        yield bus


def tick(sequence: int) -> Outgoing:
    message = PriceTick(
        symbol="AAPL", price=Decimal(sequence), traded_at=AT, received_at=AT, feed="iex", sequence=sequence
    )
    return Outgoing(price_subject("AAPL"), message, f"AAPL.{sequence}")


async def test_streams_get_their_copies_and_prices_are_made_anew_by_who_can_publish_them_again(
    cluster: list[NatsNode], client: Client
) -> None:
    url = cluster[0].url
    async with ready(url) as bus:
        await bus.publish(tick(1))
        await bus.publish(timer.due(AT, 0, 1))
        assert (await information(client, "PRICES"))["config"]["persist_mode"] == "async"
    async with ready(url, replicas=3):
        copies = {s.name: (await information(client, s.name))["config"]["num_replicas"] for s in STREAMS}
        assert copies.pop("PRICES") == 1  # its publisher alone may make it anew
        assert set(copies.values()) == {3}
        async with ready(url, replicas=3, owned=(PRICES,)) as owner:
            found = await information(client, "PRICES")
            assert (found["config"]["num_replicas"], found["config"].get("persist_mode")) == (3, None)
            assert found["state"]["messages"] == 0
            assert owner.streams_found  # so that the feeder publishes all last prices again
    assert (await information(client, TIMER.name))["state"]["messages"] == 1
    async with ready(url):  # a service with the old setting takes no copy away
        assert (await information(client, TIMER.name))["config"]["num_replicas"] == 3


@dataclass
class Load:
    """What goes on meanwhile, until `stop`: a slot each second, announced by every replica, and ticks of one symbol."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    slots: list[datetime] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)

    async def announce_each_second(self, bus: Bus) -> None:
        async with asyncio.TaskGroup() as announcing:
            async for at in aligned_ticks(SECOND, self.stop):
                if at not in self.slots:
                    self.slots.append(at)
                announcing.create_task(timer.announce(bus, at, MINUTE, 1, asyncio.Event()))

    async def publish_ticks(self, bus: Bus) -> None:
        """As the feeder does: what is not acknowledged is published again, and nothing newer before it."""
        for sequence in count(1):
            while await bus.publish_all([tick(sequence)]):
                await wait_for_stop(self.stop, 0.2)
            self.acknowledged.append(sequence)
            if await wait_for_stop(self.stop, 0.01):
                return

    async def reaches(self, slots: int) -> None:
        async def are_announced() -> bool:
            return len(self.slots) >= slots

        await eventually(are_announced, timeout=60)


async def leader_of(client: Client, stream: str) -> str:
    """Wait until a stream has a leader and two servers that follow it; return the leader's name."""

    async def leader() -> str | None:
        known = (await information(client, stream)).get("cluster", {})
        followers = [each for each in known.get("replicas", []) if each["current"]]
        return known.get("leader") if len(followers) == 2 else None

    found = await eventually(leader, timeout=60)
    assert found
    return found


async def test_loss_of_the_leader_loses_no_slot_and_nothing_that_was_acknowledged(
    cluster: list[NatsNode], client: Client, database: Database
) -> None:
    """The two replicas are told of one server each, and one of these is the leader that is killed."""
    for number in range(USERS):
        await create_user(database, f"user {number}", cash="1")
    async with ready(cluster[0].url, replicas=3, owned=(PRICES,)):
        leader_name = await leader_of(client, TIMER.name)
    leader = next(node for node in cluster if node.name == leader_name)
    other = next(node for node in cluster if node is not leader)
    load, working = Load(), asyncio.Event()

    async def all_are_stored() -> bool:
        rows = await database.fetch("SELECT timestamp, count(*) AS users FROM portfolio_snapshots GROUP BY 1")
        return {row["timestamp"]: row["users"] for row in rows} == dict.fromkeys(load.slots, USERS)

    async with (
        ready(leader.url, replicas=3, owned=(PRICES,)) as first,
        ready(other.url, replicas=3, owned=(PRICES,)) as second,
        asyncio.TaskGroup() as tasks,
    ):
        for bus in (first, second):
            tasks.create_task(snapshots.run(database, bus, MINUTE, working, ack_wait_seconds=3))
            tasks.create_task(load.announce_each_second(bus))
        tasks.create_task(load.publish_ticks(first))
        await load.reaches(SLOTS_BEFORE)
        before = len(load.acknowledged)
        leader.kill()

        async def goes_on_with_another() -> bool:
            return len(load.acknowledged) > before + 10 and await first.check() is None

        await eventually(goes_on_with_another, timeout=60)
        leader.start()
        await load.reaches(len(load.slots) + SLOTS_AFTER)
        load.stop.set()
        await eventually(all_are_stored, timeout=60)
        working.set()
    last = await client.jetstream(timeout=5).get_last_msg("PRICES", price_subject("AAPL"))
    assert PriceTick.model_validate_json(last.data or b"").sequence == load.acknowledged[-1]
    await leader_of(client, TIMER.name)  # the one that was killed has caught up


async def test_service_leaves_its_server_when_that_freezes(cluster: list[NatsNode], client: Client) -> None:
    """The library alone would stay for 20 to 30 seconds."""
    async with ready(cluster[0].url, replicas=3) as bus:
        await leader_of(client, TIMER.name)

        def own_port() -> int | None:
            url = bus._client.connected_url
            return url.port if url else None

        port = own_port()
        own = next(node for node in cluster if node.url.endswith(f":{port}"))
        assert own.process is not None
        own.process.send_signal(signal.SIGSTOP)
        try:

            async def is_elsewhere() -> bool:
                return bus._client.is_connected and own_port() != port

            await eventually(is_elsewhere, timeout=19)

            async def is_stored() -> bool:
                return not await bus.publish_all([timer.due(AT, 0, 1)])

            await eventually(is_stored, timeout=60)
        finally:
            own.process.send_signal(signal.SIGCONT)
