"""Messages that cannot be handled: delivered a few times, put aside, listed, published again or discarded."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import nats
import pytest
from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError
from structlog.testing import capture_logs

from services.snapshotter import snapshots, timer
from services.snapshotter.__main__ import check_dead_letters
from services.snapshotter.troubles import Troubles
from shared import database as databases
from shared.bus import Bus, NotReplayable
from shared.clock import utc_now
from shared.database import Database
from shared.deliveries import SERVER_DELIVERIES_MAX
from shared.health import Degraded
from shared.messages import DEAD_LETTERS, SNAPSHOT_DUE, TIMER, DeadLetter
from tests.conftest import ROOT
from tests.contract import validator
from tests.factories import create_user, make_partitions
from tests.integration.test_admin import Admin
from tests.waiting import eventually

SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
SLOT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)


@pytest.fixture
async def client(nats_url: str) -> AsyncIterator[Client]:
    client = await nats.connect(nats_url)
    yield client
    await client.close()


@pytest.fixture
def admin(
    nats_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Admin]:
    monkeypatch.setenv("NATS_URL", nats_url)
    with (
        capture_logs()
    ):  # else they would be in the output, as only the command's own process leaves them out
        yield Admin(monkeypatch, capsys)


@asynccontextmanager
async def snapshotter(
    database: Database, bus: Bus, *, ack_wait_seconds: float = 15, troubles: Troubles | None = None
) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(
            snapshots.run(database, bus, MINUTE, stop, ack_wait_seconds=ack_wait_seconds, troubles=troubles)
        )
        try:
            yield stop
        finally:
            stop.set()


def one_letter(bus: Bus) -> Callable[[], Awaitable[DeadLetter | None]]:
    async def read() -> DeadLetter | None:
        letters = await bus.dead_letters()
        assert len(letters) <= 1
        return letters[0].letter if letters else None

    return read


async def unanswered(client: Client, durable: str = snapshots.CONSUMER) -> int:
    info = await client.jetstream().consumer_info(TIMER.name, durable)
    return (info.num_ack_pending or 0) + (info.num_pending or 0)


def all_answered(client: Client, durable: str = snapshots.CONSUMER) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        try:
            return await unanswered(client, durable) == 0
        except NotFoundError:  # nobody consumes yet
            return False

    return look


async def snapshots_stored(database: Database) -> int:
    count: int = await database.fetch_value("SELECT count(*) FROM portfolio_snapshots")
    return count


async def test_malformed_message_is_kept_for_an_operator_at_once(
    database: Database, bus: Bus, client: Client
) -> None:
    await client.jetstream().publish(SNAPSHOT_DUE, b"{")
    async with snapshotter(database, bus):
        letter = await eventually(one_letter(bus))
        await eventually(all_answered(client))

        async def is_noted() -> bool:
            return isinstance(await check_dead_letters(bus), Degraded)

        await eventually(is_noted)
    assert letter is not None
    assert (letter.subject, letter.content, letter.size, letter.deliveries) == (SNAPSHOT_DUE, b"{", 1, 1)
    assert letter.put_aside_by == "tests"
    assert letter.reason.startswith("malformed: ")
    assert letter.published_at <= letter.put_aside_at
    validator("DeadLetter").validate(json.loads(letter.model_dump_json()))


async def test_message_that_nobody_answers_is_put_aside_once_by_all_replicas_together(
    bus: Bus, nats_url: str, client: Client
) -> None:
    stop = asyncio.Event()
    delivered: list[int] = []

    async def ignore(replica: Bus) -> None:
        async for delivery in replica.consume(TIMER, durable="test", ack_wait_seconds=0.3, stop=stop):
            delivered.append(delivery.deliveries)

    await client.jetstream().publish(SNAPSHOT_DUE, b"poison")
    async with Bus(nats_url, name="other") as other, asyncio.TaskGroup() as tasks:
        for replica in (bus, other):
            tasks.create_task(ignore(replica))
        letter = await eventually(one_letter(bus), timeout=20)
        await eventually(all_answered(client, "test"))
        stop.set()
    assert sorted(delivered) == [1, 2, 3, 4, 5]
    assert letter is not None
    assert (letter.content, letter.deliveries) == (b"poison", 6)
    assert "5 times" in letter.reason


DIES = f"""
import asyncio, os, sys
from shared.bus import Bus
from shared.messages import TIMER

