"""Asking and answering over a real NATS server."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import nats
import pytest

from local.servers import nats_server
from shared.bus import Bus, BusUnavailable, Refused, Unanswered
from shared.messages import Message, PricesReply, PricesRequested, SnapshotDue
from tests.waiting import eventually, settled

SUBJECT = "tests.v1.requested"
QUESTION = PricesRequested(symbols=("AAPL", "BRK.B"))
Answer = Callable[[bytes], Awaitable[Message]]


async def echo(payload: bytes) -> Message:
    return PricesReply(prices=(), unknown=PricesRequested.model_validate_json(payload).symbols)


@asynccontextmanager
async def serving(bus: Bus, answer: Answer = echo, **options: object) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bus.serve(SUBJECT, answer, stop, **options))  # type: ignore[arg-type]
        yield stop
        stop.set()


async def ask(bus: Bus, timeout_seconds: float = 5) -> PricesReply:
    return await bus.request(SUBJECT, QUESTION, PricesReply, timeout_seconds=timeout_seconds)


async def answered(bus: Bus) -> PricesReply:
    """Ask until somebody is there."""

    async def reply() -> PricesReply | None:
        try:
            return await ask(bus)
        except Unanswered:
            return None

    found = await eventually(reply)
    assert found is not None
    return found


async def refusal(bus: Bus, timeout_seconds: float = 5) -> Refused:
    async def refused() -> Refused | None:
        try:
            await ask(bus, timeout_seconds)
        except Refused as refusal:
            return refusal
        except Unanswered:
            pass
        return None

    found = await eventually(refused)
    assert found is not None
    return found


async def test_a_request_is_answered(bus: Bus) -> None:
    async with serving(bus):
        assert await answered(bus) == PricesReply(prices=(), unknown=("AAPL", "BRK.B"))


async def test_without_a_responder_there_is_no_answer_and_no_waiting(bus: Bus) -> None:
    with pytest.raises(Unanswered, match=f"nobody answers {SUBJECT}"):
        await asyncio.wait_for(ask(bus, timeout_seconds=60), 5)


async def test_without_a_server_there_is_no_answer() -> None:
    async with Bus("nats://127.0.0.1:9", name="tests") as unconnected:
        with pytest.raises(BusUnavailable):
            await ask(unconnected)


async def test_a_responder_that_is_too_slow_is_not_waited_for(bus: Bus) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    async def answer(payload: bytes) -> Message:
        begun.set()
        await never.wait()
        return await echo(payload)

    async with serving(bus, answer):

        async def is_too_slow() -> bool:
            with pytest.raises(Unanswered) as raised:
                await ask(bus, timeout_seconds=0.2)
            return "within 0.2 s" in str(raised.value)

        await eventually(is_too_slow)
        assert begun.is_set()
        never.set()


@pytest.mark.parametrize(
    "refused", [Refused(429, "wait: 100 % too soon", 17), Refused(404, "there is no such user")]
)
async def test_a_refusal_arrives_with_its_code_text_and_seconds(bus: Bus, refused: Refused) -> None:
    async def answer(_: bytes) -> Message:
        raise refused

    async with serving(bus, answer):
        arrived = await refusal(bus)
        assert (arrived.code, arrived.text, arrived.retry_after_seconds) == (
            refused.code,
            refused.text,
            refused.retry_after_seconds,
        )


async def test_a_refusal_has_the_headers_of_the_service_convention(bus: Bus, nats_url: str) -> None:
    async def answer(_: bytes) -> Message:
        raise Refused(429, "too soon", 17)

    client = await nats.connect(nats_url)
    async with serving(bus, answer):
        await refusal(bus)
        raw = await client.request(SUBJECT, b"", timeout=5)
    assert raw.data == b""
    assert raw.headers == {
        "Nats-Service-Error-Code": "429",
        "Nats-Service-Error": "too soon",
        "Retry-After": "17",
    }
    await client.close()


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"symbols":[]}', b"\xff", b'{"symbols":["A B"]}'])
async def test_a_malformed_payload_is_refused(bus: Bus, nats_url: str, payload: bytes) -> None:
    client = await nats.connect(nats_url)
    async with serving(bus):
        await answered(bus)
        raw = await client.request(SUBJECT, payload, timeout=5)
    assert raw.headers is not None
    assert raw.headers["Nats-Service-Error-Code"] == "400"
    assert raw.headers["Nats-Service-Error"]
    await client.close()


async def test_an_unexpected_error_is_answered_and_the_next_request_as_well(bus: Bus) -> None:
    broken = True

    async def answer(payload: bytes) -> Message:
        if broken:
            raise KeyError("secret")
        return await echo(payload)

    async with serving(bus, answer):
        refused = await refusal(bus)
        assert (refused.code, refused.text) == (500, "the request failed")
        broken = False
        assert (await ask(bus)).unknown == QUESTION.symbols


async def test_more_requests_than_at_once_are_refused_and_none_is_silent(bus: Bus) -> None:
    let = asyncio.Event()

    async def answer(payload: bytes) -> Message:
        await let.wait()
        return await echo(payload)

    async with serving(bus, answer, at_once_max=2):
        first = [asyncio.create_task(answered(bus)) for _ in range(2)]
        refused = await refusal(bus, timeout_seconds=0.2)
        assert (refused.code, refused.retry_after_seconds) == (503, 1)
        let.set()
        assert len(await asyncio.gather(*first)) == 2


async def test_an_answer_that_takes_too_long_is_refused(bus: Bus) -> None:
    async def answer(_: bytes) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(bus, answer, answer_seconds_max=0.05):
        refused = await refusal(bus)
        assert (refused.code, refused.text) == (503, "the answer took too long")


async def test_an_answer_that_is_too_long_for_the_server_is_refused(bus: Bus) -> None:
    async def answer(_: bytes) -> Message:
        return PricesReply(prices=(), unknown=("A" * 32,) * 40_000)

    async with serving(bus, answer):
        assert (await refusal(bus)).code == 413


async def test_an_answer_of_another_kind_is_none(bus: Bus) -> None:
    async def answer(_: bytes) -> Message:
        return SnapshotDue(scheduled_at=datetime(2026, 3, 2, tzinfo=UTC))

    async with serving(bus, answer):

        async def is_said() -> bool:
            with pytest.raises(Unanswered) as raised:
                await ask(bus)
            return "is no PricesReply" in str(raised.value)

        await eventually(is_said)


async def test_of_a_queue_one_replica_answers(bus: Bus, nats_url: str) -> None:
    asked = [0, 0]

    def counting(replica: int) -> Answer:
        async def answer(payload: bytes) -> Message:
            asked[replica] += 1
            return await echo(payload)

        return answer

    async with (
        Bus(nats_url, name="tests") as other,
        serving(bus, counting(0), queue="q"),
        serving(other, counting(1), queue="q"),
    ):

        async def both_answer() -> bool:
            await answered(bus)
            return min(asked) > 0

        await eventually(both_answer)
        before = sum(asked)
        for _ in range(20):
            await ask(bus)
        assert sum(asked) == before + 20


async def test_an_answer_under_way_is_finished_when_the_service_stops(bus: Bus) -> None:
    begun, let = asyncio.Event(), asyncio.Event()

    async def answer(payload: bytes) -> Message:
        begun.set()
        await let.wait()
        return await echo(payload)

    async with serving(bus, answer) as stop:
        asking = asyncio.create_task(answered(bus))
        await begun.wait()
        stop.set()
        let.set()
        assert (await asking).unknown == QUESTION.symbols


async def test_a_server_that_ends_answers_at_once_and_one_that_is_back_is_served_again(
    tmp_path: Path,
) -> None:
    never = asyncio.Event()

    async def answer(payload: bytes) -> Message:
        await never.wait()
        return await echo(payload)

    with nats_server(tmp_path / "nats") as server:
        async with Bus(server.url, name="tests") as bus, serving(bus, answer):
            assert await bus.wait_until_ready(asyncio.Event())
            asking = asyncio.create_task(ask(bus, timeout_seconds=60))
            await asyncio.wait({asking}, timeout=0.2)
            server.process.send_signal(signal.SIGKILL)
            with pytest.raises(Unanswered):
                await asyncio.wait_for(asking, 5)
            never.set()


async def test_requests_are_answered_again_after_a_reconnect(bus: Bus) -> None:
    async with serving(bus):
        await answered(bus)
        found = bus.streams_found
        await bus._client.force_reconnect()

        async def is_reconnected() -> bool:
            return bus.streams_found > found

        await eventually(is_reconnected)
        assert (await ask(bus)).unknown == QUESTION.symbols


async def test_a_request_without_a_reply_subject_is_left(bus: Bus, nats_url: str) -> None:
    client = await nats.connect(nats_url)
    async with serving(bus):
        await answered(bus)
        await client.publish(SUBJECT, json.dumps({"symbols": ["A"]}).encode())
        await settled(client)
        assert (await ask(bus)).unknown == QUESTION.symbols
    await client.close()


async def test_who_stops_answering_while_the_server_is_frozen_hears_on_and_is_asked_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease ends, say. Cutting off the library's drain would end its reading with the pong that comes late."""
    with nats_server(tmp_path) as server:
        async with Bus(server.url, name="tests") as bus:
            async with serving(bus, refuses, queue="q"):
                assert (await refusal(bus)).code == 503
                server.process.send_signal(signal.SIGSTOP)
            server.process.send_signal(signal.SIGCONT)
            async with serving(bus, queue="q"):
                assert (await answered(bus)).unknown == QUESTION.symbols
                began = time.monotonic()
                for _ in range(20):
                    assert (await ask(bus)).unknown == QUESTION.symbols
                assert time.monotonic() - began < 5
    assert "InvalidStateError" not in caplog.text


async def refuses(_: bytes) -> Message:
    raise Refused(503, "the former term")
