"""Publishing in batches against a real NATS server: what fails is reported, message by message."""

import asyncio
import signal
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import nats
import pytest
from nats.aio.msg import Msg

from local.servers import nats_server
from shared import publishing
from shared.bus import Bus, BusUnavailable, Outgoing
from shared.messages import PRICES, PriceTick, price_subject
from tests.waiting import eventually, settled

AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)


def tick(number: int, subject: str | None = None, message_id: str | None = None) -> Outgoing:
    message = PriceTick(
        symbol=f"S{number % 10}",
        price=Decimal("1.00"),
        traded_at=AT,
        received_at=AT,
        feed="iex",
        sequence=number + 1,
    )
    return Outgoing(subject or price_subject(message.symbol), message, message_id)


async def stored(nats_url: str) -> int:
    client = await nats.connect(nats_url)
    try:
        return (await client.jetstream().stream_info(PRICES.name)).state.messages
    finally:
        await client.close()


async def test_a_batch_larger_than_what_may_be_in_flight_is_stored_whole_and_in_order(
    bus: Bus, nats_url: str
) -> None:
    assert publishing.PUBLISHES_IN_FLIGHT_MAX < 1000
    assert await bus.publish_all(map(tick, range(1000))) == []
    client = await nats.connect(nats_url)
    js = client.jetstream()
    assert (await js.stream_info(PRICES.name)).state.messages == 1000
    for number in (0, 499, 999):
        message = await js.get_msg(PRICES.name, seq=number + 1)
        assert message.data is not None
        assert PriceTick.model_validate_json(message.data).sequence == number + 1
    await client.close()


async def test_the_first_of_a_batch_are_on_their_way_before_the_last_are_made(bus: Bus) -> None:
    batch = [tick(number, price_subject("S")) for number in range(200)]
    sending = asyncio.create_task(bus.publish_all(batch))
    sent: set[int] = set()
    while not sending.done():
        sent.add(bus._client.stats["out_msgs"])
        await asyncio.sleep(0)
    first = min(sent)
    assert {first + 32, first + 64, first + 96} <= sent
    assert sending.result() == []


async def test_an_empty_batch_is_published_at_once(bus: Bus) -> None:
    assert await bus.publish_all([]) == []


async def test_only_those_without_a_stream_are_reported_in_their_order(bus: Bus, nats_url: str) -> None:
    batch = [tick(number, "elsewhere" if number in (3, 300, 301) else None) for number in range(400)]
    failed = await bus.publish_all(batch)
    assert failed == [(batch[number], "no stream takes the subject") for number in (3, 300, 301)]
    assert await stored(nats_url) == 397


async def test_an_error_that_the_stream_answers_is_reported_with_its_reason(bus: Bus, nats_url: str) -> None:
    client = await nats.connect(nats_url)
    js = client.jetstream()
    await js.add_stream(name="SMALL", subjects=["small.>"], max_msg_size=10)
    failed = await bus.publish_all([tick(0), tick(1, "small.a"), tick(2)])
    assert [outgoing.subject for outgoing, _ in failed] == ["small.a"]
    assert "maximum" in failed[0][1]
    await js.delete_stream("SMALL")
    await client.close()


async def test_an_answer_of_somebody_else_is_no_acknowledgement(bus: Bus, nats_url: str) -> None:
    client = await nats.connect(nats_url)

    async def interfere(message: Msg) -> None:
        await message.respond(b'{"ok":true}')

    await client.subscribe("elsewhere", cb=interfere)
    await settled(client)
    failed = await bus.publish_all([tick(0, "elsewhere")])
    assert [reason for _, reason in failed] == ["the answer is no acknowledgement"]
    await client.close()


async def test_what_nobody_acknowledges_is_given_up_and_the_rest_is_stored(
    bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "PUBLISH_TIMEOUT_SECONDS", 0.3)
    client = await nats.connect(nats_url)
    await client.subscribe("mute")  # there is a listener, hence no refusal of the server
    await settled(client)
    failed = await bus.publish_all([tick(0), tick(1, "mute"), tick(2)])
    assert [(outgoing.subject, reason) for outgoing, reason in failed] == [
        ("mute", "no acknowledgement came in time")
    ]
    assert await stored(nats_url) == 2
    await client.close()


async def test_callers_at_once_share_the_room_and_all_is_stored(
    bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "PUBLISHES_IN_FLIGHT_MAX", 8)
    async with asyncio.TaskGroup() as tasks:
        callers = [tasks.create_task(bus.publish_all(map(tick, range(25)))) for _ in range(40)]
    assert [caller.result() for caller in callers] == [[]] * 40
    assert await stored(nats_url) == 1000


async def test_a_caller_that_is_cancelled_leaves_the_room_to_others(
    bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "PUBLISHES_IN_FLIGHT_MAX", 4)
    client = await nats.connect(nats_url)
    await client.subscribe("mute")
    await settled(client)
    waiting = asyncio.create_task(bus.publish_all(tick(number, "mute") for number in range(100)))
    second = asyncio.create_task(bus.publish_all(map(tick, range(10))))
    await settled(client)
    assert not second.done()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await second == []
    await client.close()


async def test_a_second_copy_is_discarded_and_counts_as_published(bus: Bus, nats_url: str) -> None:
    assert await bus.publish_all([tick(0, message_id="a"), tick(0, message_id="a")]) == []
    assert await stored(nats_url) == 1


def states(pid: int) -> set[str]:
    """Return the states in which a process's threads are."""
    return {
        (each / "stat").read_text().rpartition(") ")[2][0] for each in Path(f"/proc/{pid}/task").iterdir()
    }


async def is_frozen(pid: int) -> bool:
    """Tell whether a process that was told to stop has: its threads do so one after the other."""
    return states(pid) == {"T"}


async def test_without_its_server_publishing_fails_at_once_and_works_again_with_it(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as server:
        async with Bus(server.url, name="tests") as bus:
            assert await bus.wait_until_ready(asyncio.Event())
            server.process.send_signal(signal.SIGSTOP)
            await eventually(partial(is_frozen, server.process.pid))
            frozen = asyncio.create_task(bus.publish_all(map(tick, range(3))))
            await asyncio.wait({frozen}, timeout=0.1)
            server.process.kill()  # long before the batch would be given up
            failed = await asyncio.wait_for(frozen, 2)
            assert [reason for _, reason in failed] == ["connection lost"] * 3
            with pytest.raises(BusUnavailable):
                await bus.publish(tick(0))
        with nats_server(tmp_path / "nats") as again:
            async with Bus(again.url, name="tests") as bus:

                async def is_published() -> bool:
                    return await bus.publish_all([tick(0)]) == []

                await eventually(is_published)


async def test_after_a_reconnect_acknowledgements_are_heard_again(bus: Bus, nats_url: str) -> None:
    await bus.publish(tick(0))
    found = bus.streams_found
    await bus._client.force_reconnect()

    async def is_reconnected() -> bool:
        return bus.streams_found > found and await bus.check() is None

    await eventually(is_reconnected)
    assert await bus.publish_all(map(tick, range(1, 3))) == []
    assert await stored(nats_url) == 3