async def main():
    stop = asyncio.Event()
    async with Bus(sys.argv[1], name="dying") as bus:
        async def end_when_put_aside():
            while not bus.dead_letters_kept:
                await asyncio.sleep(0.05)
            stop.set()
        ending = asyncio.create_task(end_when_put_aside())
        async for delivery in bus.consume(TIMER, durable="test", ack_wait_seconds=0.5, stop=stop):
            if delivery.payload == b"poison":
                os.kill(os.getpid(), {9})
            await delivery.acknowledge()

asyncio.run(main())
"""


async def test_message_that_kills_its_process_does_so_five_times_and_harms_no_other(
    bus: Bus, nats_url: str, client: Client
) -> None:
    for payload in (b"well", b"poison", b"well"):
        await client.jetstream().publish(SNAPSHOT_DUE, payload)
    codes: list[int] = []
    while not codes or codes[-1]:
        assert len(codes) < 8, codes
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DIES, nats_url, cwd=ROOT, env=dict(os.environ)
        )
        codes.append(await asyncio.wait_for(process.wait(), 30))
    assert codes == [-9] * 5 + [0]
    letter = await one_letter(bus)()
    assert letter is not None
    assert (letter.content, letter.put_aside_by) == (b"poison", "dying")
    await eventually(all_answered(client, "test"))


async def test_waiting_for_the_database_is_no_delivery_and_the_slot_is_taken_then(
    database_url: str, database: Database, bus: Bus, client: Client
) -> None:
    await create_user(database, cash="5")
    server, name = database_url.rsplit("/", 1)
    administrator = await asyncpg.connect(f"{server}/postgres")
    await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await administrator.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
    )
    troubles = Troubles(MINUTE)
    postponed = snapshots.shards_postponed.labels("PostgreSQL is away")
    before = postponed._value.get()

    async def has_waited_for_longer_than_the_ack_wait() -> bool:
        return bool(postponed._value.get() >= before + 7)

    with capture_logs() as logs:
        async with snapshotter(database, bus, ack_wait_seconds=6, troubles=troubles):
            await bus.publish(timer.due(utc_now(), 0, 1))
            await eventually(has_waited_for_longer_than_the_ack_wait, timeout=60)
            assert await troubles.check() == Degraded("a slot waits: PostgreSQL is away")
            assert snapshots.shards_waiting._value.get() == 1
            await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await administrator.close()
            await eventually(lambda: snapshots_stored(database))
            await eventually(all_answered(client))
            info = await client.jetstream().consumer_info(TIMER.name, snapshots.CONSUMER)
            assert info.num_redelivered == 0
    assert await troubles.check() is None
    assert snapshots.shards_waiting._value.get() == 0
    said = [line for line in logs if line["event"] == "snapshot_postponed"]
    assert len(said) == 1  # once, on the change
    assert not [line for line in logs if line["event"] == "snapshot_redelivered"]


async def test_slot_that_waits_is_handed_to_another_replica_at_a_stop(
    database_url: str, database: Database, bus: Bus
) -> None:
    """The one that stops has lost its database; nothing waits for the minute that the server would."""
    await create_user(database, cash="5")
    parts = urlsplit(database_url)
    nowhere = urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:9"))
    troubles = Troubles(MINUTE)

    async def waits() -> bool:
        return await troubles.check() is not None

    async with databases.connect(nowhere, application_name="tests", connections_max=2) as lost:
        async with snapshotter(lost, bus, ack_wait_seconds=60, troubles=troubles) as stop:
            await bus.publish(timer.due(utc_now(), 0, 1))
            await eventually(waits)
            stop.set()
        async with snapshotter(database, bus, ack_wait_seconds=60):
            await eventually(lambda: snapshots_stored(database), timeout=20)


async def test_message_that_fails_unexpectedly_is_put_aside_with_the_error_and_can_be_replayed(
    database: Database, bus: Bus, client: Client, admin: Admin
) -> None:
    """The process goes on: it does more than this one message."""
    await create_user(database, cash="5")
    await database.fetch(
        "ALTER TABLE portfolio_snapshots ADD CONSTRAINT never CHECK (total_value < 0) NOT VALID"
    )
    with capture_logs() as logs:
        async with snapshotter(database, bus):
            await bus.publish(timer.due(utc_now(), 0, 1))
            letter = await eventually(one_letter(bus), timeout=30)
            await eventually(all_answered(client))
            assert letter is not None
            assert letter.reason.startswith("CheckViolationError: ")
            assert letter.deliveries == 5
            await database.fetch("ALTER TABLE portfolio_snapshots DROP CONSTRAINT never")
            outcome = await admin("", "replay-dead-letter", "all")
            assert outcome.output == (
                "1 dead letter replayed\na slot that is too late by now is skipped and counted, not stored\n"
            )
            await eventually(lambda: snapshots_stored(database))
    assert len([line for line in logs if line["event"] == "snapshot_failed"]) == 5
    assert await bus.dead_letters() == []


async def test_two_messages_that_fail_at_a_time_are_put_aside_and_the_process_goes_on(
    database: Database, bus: Bus, client: Client
) -> None:
    """They are all that it works on, so that nothing is well between their failures."""
    await create_user(database, cash="5")
    await make_partitions(database, SLOT, SLOT)
    poisonous = ", ".join(f"'{SLOT + number * SECOND}'" for number in range(2))
    await database.fetch(
        f"ALTER TABLE portfolio_snapshots ADD CONSTRAINT never CHECK (timestamp NOT IN ({poisonous})) NOT VALID"
    )
    for number in range(2):
        await bus.publish(timer.due(SLOT + number * SECOND, 0, 1))

    async def are_put_aside() -> bool:
        return len(await bus.dead_letters()) == 2

    stop = asyncio.Event()
    with capture_logs() as logs:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(snapshots.run(database, bus, MINUTE, stop, now=lambda: SLOT + 5 * SECOND))
            await eventually(are_put_aside, timeout=40)
            await bus.publish(timer.due(SLOT + 2 * SECOND, 0, 1))
            await eventually(lambda: snapshots_stored(database))
            await eventually(all_answered(client))
            stop.set()
    assert len([line for line in logs if line["event"] == "snapshot_failed"]) == 10


async def test_process_ends_when_it_fails_whatever_it_is_given(database: Database, bus: Bus) -> None:
    """Five messages in a row cannot all be at fault: its supervisor starts it anew."""
    await create_user(database, cash="5")
    await database.fetch(
        "ALTER TABLE portfolio_snapshots ADD CONSTRAINT never CHECK (total_value < 0) NOT VALID"
    )
    now = utc_now()
    for number in range(snapshots.FAILED_IN_A_ROW_MAX):
        await bus.publish(timer.due(now - timedelta(seconds=number), 0, 1))
    with capture_logs(), pytest.raises(ExceptionGroup) as ended:
        async with asyncio.timeout(60):
            await snapshots.run(database, bus, MINUTE, asyncio.Event())
    assert ended.group_contains(asyncpg.CheckViolationError)
    assert await bus.dead_letters() == []


async def test_replay_that_comes_too_late_is_skipped_and_said(
    database: Database, bus: Bus, client: Client
) -> None:
    await create_user(database, cash="5")
    old = timer.due(utc_now() - timedelta(minutes=5), 0, 1)
    await client.jetstream().publish(SNAPSHOT_DUE, b"{")
    async with snapshotter(database, bus):
        letter = await eventually(one_letter(bus))
        assert letter is not None
        (numbered,) = await bus.dead_letters()
        with capture_logs() as logs:
            await bus.publish(old)
            await eventually(all_answered(client))

            async def is_said() -> bool:
                return any(line["event"] == "snapshot_skipped" for line in logs)

            await eventually(is_said)
    assert await snapshots_stored(database) == 0
    assert await bus.discard(numbered.number)


async def test_two_who_replay_at_once_publish_one_message(
    database: Database, bus: Bus, client: Client, nats_url: str
) -> None:
    await client.jetstream().publish(SNAPSHOT_DUE, b"{")
    async with snapshotter(database, bus):
        await eventually(one_letter(bus))
        await eventually(all_answered(client))
    (numbered,) = await bus.dead_letters()
    async with Bus(nats_url, name="other") as other:
        assert await other.wait_until_ready(asyncio.Event())
        await asyncio.gather(bus.replay(numbered), other.replay(numbered))
    assert (await client.jetstream().stream_info(TIMER.name)).state.messages == 2  # the first, and one again
    assert await bus.dead_letters() == []


async def test_message_that_is_too_large_is_kept_in_part_and_not_published_again(
    database: Database, bus: Bus, client: Client
) -> None:
    await client.jetstream().publish(SNAPSHOT_DUE, b"x" * 200_000)
    async with snapshotter(database, bus):
        letter = await eventually(one_letter(bus))
    assert letter is not None
    assert (letter.size, letter.content) == (200_000, b"x" * 65_536)
    (numbered,) = await bus.dead_letters()
    with pytest.raises(NotReplayable, match="65536 of its 200000 bytes"):
        await bus.replay(numbered)
    assert len(await bus.dead_letters()) == 1


async def change(client: Client, **changes: Any) -> None:
    name = DEAD_LETTERS.name
    found = json.loads((await client.request(f"$JS.API.STREAM.INFO.{name}")).data)["config"]
    answer = await client.request(f"$JS.API.STREAM.UPDATE.{name}", json.dumps(found | changes).encode())
    assert "error" not in json.loads(answer.data), answer.data


async def test_message_is_given_up_only_once_its_letter_is_stored(
    database: Database, bus: Bus, client: Client
) -> None:
    await change(client, max_bytes=100, discard="new")
    await client.jetstream().publish(SNAPSHOT_DUE, b"{")
    with capture_logs() as logs:
        async with snapshotter(database, bus):

            async def is_refused() -> bool:
                return any(line["event"] == "dead_letter_not_stored" for line in logs)

            await eventually(is_refused)
            assert await unanswered(client) == 1
            await change(client, max_bytes=1_000_000)
            await eventually(one_letter(bus))
            await eventually(all_answered(client))


async def test_consumer_of_the_version_before_is_bounded(
    database: Database, bus: Bus, client: Client
) -> None:
    endless = ConsumerConfig(
        durable_name=snapshots.CONSUMER,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=15,
        max_deliver=-1,
        filter_subject=SNAPSHOT_DUE,
    )
    await client.jetstream().add_consumer(TIMER.name, endless)
    async with snapshotter(database, bus):

        async def is_bounded() -> bool:
            info = await client.jetstream().consumer_info(TIMER.name, snapshots.CONSUMER)
            assert info.config is not None
            return bool(info.config.max_deliver == SERVER_DELIVERIES_MAX)

        await eventually(is_bounded)


# ---- by an operator ------------------------------------------------------------------------------


async def test_operator_lists_and_discards(
    database: Database, bus: Bus, client: Client, admin: Admin
) -> None:
    assert await admin("", "dead-letters") == (0, "no dead letters\n", "")
    for payload in (b"\x1b[2J{", b"[]"):
        await client.jetstream().publish(SNAPSHOT_DUE, payload)
    await client.jetstream().publish("dead_letters.v1.somebody", b"else's")

    async def both_are_put_aside() -> bool:
        return len(await bus.dead_letters()) == 3

    async with snapshotter(database, bus):
        await eventually(both_are_put_aside)
    listed = await admin("", "dead-letters")
    assert (listed.code, listed.errors) == (0, "")
    header, *rows = listed.output.splitlines()
    assert header.split() == [
        "id",
        "put",
        "aside",
        "by",
        "subject",
        "deliveries",
        "bytes",
        "payload",
        "reason",
    ]
    assert len(rows) == 3
    assert "\x1b" not in listed.output
    assert sum(r"'\x1b[2J{'" in row and f"{SNAPSHOT_DUE} " in row for row in rows) == 1
    assert sum("malformed: Invalid JSON: " in row and " line 1 column " in row for row in rows) == 1
    assert sum("is no dead letter" in row for row in rows) == 1
    ids = [row.split()[0] for row in rows]
    assert await admin("", "discard-dead-letter", ids[0]) == (0, "1 dead letter discarded\n", "")
    gone = await admin("", "discard-dead-letter", ids[0])
    assert gone == (1, "", f"admin: there is no dead letter {ids[0]}\n")
    assert (await admin("", "replay-dead-letter", "999")).errors == "admin: there is no dead letter 999\n"
    assert (await admin("", "discard-dead-letter", "all")).output == "2 dead letters discarded\n"
    assert (await admin("", "dead-letters")).output == "no dead letters\n"
    assert (await admin("", "discard-dead-letter", "first")).code == 2


async def test_operator_without_a_bus_is_told_so_in_one_line(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_URL", "nats://someone:hidden@127.0.0.1:9")
    outcome = await admin("", "dead-letters")
    assert (outcome.code, outcome.output) == (1, "")
    assert outcome.errors.startswith("admin: NATS cannot be used: ")
    assert outcome.errors.count("\n") == 1
    assert "hidden" not in outcome.errors
