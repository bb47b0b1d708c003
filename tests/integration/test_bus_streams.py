"""The streams as they are found, made and brought up to date on a real NATS server; what is put and taken there."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.js.api import StorageType
from nats.js.errors import APIError
from structlog.testing import capture_logs

from shared.bus import Bus, BusUnavailable, Outgoing
from shared.messages import (
    ALL_TICKETS,
    FEED,
    FEED_STATUS,
    PORTFOLIO,
    PRICES,
    PRICES_CONFIRMED,
    PROBES,
    SNAPSHOT_DUE,
    SNAPSHOTS_TAKEN,
    STREAMS,
    TICKETS,
    TIMER,
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


async def use(nats_url: str, *owned: Stream, sized: Iterable[Stream] = ()) -> None:
    async with Bus(nats_url, name="tests", owned=owned, sized=sized) as bus:
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


async def test_no_stream_takes_the_space_of_another_and_what_users_cause_is_bounded(
    nats_url: str, client: Client
) -> None:
    """Those that the version before has made have no bound yet."""
    js = client.jetstream()
    await js.add_stream(name="TIMER", subjects=[SNAPSHOT_DUE], max_age=2 * 86400)
    await js.add_stream(name="PORTFOLIO", subjects=list(PORTFOLIO.subjects), max_age=3 * 86400)
    await js.add_stream(name="TICKETS", subjects=[ALL_TICKETS], max_age=60, storage=StorageType.MEMORY)
    await use(nats_url)
    assert (await configuration(client, TIMER))["max_bytes"] == -1  # one service sees to it, not each
    await use(nats_url, sized=(TIMER, PORTFOLIO, TICKETS))
    found = {stream.name: await configuration(client, stream) for stream in STREAMS}
    bounds = {name: (each["max_bytes"], each["discard"]) for name, each in found.items()}
    assert bounds == {
        "PRICES": (1_073_741_824, "new"),
        "TIMER": (134_217_728, "old"),
        "PORTFOLIO": (268_435_456, "old"),
        "TICKETS": (16_777_216, "new"),
        "DEAD_LETTERS": (33_554_432, "old"),
        "FEED": (-1, "old"),  # a message for each subject, of which there are few
        "PROBES": (-1, "old"),
    }
    assert found["PORTFOLIO"]["max_age"] == 3 * 86400 * 1_000_000_000
    in_files = sum(size for name, (size, _) in bounds.items() if size > 0 and name != "TICKETS")
    assert in_files <= 3 / 4 * 2 * 1024**3  # of max_file_store in ops/nats.conf


async def test_tickets_beyond_the_bound_are_refused_and_none_that_is_given_out_is_lost(
    bus: Bus, client: Client
) -> None:
    await change(client, TICKETS, max_bytes=2000)
    subjects = [ticket_subject(f"t{number}") for number in range(50)]
    refused = await bus.publish_all([Outgoing(subject, TICKET) for subject in subjects])
    assert {why for _, why in refused} == {"maximum bytes exceeded (code 503, 10077)"}
    assert await bus.check() is None  # the server is well
    given = set(subjects) - {outgoing.subject for outgoing, _ in refused}
    assert given
    for subject in given:
        assert await bus.take(TICKETS, subject) is not None
    await bus.put(TICKETS, ticket_subject("another"), TICKET)


async def test_size_that_cannot_be_had_is_asked_for_once_in_a_connection(
    nats_url: str, client: Client
) -> None:
    async def looks() -> int:
        """Return how often it has looked: each time it stores a probe."""
        state = (await client.jetstream().stream_info(PROBES.name)).state
        return state.last_seq

    async def has_looked_twice() -> bool:
        bus._doubtful.set()
        return await looks() >= before + 2

    async def is_said_again() -> bool:
        return said() > said_before

    def said() -> int:
        return sum(line["event"] == "bus_stream_unbounded" for line in logs)

    owned = PRICES._replace(bytes_max=1 << 50)
    with capture_logs() as logs:
        async with Bus(nats_url, name="tests", owned=(owned,)) as bus:
            said_before = 0
            await eventually(is_said_again)  # when it is made
            async with asyncio.timeout(10):
                assert await bus.wait_until_ready(asyncio.Event())
            for _ in range(2):
                before = await looks()
                await eventually(has_looked_twice)
                said_before = said()
                await bus._client.force_reconnect()
                await eventually(is_said_again)
            assert said() == 3


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
