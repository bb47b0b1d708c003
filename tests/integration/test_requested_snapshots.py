"""Snapshots on request, on real PostgreSQL and NATS. Values are worked by hand."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg
import nats
import pytest
from prometheus_client import Counter
from structlog.testing import capture_logs

from services.snapshotter import queries, requested
from shared import database as databases
from shared.bus import Bus, Refused, Unanswered
from shared.clock import utc_now
from shared.database import Database
from shared.messages import (
    REQUESTED_SNAPSHOT_TAKEN,
    SNAPSHOT_REQUESTED,
    SnapshotRequested,
    SnapshotTaken,
)
from tests.factories import create_user, make_partitions, set_position, set_price
from tests.integration.responders import SNAPSHOT_COOLDOWN as COOLDOWN
from tests.integration.responders import snapshotter
from tests.waiting import answered, eventually

AT = datetime(2026, 3, 2, 15, 2, 10, 123456, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)


async def take(
    database: Database, user_id: int, at: datetime = AT, cooldown: timedelta = COOLDOWN
) -> tuple[SnapshotTaken, bool]:
    return await queries.take_requested_snapshot(database, user_id, at, cooldown)


async def refusal(database: Database, user_id: int, at: datetime) -> tuple[int, int | None]:
    with pytest.raises(Refused) as refused:
        await take(database, user_id, at)
    return refused.value.code, refused.value.retry_after_seconds


async def snapshots(database: Database) -> list[tuple[object, ...]]:
    rows = await database.fetch(
        """
        SELECT user_id, timestamp, total_value, cash_balance, investment_value, unpriced_positions, simulated
        FROM portfolio_snapshots ORDER BY user_id, timestamp
        """
    )
    return [tuple(row) for row in rows]


async def details(database: Database) -> list[tuple[object, ...]]:
    rows = await database.fetch(
        """
        SELECT timestamp, ticker, shares, cost_basis, current_value, price_per_share
        FROM position_snapshots ORDER BY ticker
        """
    )
    return [tuple(row) for row in rows]


# ---- what is stored ------------------------------------------------------------------------------


async def test_it_is_stored_at_the_moment_of_the_request_with_its_positions(database: Database) -> None:
    user_id = await create_user(
        database,
        cash="5000.50",
        positions={"AAPL": ("100", "15000"), "NONE": ("3", "1"), "SOLD": ("0", "0"), "TSLA": ("0.335", "50")},
    )
    await create_user(database, "other", cash="1")
    await set_price(database, "AAPL", "175.00")
    await set_price(database, "TSLA", "1", feed="simulated")
    taken, added = await take(database, user_id)
    # 100 at 175.00 are 17,500.00; 0.335 at 1 is 0.335, rounded 0.34
    assert taken == SnapshotTaken(
        user_id=user_id,
        timestamp=AT,
        total_value=Decimal("22500.84"),
        cash_balance=Decimal("5000.50"),
        investment_value=Decimal("17500.34"),
        unpriced_positions=1,
        simulated=True,
    )
    assert added
    assert await snapshots(database) == [
        (user_id, AT, Decimal("22500.84"), Decimal("5000.50"), Decimal("17500.34"), 1, True)
    ]
    assert await details(database) == [
        (AT, "AAPL", Decimal("100"), Decimal("15000.00"), Decimal("17500.00"), Decimal("175.0000")),
        (AT, "TSLA", Decimal("0.335"), Decimal("50.00"), Decimal("0.34"), Decimal("1.0000")),
    ]


async def test_cash_alone_is_a_snapshot_too(database: Database) -> None:
    taken, _ = await take(database, await create_user(database, cash="-12.30"))
    assert (taken.total_value, taken.investment_value) == (Decimal("-12.30"), Decimal("0.00"))


async def test_it_is_the_slots_snapshot_to_the_cent(database: Database) -> None:
    positions = {f"S{number}": (f"{number}.335", "1") for number in range(1, 20)}
    user_id = await create_user(database, cash="7.77", positions=positions)
    for number in range(1, 19):
        await set_price(database, f"S{number}", f"{number * 3}.1234")
    await take(database, user_id)
    await queries.take_snapshots(database, AT + SECOND, 0, 1)
    by_request, by_slot = await snapshots(database)
    assert by_request[2:] == by_slot[2:]
    assert [row[1:] for row in await details(database) if row[0] == AT] == [
        row[1:] for row in await details(database) if row[0] == AT + SECOND
    ]


async def test_missing_partition_is_made(database: Database) -> None:
    user_id = await create_user(database, cash="1")
    far = datetime(2031, 5, 5, 12, tzinfo=UTC)
    assert (await take(database, user_id, far))[1]
    assert len(await snapshots(database)) == 1


async def test_time_that_was_rolled_up_is_reopened(database: Database) -> None:
    user_id = await create_user(database, cash="1")
    await database.fetch("UPDATE history_tiers SET complete_until = '2026-03-04' WHERE tier = '30m'")
    await take(database, user_id)
    assert await database.fetch_value(
        "SELECT complete_until FROM history_tiers WHERE tier = '30m'"
    ) == datetime(2026, 3, 1, tzinfo=UTC)


async def test_slot_of_the_same_microsecond_leaves_it_as_it_is(database: Database) -> None:
    user_id = await create_user(database, cash="1")
    other = await create_user(database, "other", cash="2")
    await take(database, user_id)
    await database.fetch("UPDATE users SET cash_balance = 9")
    assert (await queries.take_snapshots(database, AT, 0, 1)).added == 1
    assert [row[:3] for row in await snapshots(database)] == [
        (user_id, AT, Decimal("1.00")),
        (other, AT, Decimal("9.00")),
    ]


# ---- asked again, asked too often ----------------------------------------------------------------


async def test_the_same_request_again_finds_what_it_made(database: Database) -> None:
    user_id = await create_user(database, positions={"AAPL": ("2", "1")})
    await set_price(database, "AAPL", "10")
    first, _ = await take(database, user_id)
    await set_price(database, "AAPL", "99")
    await set_position(database, user_id, "AAPL", "7")
    before = await snapshots(database), await details(database)
    again, added = await take(database, user_id)
    assert (again, added) == (first, False)
    assert again.total_value == Decimal("20.00")
    assert (await snapshots(database), await details(database)) == before


async def test_cooldown_is_over_to_the_microsecond(database: Database) -> None:
    user_id = await create_user(database, cash="1")
    await take(database, user_id)
    assert await refusal(database, user_id, AT + MICROSECOND) == (429, 60)
    assert await refusal(database, user_id, AT + 57 * SECOND) == (429, 3)
    assert await refusal(database, user_id, AT + COOLDOWN - MICROSECOND) == (429, 1)
    assert len(await snapshots(database)) == 1
    assert (await take(database, user_id, AT + COOLDOWN))[1]
    assert await refusal(database, user_id, AT + COOLDOWN + SECOND) == (429, 59)


async def test_cooldown_is_each_users_own_and_apart_from_that_of_prices(database: Database) -> None:
    one, other = [await create_user(database, name) for name in ("one", "other")]
    await database.fetch(
        "INSERT INTO refreshes (user_id, kind, requested_at) VALUES ($1, 'prices', $2)", one, AT
    )
    assert (await take(database, one))[1]
    assert (await take(database, other))[1]


async def test_request_that_was_overtaken_is_refused(database: Database) -> None:
    user_id = await create_user(database)
    await take(database, user_id)
    assert await refusal(database, user_id, AT - SECOND) == (429, 61)


async def test_cooldown_that_a_wrong_clock_left_in_the_future_does_not_count(database: Database) -> None:
    user_id = await create_user(database)
    await take(database, user_id, AT + timedelta(days=400))
    assert (await take(database, user_id))[1]


async def test_of_ten_requests_at_once_one_is_granted(database_url: str) -> None:
    async with databases.connect(database_url, application_name="tests", connections_max=10) as database:
        user_id = await create_user(database, positions={"AAPL": ("1", "1")})
        await set_price(database, "AAPL", "10")
        outcomes = await asyncio.gather(
            *(take(database, user_id, AT + number * MICROSECOND) for number in range(10)),
            return_exceptions=True,
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
        assert [refusal.code for refusal in refused] == [429] * 9
        assert all(1 <= (refusal.retry_after_seconds or 0) <= 61 for refusal in refused)
        assert (len(await snapshots(database)), len(await details(database))) == (1, 1)


async def test_of_the_same_request_ten_times_at_once_there_is_one_snapshot(database_url: str) -> None:
    async with databases.connect(database_url, application_name="tests", connections_max=10) as database:
        user_id = await create_user(database, positions={"AAPL": ("1", "1")})
        await set_price(database, "AAPL", "10")
        outcomes = await asyncio.gather(*(take(database, user_id) for _ in range(10)))
        assert sum(added for _, added in outcomes) == 1
        assert {taken.total_value for taken, _ in outcomes} == {Decimal("10.00")}
        assert (len(await snapshots(database)), len(await details(database))) == (1, 1)


async def test_request_that_cannot_be_stored_does_not_count(database: Database) -> None:
    user_id = await create_user(database, cash="1")
    await database.fetch("ALTER TABLE position_snapshots RENAME TO gone")
    with pytest.raises(databases.SchemaMissing):
        await take(database, user_id)
    await database.fetch("ALTER TABLE gone RENAME TO position_snapshots")
    assert (await take(database, user_id, AT + SECOND))[1]


# ---- users who come and go -----------------------------------------------------------------------


async def test_unknown_and_deactivated_users_have_none(database: Database) -> None:
    deactivated = await create_user(database, active=False)
    assert await refusal(database, deactivated, AT) == (403, None)
    assert await refusal(database, deactivated + 1, AT) == (404, None)
    assert await database.fetch_value("SELECT count(*) FROM refreshes") == 0


async def test_user_whose_deletion_is_committed_meanwhile_is_unknown(
    database: Database, database_url: str
) -> None:
    user_id = await create_user(database, cash="1", positions={"AAPL": ("1", "1")})
    other = await asyncpg.connect(database_url)
    deletion = other.transaction()
    await deletion.start()
    await other.execute("DELETE FROM users WHERE id = $1", user_id)
    taking = asyncio.create_task(refusal(database, user_id, AT))
    await eventually(lambda: is_waited_for(database))
    await deletion.commit()
    await other.close()
    assert await taking == (404, None)
    assert await snapshots(database) == []
    assert await database.fetch_value("SELECT count(*) FROM refreshes") == 0


async def test_user_deleted_before_it_commits_leaves_nothing(database: Database, database_url: str) -> None:
    user_id = await create_user(database, cash="1", positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    await make_partitions(database, AT, AT)
    other = await asyncpg.connect(database_url)
    taking = other.transaction()
    await taking.start()
    await other.execute("SELECT FROM users WHERE id = $1 FOR KEY SHARE", user_id)
    deleting = asyncio.create_task(database.fetch("DELETE FROM users WHERE id = $1", user_id, timeout=10))
    await eventually(lambda: is_waited_for(database))
    row = await other.fetchrow(queries.TAKE_ONE_SNAPSHOT, AT, user_id)  # behind a deletion that waits
    assert row is not None
    assert (row["portfolios"], row["positions"]) == (1, 1)
    await taking.commit()
    await deleting
    await other.close()
    assert (await snapshots(database), await details(database)) == ([], [])


async def is_waited_for(database: Database) -> bool:
    return bool(await database.fetch_value("SELECT count(*) FROM pg_locks WHERE NOT granted"))


# ---- over the bus --------------------------------------------------------------------------------


async def ask(bus: Bus, user_id: int, at: datetime | None = None) -> SnapshotTaken:
    """Ask until somebody is there."""
    message = SnapshotRequested(user_id=user_id, requested_at=at or utc_now())

    async def answer() -> SnapshotTaken | None:
        try:
            return await bus.request(SNAPSHOT_REQUESTED, message, SnapshotTaken, timeout_seconds=5)
        except Unanswered:
            return None

    found = await eventually(answer)
    assert found is not None
    return found


def count(counter: Counter, outcome: str) -> float:
    return float(counter.labels(outcome)._value.get())


async def test_it_is_answered_and_announced_after_the_commit(
    database: Database, database_url: str, bus: Bus, nats_url: str
) -> None:
    user_id = await create_user(database, cash="3", positions={"AAPL": ("2", "1")})
    await set_price(database, "AAPL", "10.25")
    client = await nats.connect(nats_url)
    announced = await client.subscribe(REQUESTED_SNAPSHOT_TAKEN)
    before = count(requested.requests_handled, "taken")
    with capture_logs() as logged:
        async with snapshotter(database_url, bus):
            at = utc_now()
            taken = await ask(bus, user_id, at)
            message = await announced.next_msg(timeout=5)
    await client.close()
    assert taken == SnapshotTaken.model_validate_json(message.data)
    assert (taken.timestamp, taken.total_value) == (at, Decimal("23.50"))
    assert count(requested.requests_handled, "taken") == before + 1
    (line,) = [line for line in logged if line["event"] == "requested_snapshot_taken"]
    assert (line["user_id"], line["requested_at"], line["added"]) == (user_id, at.isoformat(), True)


@pytest.mark.parametrize("user_id", ["0", "-1", "2147483648", "9223372036854775808", "1" + "0" * 400])
async def test_a_user_that_no_table_can_hold_is_refused(
    database_url: str, bus: Bus, nats_url: str, user_id: str
) -> None:
    payload = f'{{"user_id":{user_id},"requested_at":"{utc_now().isoformat()}"}}'.encode()
    client = await nats.connect(nats_url)
    try:
        async with snapshotter(database_url, bus):
            answer = await answered(client, SNAPSHOT_REQUESTED, payload)
    finally:
        await client.close()
    assert (answer.headers or {})["Nats-Service-Error-Code"] == "400"


async def test_time_that_is_not_now_is_refused(database: Database, database_url: str, bus: Bus) -> None:
    user_id = await create_user(database, cash="3")
    async with snapshotter(database_url, bus):
        for away in (11 * SECOND, -11 * SECOND):
            with pytest.raises(Refused) as refused:
                await ask(bus, user_id, utc_now() - away)
            assert refused.value.code == 400
        await ask(bus, user_id, utc_now() - 5 * SECOND)
    assert len(await snapshots(database)) == 1


async def test_of_two_replicas_one_answers(database: Database, database_url: str, bus: Bus) -> None:
    users = [await create_user(database, f"user {number}", cash=str(number)) for number in range(20)]
    async with snapshotter(database_url, bus, replicas=2):
        at = utc_now()
        taken = await asyncio.gather(*(ask(bus, user_id, at) for user_id in users))
    assert [answer.total_value for answer in taken] == [Decimal(number) for number in range(20)]
    assert len(await snapshots(database)) == 20


async def test_replica_that_dies_between_commit_and_answer_leaves_it_to_the_next(
    database: Database, database_url: str, bus: Bus
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("2", "1")})
    await set_price(database, "AAPL", "10")
    at = utc_now()
    await take(database, user_id, at)  # committed, and nobody was told
    await set_price(database, "AAPL", "11")
    async with snapshotter(database_url, bus, replicas=2):
        assert (await ask(bus, user_id, at)).total_value == Decimal("20.00")
        with pytest.raises(Refused) as refused:
            await ask(bus, user_id, at + SECOND)
    assert (refused.value.code, refused.value.retry_after_seconds) == (429, 59)
    assert len(await snapshots(database)) == 1


async def test_without_the_database_it_is_refused_for_a_while(bus: Bus) -> None:
    nowhere = "postgresql://nobody@127.0.0.1:9/none"
    async with snapshotter(nowhere, bus):
        with pytest.raises(Refused) as refused:
            await ask(bus, 1)
    assert (refused.value.code, refused.value.retry_after_seconds) == (503, 2)


async def test_announcement_that_fails_takes_nothing_from_the_answer(database: Database) -> None:
    user_id = await create_user(database, cash="3")
    message = SnapshotRequested(user_id=user_id, requested_at=utc_now())
    async with Bus("nats://127.0.0.1:9", name="tests") as unconnected:
        with capture_logs() as logged:
            taken = await requested.handle(
                database, unconnected, message.model_dump_json().encode(), COOLDOWN
            )
    assert taken.total_value == Decimal("3.00")
    assert "requested_snapshot_not_announced" in {line["event"] for line in logged}


async def test_request_that_has_waited_for_its_turn_is_refused_while_who_asks_can_still_ask_another(
    database: Database, database_url: str, bus: Bus
) -> None:
    """Two users are held by another one's transaction, so that both turns are taken."""
    held = [await create_user(database, f"held {number}") for number in range(requested.AT_ONCE_MAX)]
    free = await create_user(database, "free")
    other = await asyncpg.connect(database_url, timeout=10)
    gateway = asyncio.TaskGroup()
    async with snapshotter(database_url, bus), gateway:
        await ask(bus, free, utc_now())
        await other.execute("BEGIN")
        await other.execute("DELETE FROM users WHERE id = ANY($1::integer[])", held)
        try:
            asking = [gateway.create_task(refused_over_the_bus(bus, user_id)) for user_id in held]

            async def both_wait() -> bool:
                waiting = await database.fetch_value("SELECT count(*) FROM pg_locks WHERE NOT granted")
                return bool(waiting == 2)

            await eventually(both_wait)
            refusal = await refused_over_the_bus(bus, free)
            assert (refusal.code, refusal.text) == (503, "many have asked for snapshots")
            assert [(await each).code for each in asking] == [503, 503]
        finally:
            other.terminate()
        await ask(bus, held[0])  # both turns are free again
        await ask(bus, held[1])


async def refused_over_the_bus(bus: Bus, user_id: int) -> Refused:
    message = SnapshotRequested(user_id=user_id, requested_at=utc_now())
    with pytest.raises(Refused) as refused:
        await bus.request(SNAPSHOT_REQUESTED, message, SnapshotTaken, timeout_seconds=10)
    return refused.value
