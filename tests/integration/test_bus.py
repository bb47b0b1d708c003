"""The bus against a real NATS server."""

import asyncio
import signal
from pathlib import Path
from urllib.parse import quote

import nats
import pytest
from nats.js.api import ConsumerConfig

from local.servers import nats_server
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


async def test_streams_that_cannot_be_found_for_a_while_are_found_again_without_a_reconnect(
    tmp_path: Path,
) -> None:
    stop = asyncio.Event()
    with nats_server(tmp_path / "nats") as server:
        async with Bus(server.url, name="tests") as frozen:
            assert await frozen.wait_until_ready(stop)
            server.process.send_signal(signal.SIGSTOP)
            assert await frozen.publish_all([due()])

            async def is_in_doubt() -> bool:
                return await frozen.check() is not None

            await eventually(is_in_doubt, timeout=15)
            server.process.send_signal(signal.SIGCONT)

            async def is_published() -> bool:
                return await frozen.check() is None and not await frozen.publish_all([due()])

            await eventually(is_published, timeout=15)


async def test_stream_of_the_same_name_with_other_subjects_is_a_problem_that_is_said(nats_url: str) -> None:
    client = await nats.connect(nats_url)
    await client.jetstream().add_stream(name="PRICES", subjects=["other.>"])
    async with Bus(nats_url, name="tests") as unfit:

        async def problem() -> bool:
            return "PRICES exists without the subject prices.v1.>" in str(await unfit.check())

        await eventually(problem)
        await client.jetstream().delete_stream("PRICES")

        async def is_well() -> bool:
            return await unfit.check() is None

        await eventually(is_well)
    await client.close()


async def test_consumer_of_another_kind_is_a_problem_that_is_said(bus: Bus, nats_url: str) -> None:
    client = await nats.connect(nats_url)
    pushing = ConsumerConfig(durable_name="taken", deliver_subject="elsewhere")
    await client.jetstream().add_consumer(TIMER.name, pushing)
    stop = asyncio.Event()

    async def consume() -> None:
        async for delivery in bus.consume(TIMER, durable="taken", ack_wait_seconds=5, stop=stop):
            await delivery.acknowledge()

    async def problem() -> bool:
        return "consumer taken of TIMER" in str(await bus.check())

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(consume())
        await eventually(problem)
        stop.set()
    await client.close()


async def test_password_is_decoded_from_the_url(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "password").write_text("p@ss/w:rd,1")
    with nats_server(tmp_path / "nats") as server:
        encoded = server.url.replace("p@ss/w:rd,1", quote("p@ss/w:rd,1", safe=""))
        async with Bus(encoded, name="tests") as connected:
            assert await asyncio.wait_for(connected.wait_until_ready(asyncio.Event()), 10)
