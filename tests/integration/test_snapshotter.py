"""The snapshotter on real PostgreSQL and NATS. Values are worked by hand."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, cast

import asyncpg
import nats
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.js.errors import NotFoundError
from prometheus_client import Counter
from structlog.testing import capture_logs

from services.snapshotter import queries, snapshots, timer
from shared.bus import Bus, Outgoing, Stored
from shared.clock import last_boundary, utc_now
from shared.database import Database
from shared.database_clock import DatabaseClock
from shared.market_calendar import Calendar
from shared.market_hours import MarketHours
from shared.messages import SNAPSHOT_DUE, SNAPSHOTS_TAKEN, TIMER, SnapshotDue, SnapshotsTaken
from tests.factories import create_user, set_position, set_price
from tests.market import closed_now, open_now
from tests.metrics import sample
from tests.waiting import eventually

SLOT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


async def stored(database: Database) -> list[tuple[object, ...]]:
    rows = await database.fetch(
        """
        SELECT subject, timestamp, total_value, portfolio_snapshots.cash_balance, investment_value,
            unpriced_positions, simulated
        FROM portfolio_snapshots JOIN users ON users.id = user_id ORDER BY subject, timestamp
        """
    )
    return [tuple(row) for row in rows]


async def details(database: Database) -> list[tuple[object, ...]]:
    rows = await database.fetch(
        "SELECT ticker, shares, cost_basis, current_value, price_per_share FROM position_snapshots ORDER BY ticker"
    )
    return [tuple(row) for row in rows]


async def test_snapshot_stores_the_seeds_example(database: Database) -> None:
    await create_user(
        database, cash="5000.50", positions={"AAPL": ("100", "15000"), "MSFT": ("250", "99000")}
    )
    await set_price(database, "AAPL", "175.00")
    await set_price(database, "MSFT", "410.00")
    taken = await queries.take_snapshots(database, SLOT, 0, 1)
    assert taken == queries.ShardTaken(portfolios=1, positions=2, unpriced=0, added=1)
    assert await stored(database) == [
        ("demo", SLOT, Decimal("125000.50"), Decimal("5000.50"), Decimal("120000.00"), 0, False)
    ]
    assert await details(database) == [
        ("AAPL", Decimal("100"), Decimal("15000.00"), Decimal("17500.00"), Decimal("175.0000")),
        ("MSFT", Decimal("250"), Decimal("99000.00"), Decimal("102500.00"), Decimal("410.0000")),
    ]


async def test_each_position_is_rounded_so_that_the_parts_add_up(database: Database) -> None:
    await create_user(database, positions=dict.fromkeys(("A", "B", "C"), ("0.335", "1")))
    for name in ("A", "B", "C"):
        await set_price(database, name, "1")
    await queries.take_snapshots(database, SLOT, 0, 1)
    assert (await stored(database))[0][2] == Decimal("1.02")
    assert [row[3] for row in await details(database)] == [Decimal("0.34")] * 3


async def test_unpriced_position_is_left_out_and_counted(database: Database) -> None:
    await create_user(database, cash="10", positions={"AAPL": ("2", "1"), "UNKNOWN": ("5", "1")})
    await set_price(database, "AAPL", "3.50")
    taken = await queries.take_snapshots(database, SLOT, 0, 1)
    assert taken == queries.ShardTaken(portfolios=1, positions=1, unpriced=1, added=1)
    assert (await stored(database))[0][2:6] == (Decimal("17.00"), Decimal("10.00"), Decimal("7.00"), 1)


async def test_every_active_user_has_a_snapshot_also_with_cash_only(database: Database) -> None:
    await create_user(database, "with cash", cash="4000")
    await create_user(database, "with nothing")
    await create_user(database, "deactivated", cash="1", active=False)
    await queries.take_snapshots(database, SLOT, 0, 1)
    assert [(row[0], row[2]) for row in await stored(database)] == [
        ("with cash", Decimal("4000.00")),
        ("with nothing", Decimal("0.00")),
    ]


async def test_sold_position_is_not_stored(database: Database) -> None:
    await create_user(database, positions={"AAPL": ("0", "0")})
    await set_price(database, "AAPL", "3.50")
    assert (await queries.take_snapshots(database, SLOT, 0, 1)).positions == 0


async def test_simulated_prices_mark_the_snapshot(database: Database) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "3.50", feed="simulated")
    await queries.take_snapshots(database, SLOT, 0, 1)
    assert (await stored(database))[0][6] is True


async def test_position_beyond_belief_is_unpriced_and_harms_nobody_else(database: Database) -> None:
    await create_user(database, "absurd", positions={"DEAR": ("99999999999", "1")})
    await create_user(database, "plain", positions={"DEAR": ("1", "1")})
    await set_price(database, "DEAR", "99999999999.9999")
    await queries.take_snapshots(database, SLOT, 0, 1)
    assert [(row[0], row[2], row[5]) for row in await stored(database)] == [
        ("absurd", Decimal("0.00"), 1),
        ("plain", Decimal("100000000000.00"), 0),
    ]


async def test_second_delivery_changes_nothing_and_tells_what_is_stored(database: Database) -> None:
    user_id = await create_user(database, positions={"AAPL": ("2", "1"), "NONE": ("1", "1")})
    await set_price(database, "AAPL", "10")
    await queries.take_snapshots(database, SLOT, 0, 1)
    before = await stored(database), await details(database)
    await set_price(database, "AAPL", "99")
    await set_position(database, user_id, "AAPL", "7")
    again = await queries.take_snapshots(database, SLOT, 0, 1)
    assert again == queries.ShardTaken(portfolios=1, positions=1, unpriced=1, added=0)
    assert (await stored(database), await details(database)) == before


async def test_user_whose_deletion_has_begun_is_left_out_without_waiting(
    database: Database, database_url: str
) -> None:
    leaving = await create_user(database, "leaving", cash="1", positions={"AAPL": ("1", "1")})
    await create_user(database, "staying", cash="2", positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    other = await asyncpg.connect(database_url)
    deletion = other.transaction()
    await deletion.start()
    await other.execute("DELETE FROM users WHERE id = $1", leaving)
    assert (await queries.take_snapshots(database, SLOT, 0, 1)).added == 1
    await deletion.commit()
    await other.close()
    assert [row[0] for row in await stored(database)] == ["staying"]
    assert len(await details(database)) == 1


async def test_user_deleted_before_the_snapshot_commits_leaves_nothing(
    database: Database, database_url: str
) -> None:
    leaving = await create_user(database, "leaving", cash="1", positions={"AAPL": ("1", "1")})
    await create_user(database, "staying", cash="2", positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    other = await asyncpg.connect(database_url)
    taking = other.transaction()
    await taking.start()
    await other.fetchrow(queries.TAKE_SNAPSHOTS, utc_now(), 0, 1)
    deleting = asyncio.create_task(database.fetch("DELETE FROM users WHERE id = $1", leaving, timeout=10))

    async def is_waiting_for_the_snapshot() -> bool:
        return bool(await database.fetch_value("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    await eventually(is_waiting_for_the_snapshot)
    await taking.commit()
    await deleting
    await other.close()
    assert await database.fetch_value("SELECT count(*) FROM portfolio_snapshots") == 1
    assert await database.fetch_value("SELECT count(*) FROM position_snapshots") == 1


async def test_delivery_that_adds_one_more_portfolio_tells_all_that_is_stored(database: Database) -> None:
    await create_user(database, "first", cash="1", positions={"AAPL": ("1", "1"), "NONE": ("1", "1")})
    await set_price(database, "AAPL", "10")
    await queries.take_snapshots(database, SLOT, 0, 1)
    await create_user(database, "second", positions={"AAPL": ("1", "1")})
    again = await queries.take_snapshots(database, SLOT, 0, 1)
    assert again == queries.ShardTaken(portfolios=2, positions=2, unpriced=1, added=1)


async def test_replicas_at_once_store_each_portfolio_once(database: Database) -> None:
    for number in range(50):
        await create_user(database, f"user {number}", positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    taken = await asyncio.gather(*(queries.take_snapshots(database, SLOT, 0, 1) for _ in range(4)))
    assert sum(replica.added for replica in taken) == 50
    assert len(await stored(database)) == 50
    assert len(await details(database)) == 50


async def test_shards_divide_the_users_without_gap_or_overlap(database: Database) -> None:
    for number in range(20):
        await create_user(database, f"user {number}", cash="1")
    taken = [await queries.take_snapshots(database, SLOT, shard, 3) for shard in range(3)]
    assert sum(part.added for part in taken) == 20
    assert all(part.added > 0 for part in taken)


async def test_details_go_with_their_snapshot_and_all_with_the_user(database: Database) -> None:
    for name in ("keeps", "leaves"):
        await create_user(database, name, positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    for minutes in range(2):
        await queries.take_snapshots(database, SLOT + minutes * MINUTE, 0, 1)
    await database.fetch("DELETE FROM users WHERE subject = 'leaves'")
    assert {row[0] for row in await stored(database)} == {"keeps"}
    assert len(await details(database)) == 2
    await database.fetch("DELETE FROM portfolio_snapshots WHERE timestamp = $1", SLOT)
    assert len(await details(database)) == 1


async def test_one_user_with_ten_thousand_positions_is_one_snapshot(database: Database) -> None:
    user_id = await create_user(database)
    await database.fetch(
        "INSERT INTO positions SELECT $1, 'S' || n, 1, 1 FROM generate_series(1, 10000) AS n", user_id
    )
    await database.fetch(
        "INSERT INTO asset_prices SELECT 'S' || n, 0.01, now(), now(), now(), 'iex' FROM generate_series(1, 10000) AS n"
    )
    taken = await queries.take_snapshots(database, SLOT, 0, 1)
    assert (taken.positions, (await stored(database))[0][2]) == (10_000, Decimal("100.00"))


shares = st.decimals(min_value=0, max_value=10**6, places=9)
prices = st.decimals(min_value="0.0001", max_value=10**5, places=4)
tickers = st.sampled_from("ABCDEF")
portfolios = st.lists(
    st.tuples(
        st.decimals(min_value=-(10**6), max_value=10**9, places=2),
        st.booleans(),
        st.dictionaries(tickers, shares, max_size=6),
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    portfolios=portfolios,
    priced=st.dictionaries(tickers, st.tuples(prices, st.sampled_from(("iex", "simulated")))),
    shards=st.integers(1, 3),
)
async def test_snapshot_is_the_valuation_for_whatever_is_held(
    database: Database,
    portfolios: list[tuple[Decimal, bool, dict[str, Decimal]]],
    priced: dict[str, tuple[Decimal, str]],
    shards: int,
) -> None:
    for table in ("users", "asset_prices"):
        await database.fetch(f"DELETE FROM {table}")  # noqa: S608
    for number, (cash, active, held) in enumerate(portfolios):
        positions = {ticker: (f"{count}", "1") for ticker, count in held.items()}
        await create_user(database, f"user {number}", cash=f"{cash}", active=active, positions=positions)
    for ticker, (price, feed) in priced.items():
        await set_price(database, ticker, f"{price}", feed=feed)
    taken = [await queries.take_snapshots(database, SLOT, shard, shards) for shard in range(shards)]
    valued = await database.fetch(
        """
        SELECT subject, $1::timestamptz AS timestamp, total_value, cash_balance, investment_value,
            unpriced_positions, simulated
        FROM portfolio_valuations WHERE is_active ORDER BY subject
        """,
        SLOT,
    )
    assert await stored(database) == [tuple(row) for row in valued]
    detailed = await database.fetch(
        """
        SELECT ticker, shares, cost_basis, current_value, price_per_share
        FROM priced_positions JOIN users ON users.id = user_id
        WHERE is_active AND current_value IS NOT NULL
        """
    )
    assert sorted(await details(database)) == sorted(tuple(row) for row in detailed)
    assert sum(part.positions for part in taken) == len(detailed)
    assert sum(part.unpriced for part in taken) == sum(row["unpriced_positions"] for row in valued)


async def test_memory_of_the_process_does_not_grow_with_users(database: Database) -> None:
    async def peak_bytes(users: int, slot: datetime) -> int:
        await database.fetch("DELETE FROM users", timeout=60)
        await database.fetch(
            "INSERT INTO users (subject) SELECT 'user ' || n FROM generate_series(1, $1::integer) AS n", users
        )
        await database.fetch(
            "INSERT INTO positions SELECT id, 'S' || n, 1, 1 FROM users, generate_series(1, 3) AS n",
            timeout=60,
        )
        tracemalloc.start()
        taken = await queries.take_snapshots(database, slot, 0, 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (taken.portfolios, taken.positions) == (users, 3 * users)
        return peak

    for n in (1, 2, 3):
        await set_price(database, f"S{n}", "1")
    await peak_bytes(1, SLOT)  # what is made once for all
    few, many = await peak_bytes(1_000, SLOT + MINUTE), await peak_bytes(20_000, SLOT + 2 * MINUTE)
    assert many < few + 20_000


# ---- which slots may be stored -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds_ago", "takeable"),
    [(0, True), (299, True), (300, False), (86_400, False), (-4, True), (-60, False)],
)
def test_slot_is_taken_only_while_its_prices_are_the_current_ones(seconds_ago: int, takeable: bool) -> None:
    reason = snapshots.not_takeable(SLOT, SLOT + timedelta(seconds=seconds_ago), timedelta(minutes=5))
    assert (reason is None) == takeable


@pytest.mark.parametrize(
    ("slot", "takeable"),
    [
        ("2026-11-27T14:25", False),  # a half day, from 9:30 to 13:00 in New York
        ("2026-11-27T14:30", True),
        ("2026-11-27T18:00", True),
        ("2026-11-27T18:05", False),
        ("2026-11-28T16:00", False),
        ("2026-03-06T14:30", True),  # the Friday before the clocks go forward
        ("2026-03-09T13:30", True),
        ("2026-03-09T20:05", False),
    ],
)
def test_with_market_hours_slots_outside_the_session_are_not_taken(slot: str, takeable: bool) -> None:
    at = datetime.fromisoformat(f"{slot}Z")
    reason = snapshots.not_takeable(at, at, timedelta(minutes=5), MarketHours())
    assert (reason is None) == takeable


# ---- with the bus --------------------------------------------------------------------------------


@pytest.fixture
async def client(nats_url: str) -> AsyncIterator[Client]:
    """A NATS client of another party."""
    connected = await nats.connect(nats_url)
    yield connected
    await connected.close()


@asynccontextmanager
async def snapshotter(
    database: Database, bus: Bus, interval: timedelta = MINUTE, *, late_max: timedelta | None = None
) -> AsyncIterator[None]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(snapshots.run(database, bus, interval, stop, late_max=late_max))
        try:
            yield
        finally:
            stop.set()


@pytest.fixture
async def heard(client: Client) -> Callable[[], Awaitable[list[SnapshotsTaken]]]:
    """What has been published on the subject of taken snapshots."""

    async def read() -> list[SnapshotsTaken]:
        state = (await client.jetstream().stream_info("PORTFOLIO")).state
        messages = [
            await client.jetstream().get_msg("PORTFOLIO", sequence)
            for sequence in range(max(state.first_seq, 1), state.last_seq + 1)
        ]
        return [SnapshotsTaken.model_validate_json(message.data or b"") for message in messages]

    return read


async def is_all_acknowledged(client: Client) -> bool:
    try:
        info = await client.jetstream().consumer_info(TIMER.name, snapshots.CONSUMER)
    except NotFoundError:  # no snapshotter has begun yet
        return False
    return bool(info.num_ack_pending == 0 and info.num_pending == 0)


async def test_due_shard_is_stored_published_and_acknowledged(
    database: Database,
    bus: Bus,
    client: Client,
    heard: Callable[[], Awaitable[list[SnapshotsTaken]]],
) -> None:
    await create_user(database, cash="5", positions={"AAPL": ("2", "1"), "NONE": ("2", "1")})
    await set_price(database, "AAPL", "10")
    at = last_boundary(utc_now(), timedelta(seconds=1))
    async with snapshotter(database, bus):
        await bus.publish(timer.due(at, 0, 1))
        assert await eventually(heard) == [
            SnapshotsTaken(scheduled_at=at, shard=0, shards=1, portfolios=1, positions=1, unpriced=1)
        ]
        assert [(row[1], row[2]) for row in await stored(database)] == [(at, Decimal("25.00"))]
        assert await eventually(lambda: is_all_acknowledged(client))


async def test_replicas_timers_make_one_message_per_shard(bus: Bus, client: Client) -> None:
    at = last_boundary(utc_now(), MINUTE)
    await asyncio.gather(*(timer.announce(bus, at, MINUTE, 4, asyncio.Event()) for _ in range(3)))
    assert (await client.jetstream().stream_info(TIMER.name)).state.messages == 4


async def test_timer_begins_with_the_slot_that_is_under_way(bus: Bus, client: Client) -> None:
    stop = asyncio.Event()
    interval = timedelta(hours=1)
    before = last_boundary(utc_now(), interval)

    async def announced() -> SnapshotDue | None:
        if not (await client.jetstream().stream_info(TIMER.name)).state.messages:
            return None
        message = await client.jetstream().get_last_msg(TIMER.name, SNAPSHOT_DUE)
        return SnapshotDue.model_validate_json(message.data or b"")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(timer.run(bus, interval, 1, stop))
        due = await eventually(announced)
        stop.set()
    assert due is not None
    assert before <= due.scheduled_at <= utc_now()


async def test_timer_rests_while_the_market_is_closed_and_says_so_once(bus: Bus, client: Client) -> None:
    stop = asyncio.Event()
    calendar = Calendar(closed_now())
    several_slots_later = utc_now() + timedelta(seconds=0.8)

    async def has_rested() -> bool:
        return utc_now() > several_slots_later

    async def is_announced() -> bool:
        return (await client.jetstream().stream_info(TIMER.name)).state.messages > 0

    with capture_logs() as logs:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(timer.run(bus, timedelta(seconds=0.1), 1, stop, calendar=calendar))
            await eventually(has_rested)
            assert not await is_announced()
            calendar.hours = open_now()
            await eventually(is_announced)
            stop.set()
    said = [line["event"] for line in logs if line["event"] in ("snapshots_resting", "snapshots_resumed")]
    assert said == ["snapshots_resting", "snapshots_resumed"]


async def test_slot_outside_the_session_that_is_announced_by_hand_is_skipped_counted_and_said(
    database: Database, bus: Bus, client: Client
) -> None:
    await create_user(database, cash="1")
    skipped = snapshots.shards_handled.labels("skipped")
    before = counted(skipped)
    stop = asyncio.Event()
    with capture_logs() as logs:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(snapshots.run(database, bus, MINUTE, stop, calendar=Calendar(closed_now())))
            await bus.publish(timer.due(utc_now(), 0, 1))

            async def is_skipped() -> bool:
                return counted(skipped) == before + 1 and await is_all_acknowledged(client)

            await eventually(is_skipped)
            stop.set()
    assert await stored(database) == []
    said = [line for line in logs if line["event"] == "snapshot_skipped"]
    assert [line["reason"] for line in said] == [
        "outside the session, and SNAPSHOT_MARKET_HOURS_ONLY is true"
    ]


async def test_slot_in_the_session_is_taken(database: Database, bus: Bus) -> None:
    await create_user(database, cash="1")
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(snapshots.run(database, bus, MINUTE, stop, calendar=Calendar(open_now())))
        await bus.publish(timer.due(utc_now(), 0, 1))
        await eventually(lambda: stored(database))
        stop.set()


async def test_a_message_that_is_early_waits_as_the_timers_own_is_dropped_as_its_copy(
    database: Database, bus: Bus, client: Client
) -> None:
    await create_user(database, "early", cash="5")
    redeliveries = sample("bus_redeliveries_total", consumer=snapshots.CONSUMER)
    at = utc_now() + snapshots.CLOCK_SKEW_MAX + timedelta(seconds=1)
    with capture_logs() as logs:
        async with snapshotter(database, bus):
            await bus.publish(timer.due(at, 0, 1))

            async def is_postponed() -> bool:
                return any(line["event"] == "snapshot_postponed" for line in logs)

            await eventually(is_postponed)
            assert await stored(database) == []
            await bus.publish(timer.due(at, 0, 1))
            await eventually(lambda: stored(database))
            assert utc_now() >= at
            await eventually(lambda: is_all_acknowledged(client))
    assert [row[1] for row in await stored(database)] == [at]
    # That it comes again is no sign of a replica that died.
    assert "snapshot_redelivered" not in {line["event"] for line in logs}
    assert sample("bus_redeliveries_total", consumer=snapshots.CONSUMER) == redeliveries


async def test_an_outage_across_a_boundary_loses_no_later_slot(bus: Bus, client: Client) -> None:
    """The bus is away for 1.4 intervals: the slot under way when it returns is announced."""
    interval = timedelta(seconds=2)
    away_until = last_boundary(utc_now(), interval) + 1.4 * interval

    class Returning:
        async def publish_all(self, batch: Iterable[Outgoing]) -> list[tuple[Outgoing, str]]:
            messages = list(batch)
            if utc_now() < away_until:
                return [(outgoing, "away") for outgoing in messages]
            return await bus.publish_all(messages)

    stop = asyncio.Event()

    async def announced() -> SnapshotDue | None:
        if not (await client.jetstream().stream_info(TIMER.name)).state.messages:
            return None
        message = await client.jetstream().get_msg(TIMER.name, 1)
        return SnapshotDue.model_validate_json(message.data or b"")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(timer.run(cast(Bus, Returning()), interval, 1, stop))
        due = await eventually(announced)
        stop.set()
    assert due is not None
    assert due.scheduled_at == last_boundary(away_until, interval)


async def announced_slots(client: Client) -> list[datetime]:
    """Return the slots in the stream, in its order."""
    messages = (await client.jetstream().stream_info(TIMER.name)).state.messages
    stored = [await client.jetstream().get_msg(TIMER.name, number + 1) for number in range(messages)]
    return [SnapshotDue.model_validate_json(message.data or b"").scheduled_at for message in stored]


async def test_with_room_for_late_slots_an_outage_loses_none(bus: Bus, client: Client) -> None:
    """The bus is away for 3.5 slots, and there is time for ten."""
    interval = timedelta(seconds=0.6)
    first = last_boundary(utc_now(), interval)
    away_until = first + 3.5 * interval

    class Returning:
        async def wait_until_ready(self, stop: asyncio.Event) -> bool:
            return True

        def backwards(self, *asked: Any) -> AsyncIterator[Stored]:
            return bus.backwards(*asked)

        async def publish_all(self, batch: Iterable[Outgoing]) -> list[tuple[Outgoing, str]]:
            messages = list(batch)
            if utc_now() < away_until:
                return [(outgoing, "away") for outgoing in messages]
            return await bus.publish_all(messages)

    stop = asyncio.Event()

    async def is_caught_up() -> bool:
        return len(await announced_slots(client)) >= 5

    async with asyncio.TaskGroup() as tasks:
        running = timer.run(cast(Bus, Returning()), interval, 1, stop, late_max=10 * interval)
        tasks.create_task(running)
        await eventually(is_caught_up)
        stop.set()
    slots = await announced_slots(client)
    assert slots[0] in (first, first + interval)  # a boundary may have passed before the timer began
    assert slots == [slots[0] + number * interval for number in range(len(slots))]


async def test_with_room_for_late_slots_those_that_no_timer_announced_before_the_start_are_announced(
    bus: Bus, client: Client
) -> None:
    interval = timedelta(hours=1)
    under_way = last_boundary(utc_now(), interval)
    await bus.publish(timer.due(under_way - 6 * interval, 0, 1))
    stop = asyncio.Event()

    async def is_announced() -> bool:
        return under_way in await announced_slots(client)

    async with asyncio.TaskGroup() as tasks:
        late_max = utc_now() - under_way + 3.5 * interval
        tasks.create_task(timer.run(bus, interval, 1, stop, late_max=late_max))
        await eventually(is_announced)
        stop.set()
    # The slots five and four hours ago are older than three and a half.
    assert await announced_slots(client) == [under_way - hours * interval for hours in (6, 3, 2, 1, 0)]


def by_hand(at: datetime, message_id: str | None = None) -> Outgoing:
    return Outgoing(SNAPSHOT_DUE, SnapshotDue(scheduled_at=at), message_id)


async def test_what_is_published_by_hand_hides_no_slot_that_no_timer_announced(
    bus: Bus, client: Client
) -> None:
    """Seven hours ago all timers ended; somebody has published three slots since, one of them not due yet."""
    hour = timedelta(hours=1)
    under_way = last_boundary(utc_now(), hour)
    await bus.publish(timer.due(under_way - 6 * hour, 0, 1))
    await bus.publish(timer.due(under_way + 2 * hour, 0, 1))  # of a clock that was ahead
    hands = [by_hand(under_way - 2 * hour), by_hand(under_way), by_hand(under_way + hour)]
    for message in (*hands, Outgoing(SNAPSHOT_DUE, b"{")):
        await bus.publish(message)
    missed = counted(timer.slots_missed)
    stop = asyncio.Event()

    async def announced() -> list[datetime]:
        count = (await client.jetstream().stream_info(TIMER.name)).state.messages
        messages = [await client.jetstream().get_msg(TIMER.name, number + 1) for number in range(6, count)]
        return [SnapshotDue.model_validate_json(message.data or b"").scheduled_at for message in messages]

    async def is_announced() -> bool:
        return under_way in await announced()

    async with asyncio.TaskGroup() as tasks:
        late_max = utc_now() - under_way + 3.5 * hour
        tasks.create_task(timer.run(bus, hour, 1, stop, late_max=late_max))
        await eventually(is_announced)
        stop.set()
    assert await announced() == [under_way - hours * hour for hours in (3, 2, 1, 0)]
    assert counted(timer.slots_missed) - missed == 2  # five and four hours ago


async def test_dead_letter_that_is_replayed_before_a_start_makes_no_slot_a_missed_one(
    bus: Bus, client: Client
) -> None:
    hour = timedelta(hours=1)
    under_way = last_boundary(utc_now(), hour)
    await bus.publish(timer.due(under_way - hour, 0, 1))
    await bus.publish(by_hand(under_way - 24 * hour, "dead_letter/7/2026-03-02T15:00:00+00:00"))
    missed = counted(timer.slots_missed)
    stop = asyncio.Event()

    async def is_announced() -> bool:
        return under_way in await announced_slots(client)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(timer.run(bus, hour, 1, stop, late_max=3 * hour))
        await eventually(is_announced)
        stop.set()
    assert await announced_slots(client) == [under_way - hours * hour for hours in (1, 24, 0)]
    assert counted(timer.slots_missed) == missed


@pytest.mark.parametrize(
    ("announced_hours_ago", "missed"), [(None, 0), (0, 0), (1, 1)], ids=("none", "it", "the one before")
)
async def test_slot_under_way_that_is_too_late_at_the_start_is_not_announced_and_missed_if_nobody_did(
    bus: Bus, client: Client, announced_hours_ago: int | None, missed: int
) -> None:
    """A slot may be late by five minutes; the timer begins ten minutes after one."""
    hour, minutes = timedelta(hours=1), timedelta(minutes=1)
    expected = []
    if announced_hours_ago is not None:
        expected = [SLOT - announced_hours_ago * hour]
        await bus.publish(timer.due(expected[0], 0, 1))
    before = counted(timer.slots_missed)
    set_to = [SLOT + 10 * minutes]
    read = asyncio.Event()
    stop = asyncio.Event()

    def now() -> datetime:
        if set_to[-1] < SLOT + hour and len(set_to) > 3:  # so often it has looked at the slot under way
            read.set()
        set_to.append(set_to[-1])
        return set_to[-1]

    async def is_announced() -> bool:
        return SLOT + hour in await announced_slots(client)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(timer.run(bus, hour, 1, stop, late_max=5 * minutes, now=now))
        async with asyncio.timeout(10):
            await read.wait()
        set_to.append(SLOT + hour)
        await eventually(is_announced)
        stop.set()
    assert await announced_slots(client) == [*expected, SLOT + hour]
    assert counted(timer.slots_missed) - before == missed


async def test_slot_whose_timer_died_between_two_shards_is_announced_in_full_by_a_later_one(
    bus: Bus, client: Client
) -> None:
    interval = timedelta(hours=1)
    under_way = last_boundary(utc_now(), interval)
    await bus.publish(timer.due(under_way - 2 * interval, 0, 2))
    missed = counted(timer.slots_missed)
    stop = asyncio.Event()

    async def announced() -> list[tuple[datetime, int]]:
        messages = (await client.jetstream().stream_info(TIMER.name)).state.messages
        stored = [await client.jetstream().get_msg(TIMER.name, number + 1) for number in range(messages)]
        due = [SnapshotDue.model_validate_json(message.data or b"") for message in stored]
        return [(each.scheduled_at, each.shard) for each in due]

    async def is_announced() -> bool:
        return len(await announced()) >= 6

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(timer.run(bus, interval, 2, stop, late_max=10 * interval))
        await eventually(is_announced)
        stop.set()
    # The stream has discarded the copy of shard 0 of the first one.
    assert sorted(await announced()) == [
        (under_way - hours * interval, shard) for hours in (2, 1, 0) for shard in (0, 1)
    ]
    assert counted(timer.slots_missed) == missed


@pytest.mark.parametrize(
    ("announced_last", "reached", "missed"),
    [
        # A session is from 14:30 to 21:00; from Friday to Monday there is none.
        ("Fri 21:00", "Mon 14:30", None),
        ("Fri 20:00", "Mon 15:00", (2, "Fri 20:30")),  # that and the close
        ("Fri 20:00", "Mon 18:00", (7, "Fri 20:30")),  # and 14:30 to 16:30 of Monday
        ("Sat 12:00", "Mon 18:00", (5, "Mon 14:30")),
        ("Fri 15:00", "Tue 18:00", (31, "Fri 15:30")),  # 12 of Friday, 14 of Monday, 5 of Tuesday
    ],
)
async def test_slots_that_rest_while_no_timer_runs_are_not_missed(
    bus: Bus, client: Client, announced_last: str, reached: str, missed: tuple[int, str] | None
) -> None:
    """There is one every half hour, which may be late by less than an hour and a half."""
    half_an_hour = timedelta(minutes=30)
    days = {"Fri": "02-27", "Sat": "02-28", "Mon": "03-02", "Tue": "03-03"}

    def at(text: str) -> datetime:
        return datetime.strptime(f"2026-{days[text[:3]]} {text[4:]} +0000", "%Y-%m-%d %H:%M %z")

    await bus.publish(timer.due(at(announced_last), 0, 1))
    before = counted(timer.slots_missed)
    stop = asyncio.Event()

    async def is_announced() -> bool:
        return at(reached) in await announced_slots(client)

    with capture_logs() as logs:
        async with asyncio.TaskGroup() as tasks:
            running = timer.run(
                bus,
                half_an_hour,
                1,
                stop,
                late_max=3 * half_an_hour,
                calendar=Calendar(MarketHours()),
                now=lambda: at(reached),
            )
            tasks.create_task(running)
            await eventually(is_announced)
            stop.set()
    slots, first = missed or (0, "")
    assert counted(timer.slots_missed) - before == slots
    said = [(line["slots"], line["first"]) for line in logs if line["event"] == "slots_missed"]
    assert said == ([(slots, at(first).isoformat())] if missed else [])


async def test_slot_that_is_late_but_not_too_late_is_taken(
    database: Database, bus: Bus, client: Client
) -> None:
    await create_user(database, cash="5")
    now = utc_now()
    for seconds in (400, 250, 30):
        await bus.publish(timer.due(now - timedelta(seconds=seconds), 0, 1))
    async with snapshotter(database, bus, late_max=timedelta(seconds=300)):
        assert await eventually(lambda: stored(database))
        assert await eventually(lambda: is_all_acknowledged(client))
    assert [now - row[1] for row in await stored(database)] == [  # type: ignore[operator]
        timedelta(seconds=250),
        timedelta(seconds=30),
    ]


async def test_slot_of_a_timer_an_hour_ahead_is_stored_by_nobody_also_not_by_itself(
    database: Database, bus: Bus, client: Client
) -> None:
    await create_user(database, cash="5")
    hour = timedelta(hours=1)
    ahead = DatabaseClock(database, own=lambda: utc_now() + hour)
    await ahead.read()
    now = utc_now()
    for at in (now + hour, now):
        await bus.publish(timer.due(at, 0, 1))
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(snapshots.run(database, bus, MINUTE, stop, now=ahead.now))
        await eventually(lambda: stored(database))
        await eventually(lambda: is_all_acknowledged(client))
        stop.set()
    assert [row[1] for row in await stored(database)] == [now]


async def test_slots_that_a_clock_leapt_over_are_announced_when_it_has_gone_back(
    bus: Bus, client: Client
) -> None:
    """The clock is set by hand: at six it leaps ahead to midnight, and from one to eight in the morning."""
    hour = timedelta(hours=1)
    five = datetime(2026, 3, 2, 5, tzinfo=UTC)
    set_to, expected = [five], [five]
    stop = asyncio.Event()

    async def are_announced() -> bool:
        return await announced_slots(client) == expected

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(timer.run(bus, hour, 1, stop, late_max=4 * hour, now=lambda: set_to[-1]))
        await eventually(are_announced)
        for hours, announced in (
            (1, [1]),
            (19, [16, 17, 18, 19]),  # what is older than four hours is given up
            (20, [20]),
            (3, [2, 3]),
            (4, [4]),
            (3, []),  # announced already
            (5, [5]),
        ):
            set_to.append(five + hours * hour)
            expected += [five + number * hour for number in announced]
            await eventually(are_announced)
        stop.set()


async def test_garbage_and_late_messages_are_put_aside_and_the_next_one_is_taken(
    database: Database, bus: Bus, client: Client
) -> None:
    await create_user(database, cash="5")
    for payload in (b"", b"\xff\x00", b"[]", b'{"scheduled_at": "yesterday"}', b'{"shard": 5, "shards": 2}'):
        await client.jetstream().publish(SNAPSHOT_DUE, payload)
    now = utc_now()
    for at in (now - timedelta(days=3), now + timedelta(days=3), now):
        await bus.publish(Outgoing(SNAPSHOT_DUE, SnapshotDue(scheduled_at=at)))
    async with snapshotter(database, bus):
        assert await eventually(lambda: stored(database))
        assert await eventually(lambda: is_all_acknowledged(client))
    assert [row[1] for row in await stored(database)] == [now]


async def test_doubled_and_out_of_order_messages_make_each_snapshot_once(
    database: Database, bus: Bus, client: Client
) -> None:
    """By hand, without the message id that the stream would know a second copy by."""
    for number in range(3):
        await create_user(database, f"user {number}", cash="5")
    now = last_boundary(utc_now(), timedelta(seconds=1))
    slots = [now - timedelta(seconds=seconds) for seconds in (20, 10, 0)]
    duplicate = snapshots.shards_handled.labels("duplicate")
    before = counted(duplicate)
    async with snapshotter(database, bus), snapshotter(database, bus):
        for at in (slots[2], slots[0], slots[1], slots[0], slots[2], slots[2], slots[1]):
            await bus.publish(Outgoing(SNAPSHOT_DUE, SnapshotDue(scheduled_at=at)))
        await eventually(lambda: is_all_acknowledged(client))
    assert [row[:2] for row in await stored(database)] == [
        (f"user {number}", at) for number in range(3) for at in slots
    ]
    assert counted(duplicate) == before + 4
    assert await bus.dead_letters() == []


@pytest.mark.parametrize(
    "far", ["9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"]
)
async def test_slot_from_another_age_is_skipped_and_counted(
    database: Database, bus: Bus, client: Client, far: str
) -> None:
    await create_user(database, cash="5")
    skipped = snapshots.shards_handled.labels("skipped")
    before = counted(skipped)
    await client.jetstream().publish(SNAPSHOT_DUE, b'{"scheduled_at": "%s"}' % far.encode())
    async with snapshotter(database, bus):
        await eventually(lambda: is_all_acknowledged(client))
    assert counted(skipped) == before + 1
    assert await stored(database) == []
    assert await bus.dead_letters() == []


async def test_shard_is_taken_after_the_database_was_away(
    database_url: str, database: Database, bus: Bus
) -> None:
    await create_user(database, cash="5")
    server, name = database_url.rsplit("/", 1)
    administrator = await asyncpg.connect(f"{server}/postgres")
    await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await administrator.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
    )
    at = utc_now()
    postponed = snapshots.shards_postponed.labels("PostgreSQL is away")
    before = counted(postponed)

    async def is_postponed() -> bool:
        return counted(postponed) > before

    async with snapshotter(database, bus):
        await bus.publish(timer.due(at, 0, 1))
        await eventually(is_postponed)
        await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await administrator.close()
        assert await eventually(lambda: stored(database))
    assert [row[1] for row in await stored(database)] == [at]


# ---- shards --------------------------------------------------------------------------------------


@asynccontextmanager
async def held_up(database_url: str, user_id: int, slot: datetime) -> AsyncIterator[None]:
    """Let who stores this user's snapshot of the slot wait for another's, which is given up at the block's end."""
    other = await asyncpg.connect(database_url, timeout=10)
    try:
        await other.execute("BEGIN")
        await other.execute(
            """
            INSERT INTO portfolio_snapshots (user_id, timestamp, total_value, cash_balance, investment_value)
            VALUES ($1, $2, 0, 0, 0)
            """,
            user_id,
            slot,
        )
        yield
        await other.execute("ROLLBACK")
    finally:
        other.terminate()


