"""The streams as they are found, made and brought up to date on a real NATS server; what is put and taken there."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.js.errors import APIError
from structlog.testing import capture_logs

from shared.bus import Bus, BusUnavailable
from shared.messages import (
    FEED,
    FEED_STATUS,
    PORTFOLIO,
    PRICES,
    PRICES_CONFIRMED,
    SNAPSHOTS_TAKEN,
    STREAMS,
    TICKETS,
    Stream,
    StreamTicket,
    prices_stream,
    ticket_subject,
)
from tests.waiting import eventually

AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
TICKET = StreamTicket(subject="demo", ticket_expires_at=AT, token_expires_at=AT)


@pytest.fixture
async def client(nats_url: str) -> AsyncIterator[Client]:
    client = await nats.connect(nats_url)
    yield client
    await client.close()


async def configuration(client: Client, stream: Stream) -> dict[str, Any]:
    answer = await client.request(f"$JS.API.STREAM.INFO.{stream.name}")
    found: dict[str, Any] = json.loads(answer.data)["config"]
    return found


async def change(client: Client, stream: Stream, **changes: object) -> None:
    changed = await configuration(client, stream) | changes
    answer = await client.request(f"$JS.API.STREAM.UPDATE.{stream.name}", json.dumps(changed).encode())
    assert "error" not in json.loads(answer.data), answer.data


async def use(nats_url: str, *owned: Stream) -> None:
    async with Bus(nats_url, name="tests", owned=owned) as bus:
        async with asyncio.timeout(10):
            assert await bus.wait_until_ready(asyncio.Event())


async def test_streams_are_made_with_what_they_keep_and_where(nats_url: str, client: Client) -> None:
    await use(nats_url)
    prices, tickets = await configuration(client, PRICES), await configuration(client, TICKETS)
    # five minutes, four ticks a second
    assert (prices["max_msgs_per_subject"], prices["max_age"], prices["storage"]) == (1200, 0, "file")
    assert (tickets["max_msgs_per_subject"], tickets["max_age"], tickets["storage"]) == (
        -1,
        60_000_000_000,
        "memory",
    )
    assert tickets["duplicate_window"] == 60_000_000_000


async def test_only_what_can_be_published_again_is_acknowledged_before_it_is_on_the_platter(
    nats_url: str, client: Client
) -> None:
    await use(nats_url)
    modes = {stream.name: (await configuration(client, stream)).get("persist_mode") for stream in STREAMS}
    assert modes.pop("PRICES") == "async"
    assert set(modes.values()) == {None}


async def test_streams_of_the_version_before_are_brought_up_to_date_without_losing_what_is_in_them(
    nats_url: str, client: Client
) -> None:
    js = client.jetstream()
    await js.add_stream(name="PRICES", subjects=["prices.v1.>"], max_msgs_per_subject=1)
    await js.add_stream(name="FEED", subjects=[FEED_STATUS], max_msgs_per_subject=1)
    await js.add_stream(name="PORTFOLIO", subjects=[SNAPSHOTS_TAKEN], max_age=7 * 86400)
    await js.publish("prices.v1.equity.A", b"kept")
    await use(nats_url, prices_stream(timedelta(minutes=2)))
    assert (await configuration(client, PRICES))["max_msgs_per_subject"] == 480
    assert (await js.get_last_msg("PRICES", "prices.v1.equity.A")).data == b"kept"
    assert (await configuration(client, FEED))["subjects"] == [FEED_STATUS, PRICES_CONFIRMED]
    assert (await configuration(client, PORTFOLIO))["subjects"] == list(PORTFOLIO.subjects)


async def test_prices_are_bounded_so_that_they_leave_space_for_the_other_streams(
    nats_url: str, client: Client
) -> None:
    await client.jetstream().add_stream(name="PRICES", subjects=["prices.v1.>"], max_msgs_per_subject=1)
    await use(nats_url, PRICES)
    found = await configuration(client, PRICES)
    assert (found["max_bytes"], found["discard"]) == (1_073_741_824, "new")


async def test_full_stream_goes_on_with_subjects_that_have_all_they_may_keep(
    nats_url: str, client: Client
) -> None:
    """The last value of a symbol that has not traded for days stays, whatever else comes."""
    small = Stream("PRICES", ("prices.v1.>",), 3, bytes_max=2000, recoverable=True)
    async with Bus(nats_url, name="tests", owned=(small,)) as bus:
        assert await bus.wait_until_ready(asyncio.Event())
    await change(client, PRICES, max_bytes=2000)
    js = client.jetstream()
    await js.publish("prices.v1.equity.QUIET", b"quiet")
    for number in range(50):
        await js.publish("prices.v1.equity.BUSY", b"%d" % number)
    full = 0
    for number in range(50):
        try:
            await js.publish(f"prices.v1.equity.S{number}", b"x" * 100)
        except APIError as error:
            full += error.err_code == 10077  # maximum bytes exceeded
    assert full > 0
    await js.publish("prices.v1.equity.BUSY", b"newest")
    assert (await js.get_last_msg("PRICES", "prices.v1.equity.BUSY")).data == b"newest"
    assert (await js.get_last_msg("PRICES", "prices.v1.equity.QUIET")).data == b"quiet"
    assert (await js.stream_info("PRICES", subjects_filter="prices.v1.equity.BUSY")).state.subjects == {
        "prices.v1.equity.BUSY": 3
    }


async def test_server_without_so_much_space_has_the_stream_without_a_bound(
    nats_url: str, client: Client
) -> None:
    for _ in ("made", "found"):
        await use(nats_url, PRICES._replace(bytes_max=1 << 50))
        found = await configuration(client, PRICES)
        assert (found["max_bytes"], found["discard"]) == (-1, "old")
    await use(nats_url, PRICES)
    assert (await configuration(client, PRICES))["max_bytes"] == 1_073_741_824


async def test_who_does_not_own_a_stream_leaves_what_it_keeps(nats_url: str, client: Client) -> None:
    await use(nats_url, prices_stream(timedelta(minutes=2)))
    await use(nats_url)
    assert (await configuration(client, PRICES))["max_msgs_per_subject"] == 480


async def test_other_changes_of_an_operator_are_kept(nats_url: str, client: Client) -> None:
    await use(nats_url)
    await change(
        client,
        PRICES,
        max_bytes=1_000_000,
        description="ours",
        subjects=["prices.v1.>", "prices.v2.>"],
        allow_msg_ttl=True,
        subject_delete_marker_ttl=2_000_000_000,
    )
    before = await configuration(client, PRICES)
    await use(nats_url, prices_stream(timedelta(minutes=1)))
    assert await configuration(client, PRICES) == before | {"max_msgs_per_subject": 240}


async def test_a_shorter_age_takes_the_duplicate_window_with_it(nats_url: str, client: Client) -> None:
    await use(nats_url)
    await use(nats_url, PORTFOLIO._replace(max_age=timedelta(seconds=30)))
    found = await configuration(client, PORTFOLIO)
    assert (found["max_age"], found["duplicate_window"]) == (30_000_000_000, 30_000_000_000)


async def test_a_subject_that_is_missing_is_added_while_the_service_runs(bus: Bus, client: Client) -> None:
    await change(client, FEED, subjects=[FEED_STATUS])
    await bus._client.force_reconnect()

    async def is_added() -> bool:
        found = await configuration(client, FEED)
        return bool(found["subjects"] == [FEED_STATUS, PRICES_CONFIRMED])

    await eventually(is_added)


async def test_copies_on_a_server_that_is_alone_are_a_problem_that_is_said_with_what_to_do(
    nats_url: str,
) -> None:
    with capture_logs() as logs:
        async with Bus(nats_url, name="tests", replicas=3) as bus:

            async def is_said() -> bool:
                return "replicas > 1 not supported" in str(await bus.check())

            await eventually(is_said)
    (problem,) = (line for line in logs if line["event"] == "bus_problem")
    assert "NATS_STREAM_REPLICAS" in problem["advice"]


# ---- tickets -------------------------------------------------------------------------------------


async def test_what_was_put_is_taken_once(bus: Bus) -> None:
    await bus.put(TICKETS, ticket_subject("a"), TICKET)
    taken = await bus.take(TICKETS, ticket_subject("a"))
    assert taken is not None
    assert StreamTicket.model_validate_json(taken) == TICKET
    assert await bus.take(TICKETS, ticket_subject("a")) is None


async def test_what_was_never_put_cannot_be_taken(bus: Bus) -> None:
    await bus.put(TICKETS, ticket_subject("a"), TICKET)
    assert await bus.take(TICKETS, ticket_subject("b")) is None


async def test_of_many_takers_at_once_one_gets_it(bus: Bus, nats_url: str) -> None:
    async with Bus(nats_url, name="tests") as other:
        assert await other.wait_until_ready(asyncio.Event())
        for number in range(20):
            subject = ticket_subject(f"t{number}")
            await bus.put(TICKETS, subject, TICKET)
            takers = [(bus, other)[taker % 2].take(TICKETS, subject) for taker in range(10)]
            taken = await asyncio.gather(*takers)
            assert sum(payload is not None for payload in taken) == 1


async def test_a_ticket_that_nobody_takes_is_gone_when_its_time_is_over(bus: Bus, client: Client) -> None:
    await change(client, TICKETS, max_age=200_000_000, duplicate_window=100_000_000)
    await bus.put(TICKETS, ticket_subject("a"), TICKET)

    async def is_gone() -> bool:
        state = (await client.jetstream().stream_info(TICKETS.name)).state
        return state.messages == 0

    await eventually(is_gone)
    assert await bus.take(TICKETS, ticket_subject("a")) is None


async def test_without_a_server_nothing_is_put_or_taken() -> None:
    async with Bus("nats://127.0.0.1:9", name="tests") as unconnected:
        with pytest.raises(BusUnavailable):
            await unconnected.put(TICKETS, ticket_subject("a"), TICKET)
        with pytest.raises(BusUnavailable):
            await unconnected.take(TICKETS, ticket_subject("a"))
