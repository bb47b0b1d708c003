"""The bus against a real NATS server."""

import asyncio

import nats
import pytest

from shared.bus import Bus, Outgoing
from shared.clock import utc_now
from shared.messages import SNAPSHOT_DUE, TIMER, SnapshotDue
from tests.waiting import eventually


def due(shard: int = 0) -> Outgoing:
    return Outgoing(SNAPSHOT_DUE, SnapshotDue(scheduled_at=utc_now(), shard=shard, shards=4), f"due.{shard}")


async def test_consumer_receives_what_was_published_once_per_message_id(bus: Bus) -> None:
    await bus.publish(due(1))
    await bus.publish(due(1))
    await bus.publish(due(2))
    stop = asyncio.Event()
    shards = []
    async for delivery in bus.consume(TIMER, durable="test", ack_wait_seconds=5, stop=stop):
        shards.append(SnapshotDue.model_validate_json(delivery.payload).shard)
        await delivery.acknowledge()
        if len(shards) == 2:
            stop.set()
    assert shards == [1, 2]


async def test_unacknowledged_message_comes_again(bus: Bus) -> None:
    await bus.publish(due())
    stop = asyncio.Event()
    deliveries = []
    async for delivery in bus.consume(TIMER, durable="test", ack_wait_seconds=0.2, stop=stop):
        deliveries.append(delivery.deliveries)
        if len(deliveries) == 2:
            await delivery.acknowledge()
            stop.set()
    assert deliveries == [1, 2]


async def test_streams_lost_by_the_server_are_made_again(bus: Bus, nats_url: str) -> None:
    client = await nats.connect(nats_url)
    await client.jetstream().delete_stream(TIMER.name)
    await client.close()

    async def is_published() -> bool:
        return not await bus.publish_all([due()])

    await eventually(is_published)


async def test_publishing_without_a_server_reports_every_message() -> None:
    async with Bus("nats://127.0.0.1:9", name="tests") as unconnected:
        failed = await unconnected.publish_all([due(1), due(2)])
        assert [outgoing.message_id for outgoing, _ in failed] == ["due.1", "due.2"]
        assert await unconnected.check() is not None


@pytest.mark.parametrize("times", [1, 3])
async def test_bus_closes_cleanly(nats_url: str, times: int) -> None:
    for _ in range(times):
        async with Bus(nats_url, name="tests") as connected:
            assert await connected.wait_until_ready(asyncio.Event())