async def is_held_up(database: Database) -> bool:
    return bool(
        await database.fetch_value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


async def test_dead_replicas_shard_is_taken_over(
    database: Database,
    database_url: str,
    bus: Bus,
    client: Client,
    heard: Callable[[], Awaitable[list[SnapshotsTaken]]],
) -> None:
    user_id = await create_user(database, cash="5")
    at = utc_now()
    stop = asyncio.Event()
    async with held_up(database_url, user_id, at):
        dying = asyncio.create_task(snapshots.run(database, bus, MINUTE, stop, ack_wait_seconds=1))
        await bus.publish(timer.due(at, 0, 1))
        await eventually(lambda: is_held_up(database))
        dying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dying

        async def is_given_up() -> bool:
            return not await is_held_up(database)

        await eventually(is_given_up)  # nobody waits until the server has cut off its statement
    assert await stored(database) == []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(snapshots.run(database, bus, MINUTE, stop, ack_wait_seconds=1))
        assert [taken.portfolios for taken in await eventually(heard)] == [1]
        await eventually(lambda: is_all_acknowledged(client))
        stop.set()
    assert [row[1:3] for row in await stored(database)] == [(at, Decimal("5.00"))]


async def test_slow_shard_does_not_hold_up_the_others(
    database: Database, database_url: str, bus: Bus, client: Client
) -> None:
    users = [await create_user(database, f"user {number}", cash="1") for number in range(8)]
    at = utc_now()
    async with snapshotter(database, bus):
        slow = users[0] % 4
        async with held_up(database_url, users[0], at):
            await bus.publish(timer.due(at, slow, 4))
            await eventually(lambda: is_held_up(database))
            for shard in {0, 1, 2, 3} - {slow}:
                await bus.publish(timer.due(at, shard, 4))

            async def others_are_stored() -> bool:
                return len(await stored(database)) == 6

            await eventually(others_are_stored)

        async def all_are_stored() -> bool:
            return len(await stored(database)) == 8

        await eventually(all_are_stored)
        await eventually(lambda: is_all_acknowledged(client))


async def test_number_of_shards_may_change_between_two_slots_and_differ_within_one(
    database: Database, bus: Bus, client: Client
) -> None:
    """As while a new setting is rolled out: one replica says two shards and another three, then all say five."""
    for number in range(30):
        await create_user(database, f"user {number}", cash="1", positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    before = utc_now() - timedelta(seconds=20)
    now = before + timedelta(seconds=15)
    stop = asyncio.Event()
    async with snapshotter(database, bus), snapshotter(database, bus):
        await asyncio.gather(*(timer.announce(bus, before, MINUTE, shards, stop) for shards in (2, 3)))
        await timer.announce(bus, now, MINUTE, 5, stop)

        async def all_are_stored() -> bool:
            return len(await stored(database)) == 60

        await eventually(all_are_stored)
        await eventually(lambda: is_all_acknowledged(client))
    assert len({row[:2] for row in await stored(database)}) == 60
    assert len(await details(database)) == 60


async def test_slot_that_overruns_its_interval_is_seen_and_said(
    database: Database, database_url: str, bus: Bus, client: Client
) -> None:
    user_id = await create_user(database, cash="1")
    interval = timedelta(seconds=3)
    overran = counted(snapshots.shards_overran)
    with capture_logs() as logs:
        async with snapshotter(database, bus, interval):
            at = utc_now()
            async with held_up(database_url, user_id, at):
                await bus.publish(timer.due(at, 0, 1))
                await eventually(lambda: is_held_up(database))

                async def interval_is_over() -> bool:
                    return utc_now() > at + interval

                await eventually(interval_is_over)
            await eventually(lambda: stored(database))
            await eventually(lambda: is_all_acknowledged(client))
    said = [line for line in logs if line["event"] == "slot_overran"]
    assert [(line["shard"], line["interval_seconds"], line["log_level"]) for line in said] == [
        (0, 3.0, "warning")
    ]
    assert said[0]["seconds"] >= 3
    assert counted(snapshots.shards_overran) == overran + 1


async def test_slot_that_is_announced_again_long_after_it_was_stored_has_not_overrun(
    database: Database, bus: Bus, client: Client
) -> None:
    """A timer that begins announces the last slot again, in case another one died over it."""
    await create_user(database, cash="1")
    at = utc_now() - 5 * MINUTE
    await queries.take_snapshots(database, at, 0, 1)
    due = timer.due(at, 0, 1)
    with capture_logs() as logs:
        async with snapshotter(database, bus, late_max=10 * MINUTE):
            await bus.publish(due)
            await eventually(lambda: is_all_acknowledged(client))
    events = [line["event"] for line in logs]
    assert "snapshots_taken" in events
    assert "slot_overran" not in events


async def test_slot_that_comes_again_when_it_is_too_late_is_a_duplicate_and_none_that_was_left_out(
    database: Database,
    bus: Bus,
    client: Client,
    heard: Callable[[], Awaitable[list[SnapshotsTaken]]],
) -> None:
    """As after a replica that died between its commit and its acknowledgement; what it did not tell is told."""
    await create_user(database, cash="1")
    now = utc_now()
    there, missing = now - 3 * MINUTE, now - 2 * MINUTE
    await queries.take_snapshots(database, there, 0, 1)
    await create_user(database, "new", cash="1")  # has none of that slot, and gets none
    outcomes = {each: snapshots.shards_handled.labels(each) for each in ("duplicate", "skipped", "taken")}
    before = {each: counted(counter) for each, counter in outcomes.items()}
    with capture_logs() as logs:
        async with snapshotter(database, bus):
            for at in (there, missing):
                await bus.publish(timer.due(at, 0, 1))
            await eventually(lambda: is_all_acknowledged(client))
    counts = {each: counted(counter) - before[each] for each, counter in outcomes.items()}
    assert counts == {"duplicate": 1, "skipped": 1, "taken": 0}
    said = [line["scheduled_at"] for line in logs if line["event"] == "snapshot_skipped"]
    assert said == [missing.isoformat()]
    assert await heard() == [
        SnapshotsTaken(scheduled_at=there, shard=0, shards=1, portfolios=1, positions=0, unpriced=0)
    ]
    assert [row[:2] for row in await stored(database)] == [("demo", there)]


async def test_last_slot_is_known_after_a_start_and_goes_back_for_no_late_one(
    database: Database, bus: Bus, client: Client
) -> None:
    """Else all replicas together would say after a deployment that nothing was ever stored."""
    await create_user(database, cash="1")
    now = last_boundary(utc_now(), timedelta(seconds=1))
    told = SnapshotsTaken(scheduled_at=now, shard=0, shards=1, portfolios=1, positions=0, unpriced=0)
    await bus.publish(Outgoing(SNAPSHOTS_TAKEN, told))
    snapshots.last_slot.set(0)

    async def is_known() -> bool:
        return sample("snapshot_last_slot_timestamp_seconds") == now.timestamp()

    async with snapshotter(database, bus, late_max=5 * MINUTE):
        await eventually(is_known)
        await bus.publish(timer.due(now - MINUTE, 0, 1))
        await eventually(lambda: stored(database))
        await eventually(lambda: is_all_acknowledged(client))
        assert await is_known()
        await bus.publish(timer.due(now + timedelta(seconds=1), 0, 1))

        async def is_newer() -> bool:
            return sample("snapshot_last_slot_timestamp_seconds") == now.timestamp() + 1

        await eventually(is_newer)


def counted(counter: Counter) -> float:
    return next(sample.value for metric in counter.collect() for sample in metric.samples)
