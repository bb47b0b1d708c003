"""The bus against a real NATS server."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import nats
import pytest
from nats.js.api import ConsumerConfig

from local.servers import nats_node, nats_server
from shared.bus import Bus, Outgoing
from shared.clock import utc_now
from shared.messages import ALL_PRICES, FEED_STATUS, SNAPSHOT_DUE, TIMER, SnapshotDue
from tests.waiting import eventually, settled


def due(shard: int = 0) -> Outgoing:
    return Outgoing(SNAPSHOT_DUE, SnapshotDue(scheduled_at=utc_now(), shard=shard, shards=4), f"due.{shard}")


class Heard:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def heard(self, subject: str, payload: bytes) -> None:
        self.told.append(f"{subject}={payload.decode()}" if len(payload) < 10 else subject)

    def interrupted(self) -> None:
        self.told.append("interrupted")

    def resumed(self) -> None:
        self.told.append("resumed")

    async def wait_for(self, *told: str) -> None:
        async def is_told() -> bool:
            return self.told == list(told)

        try:
            await eventually(is_told, timeout=15)
        except AssertionError:
            assert self.told == list(told)


@asynccontextmanager
async def listening(bus: Bus, subjects: Sequence[str], **options: int) -> AsyncIterator[Heard]:
    heard, stop = Heard(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bus.listen(subjects, heard, stop, **options))
        yield heard
        stop.set()


@contextmanager
def nats_server_at(url: str) -> Iterator[None]:
    """Run an empty server without JetStream where another one was."""
    parts = urlsplit(url)
    command = [str(Path(sys.executable).parent / "nats-server"), "-a", "127.0.0.1", "-p", str(parts.port)]
    command += [f"--user={unquote(parts.username or '')}", f"--pass={unquote(parts.password or '')}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
    try:
        yield
    finally:
        process.kill()
        process.wait()


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


async def test_consumer_that_the_server_does_not_make_is_a_problem_that_is_said(tmp_path: Path) -> None:
    """It answers nothing at all, as here, where the user may not ask, or a cluster without a leader of consumers."""
    user = (
        'user: $NATS_USER, password: $NATS_PASSWORD, permissions: {publish: {deny: ["$JS.API.CONSUMER.>"]}}'
    )
    stop = asyncio.Event()

    async def consume(unable: Bus) -> None:
        async for delivery in unable.consume(TIMER, durable="refused", ack_wait_seconds=5, stop=stop):
            await delivery.acknowledge()

    with nats_node(tmp_path / "nats", f"authorization: {{users: [{{{user}}}]}}\n") as node:
        async with Bus(node.url, name="tests") as unable, asyncio.TaskGroup() as tasks:
            assert await asyncio.wait_for(unable.wait_until_ready(stop), 10)
            assert await unable.check() is None
            tasks.create_task(consume(unable))

            async def is_said() -> bool:
                return str(await unable.check()).startswith("consumer refused of TIMER: ")

            await eventually(is_said, timeout=15)
            stop.set()


async def test_refused_password_is_said_no_more_once_it_was_accepted(tmp_path: Path) -> None:
    with nats_node(tmp_path / "nats") as node:
        node.stop()
        address = node.url.rpartition("@")[2]
        async with Bus(node.url, name="tests") as bus:

            async def says(what: str) -> bool:
                return what in str(await bus.check())

            with nats_server_at(f"nats://foliotick:another@{address}"):
                await eventually(partial(says, "uthorization"), timeout=20)
            node.start()

            async def is_well() -> bool:
                return await bus.check() is None

            await eventually(is_well, timeout=20)
            node.kill()

            async def is_lost() -> bool:
                problem = await bus.check()
                assert "uthorization" not in str(problem)
                return problem is not None

            await eventually(is_lost)


async def test_password_is_decoded_from_the_url(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "password").write_text("p@ss/w:rd,1")
    with nats_server(tmp_path / "nats") as server:
        encoded = server.url.replace("p@ss/w:rd,1", quote("p@ss/w:rd,1", safe=""))
        async with Bus(encoded, name="tests") as connected:
            assert await asyncio.wait_for(connected.wait_until_ready(asyncio.Event()), 10)


async def test_listener_hears_what_is_published_on_its_subjects_from_then_on(bus: Bus, nats_url: str) -> None:
    await bus.publish(due(1))
    client = await nats.connect(nats_url)
    async with listening(bus, [SNAPSHOT_DUE, ALL_PRICES]) as heard:
        await heard.wait_for("resumed")
        await bus.publish(due(2))  # through JetStream
        await client.publish("prices.v1.equity.A", b"1")
        await client.publish("prices.v1.crypto.B", b"2")
        await client.publish(FEED_STATUS, b"3")
        await settled(client)
        await heard.wait_for("resumed", SNAPSHOT_DUE, "prices.v1.equity.A=1", "prices.v1.crypto.B=2")
    assert heard.told[-1] == "interrupted"
    await client.close()


async def test_listener_is_told_of_a_server_that_ends_and_of_its_return(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as server:
        async with Bus(server.url, name="tests") as bus, listening(bus, [ALL_PRICES]) as heard:
            await heard.wait_for("resumed")
            server.process.kill()
            server.process.wait()
            await heard.wait_for("resumed", "interrupted")
            with nats_server_at(server.url):
                await heard.wait_for("resumed", "interrupted", "resumed")
                client = await nats.connect(server.url)
                await client.publish("prices.v1.equity.A", b"1")
                await heard.wait_for("resumed", "interrupted", "resumed", "prices.v1.equity.A=1")
                await client.close()


async def test_listener_is_told_of_a_server_that_freezes_within_three_seconds(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as server:
        async with Bus(server.url, name="tests") as bus, listening(bus, [ALL_PRICES]) as heard:
            await heard.wait_for("resumed")
            server.process.send_signal(signal.SIGSTOP)
            try:
                async with asyncio.timeout(5):  # the pings of the library would need 20
                    await heard.wait_for("resumed", "interrupted")
            finally:
                server.process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(3):
                await heard.wait_for("resumed", "interrupted", "resumed")
            client = await nats.connect(server.url)
            await client.publish("prices.v1.equity.A", b"1")
            await heard.wait_for("resumed", "interrupted", "resumed", "prices.v1.equity.A=1")
            await client.close()


async def test_listener_is_told_of_messages_that_found_no_room(bus: Bus, nats_url: str) -> None:
    client = await nats.connect(nats_url)
    async with listening(bus, [ALL_PRICES], waiting_max=10) as heard:
        await heard.wait_for("resumed")
        for _ in range(1000):  # arrive in few packets, before any is heard
            await client.publish("prices.v1.equity.A", b"1")
        await settled(client)

        async def is_told() -> bool:
            return "interrupted" in heard.told

        await eventually(is_told)

        async def is_resumed() -> bool:
            return "resumed" in heard.told[heard.told.index("interrupted") :]

        await eventually(is_resumed)
        assert heard.told.count("prices.v1.equity.A=1") < 1000
    await client.close()


async def test_listener_without_a_server_waits_for_one_until_it_is_stopped() -> None:
    async with Bus("nats://127.0.0.1:9", name="tests") as bus, listening(bus, [ALL_PRICES]) as heard:
        pass
    assert heard.told == []
