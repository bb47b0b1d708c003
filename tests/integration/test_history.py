"""The history's upkeep on real PostgreSQL: partitions, rollups, retention, deletion. Values are worked by hand."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import Gauge

from services.snapshotter import history, queries, upkeep
from services.snapshotter.history import ROLLUPS, Rollup
from services.snapshotter.upkeep import Upkeep
from shared.clock import utc_now
from shared.database import Database, DatabaseUnavailable
from tests.factories import add_snapshot, create_user, make_partitions, set_price
from tests.waiting import eventually

NEW_YORK, KATHMANDU = "America/New_York", "Asia/Kathmandu"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
MONDAY = datetime(2026, 3, 2, tzinfo=UTC)
HALF_HOUR_ROLLUP, HOUR_ROLLUP, THREE_HOUR_ROLLUP, DAY_ROLLUP = ROLLUPS

UPKEEP = Upkeep(
    interval=timedelta(minutes=5),
    market_timezone=NEW_YORK,
    snapshots_for=100 * DAY,
    positions_for=35 * DAY,
    rollups_for=400 * DAY,
)

Row = tuple[str, str, str]


def at(text: str) -> datetime:
    """Return the instant of `month-day hour:minute` of 2026, UTC."""
    return datetime.strptime(f"2026-{text} +0000", "%Y-%m-%d %H:%M %z")


def told(instant: datetime) -> str:
    return instant.strftime("%m-%d %H:%M")


async def waits(database: Database) -> bool:
    """Tell whether somebody waits for a lock."""
    found: int = await database.fetch_value(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return found > 0


async def stands_still(database: Database) -> bool:
    found: int = await database.fetch_value(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    )
    return found > 0


@asynccontextmanager
async def standing_still(database_url: str, table: str) -> AsyncIterator[None]:
    """Let every step stand still inside this block between having written to the table and its commit."""
    async with another_session(database_url) as holder:
        await holder.execute(
            f"""
            CREATE FUNCTION stand_still() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                WHILE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 7) LOOP
                    PERFORM pg_sleep(0.01);
                END LOOP;
                RETURN NULL;
            END
            $$;
            CREATE TRIGGER stand_still AFTER INSERT ON {table}
            FOR EACH STATEMENT EXECUTE FUNCTION stand_still();
            """
        )
        await holder.execute("SELECT pg_advisory_lock(7)")
        try:
            yield
        finally:
            await holder.execute("SELECT pg_advisory_unlock(7)")


@asynccontextmanager
async def another_session(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url, timeout=10)
    try:
        yield connection
    finally:
        connection.terminate()


async def rolled(database: Database, tier: str) -> list[Row]:
    """Return (bucket, timestamp, total) of a rollup's rows."""
    rows = await database.fetch(
        f"SELECT bucket, timestamp, total_value FROM portfolio_rollups_{tier} ORDER BY user_id, bucket"  # noqa: S608
    )
    return [(told(row["bucket"]), told(row["timestamp"]), f"{row['total_value']}") for row in rows]


async def roll_up_all(
    database: Database, due_until: datetime, market_timezone: str = NEW_YORK, users_max: int = 1000
) -> dict[str, list[int]]:
    """Roll up everything that is due; return the rows of each step by tier."""
    steps: dict[str, list[int]] = {rollup.tier: [] for rollup in ROLLUPS}
    for rollup in ROLLUPS:
        while step := await history.roll_up(
            database, rollup, due_until, market_timezone, users_max=users_max
        ):
            steps[rollup.tier].append(step.rows)
    return steps


async def tables(database: Database, parent: str) -> dict[str, str]:
    """Return the bounds of a table's partitions by name."""
    rows = await database.fetch(
        """
        SELECT relname, pg_get_expr(relpartbound, oid) AS bound
        FROM pg_inherits JOIN pg_class ON oid = inhrelid
        WHERE inhparent = to_regclass($1)
        """,
        parent,
    )
    return {row["relname"]: row["bound"].removeprefix("FOR VALUES ") for row in rows}


async def tier(database: Database, name: str) -> asyncpg.Record:
    found = await database.fetch_row(
        """
        SELECT NULLIF(complete_until, '-infinity') AS complete_until, users_done,
            NULLIF(kept_from, '-infinity') AS kept_from
        FROM history_tiers WHERE tier = $1
        """,
        name,
    )
    assert found is not None
    return found


async def steady_clock(database: Database, now: datetime) -> None:
    """Let the clock have been steady for a day at `now`."""
    await history.steady_since(database, now)
    await database.fetch(
        "UPDATE history_clock SET seen_at = $1, steady_since = $2", now, now - upkeep.STEADY_FOR
    )


async def keep(database: Database, now: datetime, policy: Upkeep = UPKEEP) -> upkeep.Done:
    return await upkeep.keep(database, policy, now, asyncio.Event())


# ---- partitions ----------------------------------------------------------------------------------


async def test_partitions_are_days_weeks_from_monday_and_months_of_utc(database: Database) -> None:
    wednesday = datetime(2031, 3, 5, 23, 59, tzinfo=UTC)
    assert await queries.make_partitions(database, wednesday, wednesday) == 5
    assert {
        name: bound
        for parent in ("portfolio_snapshots", "position_snapshots", "portfolio_rollups_30m")
        for name, bound in (await tables(database, parent)).items()
        if "_2031" in name
    } == {
        "portfolio_snapshots_20310303": "FROM ('2031-03-03 00:00:00+00') TO ('2031-03-10 00:00:00+00')",
        "position_snapshots_20310305": "FROM ('2031-03-05 00:00:00+00') TO ('2031-03-06 00:00:00+00')",
        "portfolio_rollups_30m_20310301": "FROM ('2031-03-01 00:00:00+00') TO ('2031-04-01 00:00:00+00')",
    }


async def test_range_has_every_partition_that_it_touches(database: Database) -> None:
    # Sunday's last and Monday's first instant, over the end of a year: two weeks, two days, twice three months.
    first, last = datetime(2034, 12, 31, 23, 59, tzinfo=UTC), datetime(2035, 1, 1, tzinfo=UTC)
    assert first.weekday() == 6
    assert await queries.make_partitions(database, first, last) == 10
    assert await queries.make_partitions(database, first, last) == 0


async def test_sessions_time_zone_moves_no_bound(database: Database, database_url: str) -> None:
    async with another_session(database_url) as other:
        await other.execute("SET timezone = 'Pacific/Kiritimati'")
        await other.execute("SELECT make_history_partitions($1, $1)", datetime(2031, 3, 2, 23, tzinfo=UTC))
    assert (await tables(database, "position_snapshots"))["position_snapshots_20310302"] == (
        "FROM ('2031-03-02 00:00:00+00') TO ('2031-03-03 00:00:00+00')"
    )


@pytest.mark.parametrize("year", [1999, 2016, 2027, 2061])
async def test_slot_of_any_time_is_stored(database: Database, year: int) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    slot = datetime(year, 12, 31, 23, 55, tzinfo=UTC)
    taken = await queries.take_snapshots(database, slot, 0, 1)
    assert (taken.added, taken.positions) == (1, 1)
    assert (
        await database.fetch_value("SELECT count(*) FROM position_snapshots WHERE timestamp = $1", slot) == 1
    )


async def test_there_is_room_for_a_week_after_every_round(database: Database) -> None:
    now = datetime(2031, 3, 5, 12, tzinfo=UTC)
    assert (await keep(database, now)).made > 0
    assert await queries.make_partitions(database, now, now + 7 * DAY) == 0
    assert (await keep(database, now)).made == 0
    # A day later: a new day is needed, and no new week or month.
    assert (await keep(database, now + DAY)).made == 1


async def test_makers_at_once_make_each_partition_once(database: Database) -> None:
    first, last = datetime(2031, 1, 1, tzinfo=UTC), datetime(2031, 2, 28, tzinfo=UTC)
    made = await asyncio.gather(*(queries.make_partitions(database, first, last) for _ in range(4)))
    # 59 days; the weeks of Monday 2030-12-30 to Monday 2031-02-24; three tiers of two months.
    assert sum(made) == 59 + 9 + 6


async def test_making_a_partition_waits_for_no_reader_or_writer(
    database: Database, database_url: str
) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    async with another_session(database_url) as other:
        await other.execute("BEGIN")
        for table in ("portfolio_snapshots", "position_snapshots", "portfolio_rollups_30m"):
            await other.execute(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE")
            await other.fetch(f"SELECT FROM {table}")
        later = datetime(2031, 3, 5, tzinfo=UTC)
        assert await queries.make_partitions(database, later, later) == 5


async def test_partition_in_the_making_stops_no_reader_or_writer(
    database: Database, database_url: str
) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    async with another_session(database_url) as maker:
        await maker.execute("BEGIN")
        await maker.fetch("SELECT make_history_partitions($1, $1)", datetime(2031, 3, 5, tzinfo=UTC))
        assert await database.fetch_value("SELECT count(*) FROM portfolio_snapshots", timeout=1) == 1
        taken = await queries.take_snapshots(database, MONDAY + HOUR, 0, 1, timeout=1)
        assert taken.added == 1


# ---- rollups: what they hold -----------------------------------------------------------------------


async def test_each_bucket_has_its_last_snapshot_and_a_bucket_without_one_has_no_row(
    database: Database,
) -> None:
    user_id = await create_user(database)
    for time_of_day, total in (
        ("00:00", "1"),
        ("00:25", "2"),
        ("00:30", "3"),
        ("02:55", "4"),
        ("03:00", "5"),
        ("05:00", "6"),  # midnight in New York
        ("23:55", "7"),
    ):
        await add_snapshot(database, user_id, at(f"03-03 {time_of_day}"), total)
    await add_snapshot(
        database, user_id, at("03-04 04:55"), "8"
    )  # the last slot of New York's third of March
    await add_snapshot(database, user_id, at("03-04 05:00"), "9")
    await roll_up_all(database, at("03-05 05:00"))
    assert await rolled(database, "30m") == [
        ("03-03 00:00", "03-03 00:25", "2.00"),
        ("03-03 00:30", "03-03 00:30", "3.00"),
        ("03-03 02:30", "03-03 02:55", "4.00"),
        ("03-03 03:00", "03-03 03:00", "5.00"),
        ("03-03 05:00", "03-03 05:00", "6.00"),
        ("03-03 23:30", "03-03 23:55", "7.00"),
        ("03-04 04:30", "03-04 04:55", "8.00"),
        ("03-04 05:00", "03-04 05:00", "9.00"),
    ]
    assert await rolled(database, "1h") == [
        ("03-03 00:00", "03-03 00:30", "3.00"),
        ("03-03 02:00", "03-03 02:55", "4.00"),
        ("03-03 03:00", "03-03 03:00", "5.00"),
        ("03-03 05:00", "03-03 05:00", "6.00"),
        ("03-03 23:00", "03-03 23:55", "7.00"),
        ("03-04 04:00", "03-04 04:55", "8.00"),
        ("03-04 05:00", "03-04 05:00", "9.00"),
    ]
    assert await rolled(database, "3h") == [
        ("03-03 00:00", "03-03 02:55", "4.00"),
        ("03-03 03:00", "03-03 05:00", "6.00"),
        ("03-03 21:00", "03-03 23:55", "7.00"),
        ("03-04 03:00", "03-04 05:00", "9.00"),
    ]
    assert await rolled(database, "1d") == [
        ("03-02 05:00", "03-03 03:00", "5.00"),
        ("03-03 05:00", "03-04 04:55", "8.00"),
        ("03-04 05:00", "03-04 05:00", "9.00"),
    ]


async def test_row_is_the_snapshot_as_it_is(database: Database) -> None:
    user_id = await create_user(database)
    await make_partitions(database, MONDAY, MONDAY)
    await database.fetch(
        "INSERT INTO portfolio_snapshots VALUES ($1, $2, 3, TRUE, 12.34, 10.01, 2.33)", MONDAY + HOUR, user_id
    )
    await roll_up_all(database, MONDAY + 2 * DAY)
    for rollup in ROLLUPS:
        row = await database.fetch_row(f"SELECT * FROM {rollup.table}")  # noqa: S608
        assert row is not None
        assert tuple(row)[1:] == (
            *(MONDAY + HOUR, user_id, 3, True),
            *(Decimal("12.34"), Decimal("10.01"), Decimal("2.33")),
        )


@pytest.mark.parametrize(
    ("market_timezone", "starts_at", "ends_at"),
    [
        (NEW_YORK, "03-07 05:00", "03-08 05:00"),
        (NEW_YORK, "03-08 05:00", "03-09 04:00"),  # 23 hours
        (NEW_YORK, "03-09 04:00", "03-10 04:00"),
        (NEW_YORK, "10-31 04:00", "11-01 04:00"),
        (NEW_YORK, "11-01 04:00", "11-02 05:00"),  # 25 hours
        (NEW_YORK, "11-02 05:00", "11-03 05:00"),
        (KATHMANDU, "03-07 18:15", "03-08 18:15"),
        ("Asia/Beirut", "03-28 22:00", "03-29 21:00"),  # midnight itself is left out
        ("UTC", "03-07 00:00", "03-08 00:00"),
    ],
)
async def test_daily_bucket_is_a_market_date(
    database: Database, market_timezone: str, starts_at: str, ends_at: str
) -> None:
    user_id = await create_user(database)
    minutes = timedelta(minutes=5)
    for slot, total in (
        (at(starts_at) - minutes, "1"),
        (at(starts_at), "2"),
        (at(ends_at) - minutes, "3"),
        (at(ends_at), "4"),
    ):
        await add_snapshot(database, user_id, slot, total)
    await roll_up_all(database, at(ends_at), market_timezone)
    assert (await rolled(database, "1d"))[1:] == [(starts_at, told(at(ends_at) - minutes), "3.00")]
    await roll_up_all(database, at(ends_at) + 2 * DAY, market_timezone)
    assert (await rolled(database, "1d"))[2:] == [(ends_at, ends_at, "4.00")]


# ---- rollups: when, how far, and again -------------------------------------------------------------


async def test_nothing_is_rolled_up_before_its_day_is_due(database: Database) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    until = MONDAY + DAY
    before = until - timedelta(microseconds=1)
    await roll_up_all(database, before, "UTC")
    assert [await rolled(database, rollup.tier) for rollup in ROLLUPS] == [[]] * 4
    await roll_up_all(database, until, "UTC")
    assert [len(await rolled(database, rollup.tier)) for rollup in ROLLUPS] == [1] * 4
    assert await history.complete_until(database) == dict.fromkeys(("30m", "1h", "3h", "1d"), until)


async def test_round_waits_until_the_last_slot_of_a_day_must_have_been_stored(database: Database) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY + 12 * HOUR, "1")
    due = MONDAY + DAY + UPKEEP.interval + upkeep.SETTLED_AFTER
    assert (await keep(database, due - timedelta(seconds=1))).rolled_up == 0
    assert (await keep(database, due)).rolled_up == 3  # of UTC; New York's date goes on for five hours
    assert (await keep(database, due + 5 * HOUR)).rolled_up == 1
    assert await rolled(database, "1d") == [("03-02 05:00", "03-02 12:00", "1.00")]


async def test_rolling_up_again_writes_nothing(database: Database) -> None:
    user_id = await create_user(database)
    for hours in range(60):
        await add_snapshot(database, user_id, MONDAY + hours * HOUR, f"{hours}")
    await roll_up_all(database, MONDAY + 3 * DAY)
    before = {rollup.tier: await rolled(database, rollup.tier) for rollup in ROLLUPS}
    assert await roll_up_all(database, MONDAY + 3 * DAY) == {rollup.tier: [] for rollup in ROLLUPS}
    await database.fetch("SELECT reopen_history($1)", MONDAY)
    again = await roll_up_all(database, MONDAY + 3 * DAY)
    assert {tier: sum(rows) for tier, rows in again.items()} == dict.fromkeys(again, 0)
    assert {rollup.tier: await rolled(database, rollup.tier) for rollup in ROLLUPS} == before


async def test_each_day_is_added_to_what_is_there(database: Database) -> None:
    user_id = await create_user(database)
    for day in range(3):
        await add_snapshot(database, user_id, MONDAY + day * DAY, f"{day}")
        assert (await roll_up_all(database, MONDAY + (day + 1) * DAY, "UTC"))["30m"][-1] == 1
    assert [row[2] for row in await rolled(database, "3h")] == ["0.00", "1.00", "2.00"]


async def test_gap_of_a_month_is_caught_up_and_costs_nothing(database: Database) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    await roll_up_all(database, MONDAY + DAY)
    await add_snapshot(database, user_id, at("04-15 10:00"), "2")  # a Wednesday
    steps = await roll_up_all(database, at("04-17 00:00"))
    assert (await rolled(database, "1h"))[1:] == [("04-15 10:00", "04-15 10:00", "2.00")]
    assert (await rolled(database, "1d"))[1:] == [("04-15 04:00", "04-15 10:00", "2.00")]
    # The rest of the first week, then Monday to Thursday: weeks without a partition hold nothing.
    assert len(steps["30m"]) == 6 + 4
    assert sum(map(sum, steps.values())) == 4


async def test_month_of_days_is_caught_up_in_one_round(database: Database) -> None:
    user_id = await create_user(database)
    for day in range(31):
        await add_snapshot(database, user_id, MONDAY + day * DAY + 12 * HOUR, f"{day}")
    assert (await keep(database, MONDAY + 33 * DAY)).rolled_up == 4 * 31
    assert [row[2] for row in await rolled(database, "1d")] == [f"{day}.00" for day in range(31)]


async def test_clock_that_leaps_years_ahead_and_back_costs_nothing_and_loses_nothing(
    database: Database,
) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    await keep(database, MONDAY + 2 * DAY)
    wrong = datetime(2066, 3, 3, 12, tzinfo=UTC)
    await queries.take_snapshots(database, wrong, 0, 1)
    began = time.process_time()
    await keep(database, wrong + 2 * DAY)
    assert time.process_time() - began < 2  # not 14,610 days
    assert (await history.complete_until(database))["30m"] == datetime(2066, 3, 5, tzinfo=UTC)
    # The clock is right again: the next slot is one of the past, which opens its day and those before.
    slot = MONDAY + 2 * DAY + HOUR
    await queries.take_snapshots(database, slot, 0, 1)
    assert await history.complete_until(database) == dict.fromkeys(("30m", "1h", "3h", "1d"), MONDAY + DAY)
    await keep(database, MONDAY + 4 * DAY)
    assert [row[0] for row in await rolled(database, "1h")] == ["03-02 00:00", told(slot), "03-03 12:00"]


async def test_snapshots_written_into_the_past_are_rolled_up(database: Database) -> None:
    user_id = await create_user(database)
    for hours in (0, 30, 60):
        await add_snapshot(database, user_id, MONDAY + hours * HOUR, "1")
    await roll_up_all(database, MONDAY + 5 * DAY)
    late = MONDAY + timedelta(minutes=25)
    await add_snapshot(database, user_id, late, "2")
    await database.fetch("SELECT reopen_history($1)", late)
    # Until it has caught up, nobody takes the rollup for complete.
    assert max(map(str, (await history.complete_until(database)).values())) <= str(MONDAY)
    await roll_up_all(database, MONDAY + 5 * DAY)
    for rollup in ROLLUPS:
        assert ("03-02 00:25", "2.00") in [row[1:] for row in await rolled(database, rollup.tier)]
        assert len(await rolled(database, rollup.tier)) == 3


async def test_corrected_snapshot_is_rolled_up_again(database: Database) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    await roll_up_all(database, MONDAY + 2 * DAY)
    await database.fetch("UPDATE portfolio_snapshots SET total_value = 5")
    await database.fetch("SELECT reopen_history($1)", MONDAY)
    await roll_up_all(database, MONDAY + 2 * DAY)
    for rollup in ROLLUPS:
        assert [row[2] for row in await rolled(database, rollup.tier)] == ["5.00"]


async def test_step_and_reopening_at_once_leave_nothing_out(database: Database, database_url: str) -> None:
    """The half hours are done, the hours are not: a snapshot of that day comes while the hours are being done."""
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    while await history.roll_up(database, HALF_HOUR_ROLLUP, MONDAY + DAY, "UTC"):
        pass
    async with another_session(database_url) as writer:
        async with standing_still(database_url, HOUR_ROLLUP.table):
            stepping = asyncio.create_task(history.roll_up(database, HOUR_ROLLUP, MONDAY + DAY, "UTC"))
            await eventually(lambda: stands_still(database))
            await writer.execute("BEGIN")
            await writer.execute(
                "INSERT INTO portfolio_snapshots (user_id, timestamp, total_value, cash_balance, investment_value)"
                " VALUES ($1, $2, 2, 2, 0)",
                user_id,
                MONDAY + timedelta(minutes=25),
            )
            reopening = asyncio.create_task(writer.execute("SELECT reopen_history($1)", MONDAY))
            await eventually(lambda: waits(database))
        assert await stepping is not None
        await reopening
        await writer.execute("COMMIT")
    await roll_up_all(database, MONDAY + DAY, "UTC")
    for rollup in ROLLUPS:
        assert [row[2] for row in await rolled(database, rollup.tier)] == ["2.00"], rollup.tier


async def test_change_of_the_market_time_zone_does_no_harm(database: Database) -> None:
    users = [await create_user(database, f"user {number}") for number in range(3)]
    for hours in range(0, 24 * 8, 6):
        for user_id in users:
            await add_snapshot(database, user_id, MONDAY + hours * HOUR, f"{hours}")
    await roll_up_all(database, MONDAY + 2 * DAY, NEW_YORK)
    # The change comes in the middle of a day: two of three users are done.
    assert await history.roll_up(database, DAY_ROLLUP, MONDAY + 4 * DAY, NEW_YORK, users_max=2)
    assert (await tier(database, "1d"))["users_done"] == users[1]
    await roll_up_all(database, MONDAY + 5 * DAY, KATHMANDU, users_max=2)
    await roll_up_all(database, MONDAY + 8 * DAY, "Pacific/Honolulu", users_max=2)
    for user_id in users:
        rows = await database.fetch(
            "SELECT bucket, timestamp FROM portfolio_rollups_1d WHERE user_id = $1 ORDER BY bucket", user_id
        )
        buckets = {told(row["bucket"]): told(row["timestamp"]) for row in rows}
        # Midnights: 05:00 in New York, 18:15 the day before in Kathmandu, 10:00 in Honolulu.
        assert buckets["03-01 05:00"] == "03-02 00:00"
        assert buckets["03-02 05:00"] == "03-03 00:00"
        assert buckets["03-02 18:15"] == "03-03 18:00"
        assert buckets["03-03 18:15"] == "03-04 18:00"
        assert buckets["03-06 10:00"] == "03-07 06:00"
        assert buckets["03-08 10:00"] == "03-09 06:00"
        assert all(row["timestamp"] >= row["bucket"] for row in rows)


def gauge(metric: Gauge, tier: str) -> float:
    (family,) = metric.collect()
    (value,) = (sample.value for sample in family.samples if sample.labels == {"tier": tier})
    return value


async def test_part_that_cannot_be_done_stops_no_other(database: Database, database_url: str) -> None:
    """A user is locked: no rollup can be made, but room is, and what is expired of the rest goes."""
    await old_history(database)
    now = MONDAY + 28 * DAY
    await steady_clock(database, now)
    async with another_session(database_url) as holder:
        await holder.execute("BEGIN")
        await holder.execute("SELECT FROM users FOR UPDATE")
        with pytest.raises(DatabaseUnavailable) as raised:
            await keep(database, now, policy(14, 10))
        assert [part.split(":")[0] for part in str(raised.value).split("; ")] == ["rollup 30m", "rollup 1d"]
        assert await queries.make_partitions(database, now, now + 7 * DAY) == 0
        # Positions for 10 days of 28; snapshots are not rolled up, and stay.
        assert await database.fetch_value("SELECT min(timestamp) FROM position_snapshots") == at(
            "03-20 12:00"
        )
        assert await database.fetch_value("SELECT count(*) FROM portfolio_snapshots") == 28
        # From Monday, when the first week begins, to a day and a quarter of an hour before now.
        assert gauge(upkeep.rollup_lag, "1d") == (27 * DAY - timedelta(minutes=15)).total_seconds()
        assert gauge(upkeep.partitions_expired, "details") == 0
        with pytest.raises(DatabaseUnavailable, match="rollup 30m"):
            await keep(database, now + HOUR, policy(14, 10))
        assert gauge(upkeep.rollup_lag, "30m") == (27 * DAY + timedelta(minutes=45)).total_seconds()
    assert (await keep(database, now + HOUR, policy(14, 10))).dropped == 2
    assert gauge(upkeep.rollup_lag, "30m") == gauge(upkeep.rollup_lag, "1d") == 0


async def test_round_goes_by_the_clock_that_it_is_given_and_not_by_the_machines(database: Database) -> None:
    """The replicas' clock says that it is a Wednesday in 2031."""
    stop = asyncio.Event()
    wednesday = datetime(2031, 3, 5, 23, 59, tzinfo=UTC)

    async def is_seen() -> bool:
        seen_at = await database.fetch_value("SELECT max(seen_at) FROM history_clock")
        return bool(seen_at == wednesday)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(upkeep.run(database, UPKEEP, stop, now=lambda: wednesday))
        await eventually(is_seen)
        stop.set()
    assert {name for name in await tables(database, "portfolio_snapshots") if "_2031" in name} == {
        "portfolio_snapshots_20310303",
        "portfolio_snapshots_20310310",
    }


# ---- rollups: in steps, by several, and cut off ----------------------------------------------------


async def some_history(database: Database, users: int = 7, days: int = 3) -> None:
    """Users 1 to `users` with a snapshot every 25 minutes, each with a value of its own."""
    for number in range(users):
        await create_user(database, f"user {number}")
    await make_partitions(database, MONDAY, MONDAY + days * DAY)
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots (timestamp, user_id, total_value, cash_balance, investment_value)
        SELECT slot, users.id, users.id * 1000000 + extract(epoch FROM slot - $1) / 60, 0, 0
        FROM generate_series($1::timestamptz, $2::timestamptz - interval '1 second', interval '25 minutes') AS slot
        CROSS JOIN users
        """,
        MONDAY,
        MONDAY + days * DAY,
    )


async def all_rolled(database: Database) -> dict[str, list[tuple[object, ...]]]:
    return {
        rollup.tier: [
            tuple(row)
            for row in await database.fetch(f"SELECT * FROM {rollup.table} ORDER BY user_id, bucket")  # noqa: S608
        ]
        for rollup in ROLLUPS
    }


def expected_rows(
    snapshots: Mapping[tuple[int, datetime], int], rollup: Rollup, until: datetime, market_timezone: str
) -> dict[tuple[int, datetime], tuple[datetime, int]]:
    """What a rollup must hold, from (user, slot) to value, worked the plain way."""
    zone = ZoneInfo(market_timezone)
    last: dict[tuple[int, datetime], tuple[datetime, int]] = {}
    for (user_id, slot), value in sorted(snapshots.items()):
        if rollup.width:
            bucket = slot - (slot - MONDAY) % rollup.width
            ends_at = slot.replace(hour=0, minute=0) + DAY
        else:
            local = slot.astimezone(zone)
            bucket = local.replace(hour=0, minute=0, fold=0).astimezone(UTC)
            ends_at = datetime.combine(local.date() + DAY, datetime.min.time(), zone).astimezone(UTC)
        if ends_at <= until:
            last[user_id, bucket] = slot, value
    return last


async def test_steps_are_bounded_by_users(database: Database) -> None:
    await some_history(database, users=7, days=1)
    # 24 h of a snapshot every 25 minutes are 58 snapshots: in 48 half hours (none is left out).
    steps = await roll_up_all(database, MONDAY + DAY, "UTC", users_max=3)
    assert steps == {"30m": [144, 144, 48], "1h": [72, 72, 24], "3h": [24, 24, 8], "1d": [3, 3, 1]}
    assert all(step["users_done"] == 0 for step in [await tier(database, "30m"), await tier(database, "1d")])


async def test_users_that_fill_their_last_step_are_all_there_is(database: Database) -> None:
    await some_history(database, users=6, days=1)
    assert (await roll_up_all(database, MONDAY + DAY, "UTC", users_max=3))["1d"] == [3, 3, 0]
    assert len(await rolled(database, "1d")) == 6


async def test_user_who_came_or_went_between_two_steps_is_counted_right(database: Database) -> None:
    await some_history(database, users=7, days=1)
    assert await history.roll_up(database, HALF_HOUR_ROLLUP, MONDAY + DAY, "UTC", users_max=3)
    await database.fetch("DELETE FROM users WHERE id IN (SELECT id FROM users ORDER BY id LIMIT 5)")
    newcomer = await create_user(database, "newcomer")
    await add_snapshot(database, newcomer, MONDAY, "1")
    await roll_up_all(database, MONDAY + DAY, "UTC", users_max=3)
    assert await database.fetch_value(
        "SELECT array_agg(DISTINCT user_id ORDER BY user_id) FROM portfolio_rollups_30m"
    ) == await database.fetch_value("SELECT array_agg(id ORDER BY id) FROM users")


async def test_killed_at_any_point_it_goes_on_where_it_was(database: Database, database_url: str) -> None:
    await some_history(database)
    due_until = MONDAY + 3 * DAY
    kills = 0
    for rollup in ROLLUPS:
        for number in range(12):
            # Hold one of the users, so that the step that comes to it stands still, and kill it there.
            async with another_session(database_url) as holder:
                await holder.execute("BEGIN")
                await holder.execute(
                    "SELECT FROM users ORDER BY id OFFSET $1 LIMIT 1 FOR UPDATE", number * 3 % 7
                )
                stepping = asyncio.create_task(
                    history.roll_up(database, rollup, due_until, NEW_YORK, users_max=3)
                )
                await asyncio.wait({stepping, asyncio.ensure_future(is_waiting_or_done(database, stepping))})
                kills += stepping.done() and stepping.exception() is not None
        while await history.roll_up(database, rollup, due_until, NEW_YORK, users_max=3):
            pass
    assert kills > 10
    disturbed = await all_rolled(database)
    for rollup in ROLLUPS:
        await database.fetch(f"TRUNCATE {rollup.table}")
    await database.fetch("UPDATE history_tiers SET complete_until = '-infinity', users_done = 0")
    await roll_up_all(database, due_until)
    assert await all_rolled(database) == disturbed


async def is_waiting_or_done(database: Database, stepping: "asyncio.Task[object]") -> None:
    """Kill the step once it waits for a lock."""
    while not stepping.done():
        await database.fetch(
            """
            SELECT pg_terminate_backend(pid)
            FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock'
            """
        )


async def test_step_that_is_cancelled_leaves_nothing_half_done(database: Database, database_url: str) -> None:
    await some_history(database, users=3, days=1)
    async with standing_still(database_url, DAY_ROLLUP.table):
        stepping = asyncio.create_task(history.roll_up(database, DAY_ROLLUP, MONDAY + DAY, "UTC"))
        await eventually(lambda: stands_still(database))
        stepping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stepping
    assert (await tier(database, "1d"))["complete_until"] is None
    assert await rolled(database, "1d") == []
    await roll_up_all(database, MONDAY + DAY, "UTC")
    assert len(await rolled(database, "1d")) == 3


async def test_user_being_deleted_postpones_a_step_for_half_a_second(
    database: Database, database_url: str
) -> None:
    await some_history(database, users=3, days=1)
    async with another_session(database_url) as deleting:
        await deleting.execute("BEGIN")
        await deleting.execute("DELETE FROM users WHERE subject = 'user 1'")
        with pytest.raises(DatabaseUnavailable):
            await history.roll_up(database, DAY_ROLLUP, MONDAY + DAY, "UTC")
        await deleting.execute("COMMIT")
    await roll_up_all(database, MONDAY + DAY, "UTC")
    assert len(await rolled(database, "1d")) == 2


async def test_user_deleted_during_a_step_leaves_nothing(database: Database, database_url: str) -> None:
    await some_history(database, users=3, days=1)
    async with another_session(database_url) as deleter:
        async with standing_still(database_url, DAY_ROLLUP.table):
            stepping = asyncio.create_task(history.roll_up(database, DAY_ROLLUP, MONDAY + DAY, "UTC"))
            await eventually(lambda: stands_still(database))
            deleting = asyncio.create_task(deleter.execute("DELETE FROM users WHERE subject = 'user 0'"))
            await eventually(lambda: waits(database))
        step = await stepping
        assert step is not None
        assert step.rows == 3
        await deleting
    assert len(await rolled(database, "1d")) == 2


async def test_deletion_of_several_users_wins_against_a_step(database: Database, database_url: str) -> None:
    """The step holds the first and waits for the last; the deletion has the last and wants the first."""
    await some_history(database, users=3, days=1)
    async with another_session(database_url) as deleter:
        await deleter.execute("BEGIN")
        await deleter.execute("DELETE FROM users WHERE subject = 'user 2'")
        stepping = asyncio.create_task(history.roll_up(database, DAY_ROLLUP, MONDAY + DAY, "UTC"))
        await eventually(lambda: waits(database))
        await deleter.execute("DELETE FROM users WHERE subject = 'user 0'")
        await deleter.execute("COMMIT")
        with pytest.raises(DatabaseUnavailable, match="lock timeout"):
            await stepping


async def test_replicas_at_once_do_each_step_once(database: Database) -> None:
    await some_history(database, users=7, days=3)
    due_until = MONDAY + 3 * DAY

    async def replica() -> list[int]:
        rows = []
        for _ in range(40):
            for rollup in ROLLUPS:
                step = await history.roll_up(database, rollup, due_until, "UTC", users_max=3)
                rows += [step.rows] if step else []
        return rows

    steps = await asyncio.gather(*(replica() for _ in range(4)))
    rows = [rows for replicas in steps for rows in replicas]
    assert len(rows) == 4 * 3 * 3  # four tiers of three days, of three users at a time
    # Each day of each user: 48 half hours (36 minutes are never left out), 24 hours, 8 times three, a date.
    assert sum(rows) == 7 * 3 * (48 + 24 + 8 + 1)
    assert sum(map(len, (await all_rolled(database)).values())) == sum(rows)


slots = st.integers(0, 12 * 24 * 9)
histories = st.dictionaries(st.tuples(st.integers(0, 3), slots), st.integers(0, 10**6), max_size=60)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(histories, min_size=1, max_size=3),
    rounds=st.lists(st.tuples(st.sampled_from(ROLLUPS), slots), max_size=12),
    market_timezone=st.sampled_from([NEW_YORK, KATHMANDU, "UTC"]),
    users_max=st.integers(1, 5),
)
async def test_every_tier_holds_copies_of_the_last_snapshots_whatever_the_order(
    database: Database,
    parts: Sequence[Mapping[tuple[int, int], int]],
    rounds: Sequence[tuple[Rollup, int]],
    market_timezone: str,
    users_max: int,
) -> None:
    await database.fetch("TRUNCATE users CASCADE")
    for table in ("portfolio_snapshots", *(rollup.table for rollup in ROLLUPS)):
        await database.fetch(f"TRUNCATE {table}")
    await database.fetch("UPDATE history_tiers SET complete_until = '-infinity', users_done = 0")
    users = [await create_user(database, f"user {number}") for number in range(4)]
    start = at("03-05 00:00")  # New York's clocks change within the nine days
    five = timedelta(minutes=5)
    snapshots: dict[tuple[int, datetime], int] = {}
    for part in parts:  # each written before, or into the past of, the rounds that follow
        added = {
            (users[user], start + slot * five): value
            for (user, slot), value in part.items()
            if (users[user], start + slot * five) not in snapshots
        }
        snapshots |= added
        await make_partitions(database, start, start + 10 * DAY)
        await database.fetch(
            """
            INSERT INTO portfolio_snapshots (user_id, timestamp, total_value, cash_balance, investment_value)
            SELECT *, 0, 0 FROM unnest($1::integer[], $2::timestamptz[], $3::integer[])
            """,
            [user_id for user_id, _ in added],
            [slot for _, slot in added],
            list(added.values()),
        )
        if added:
            await database.fetch("SELECT reopen_history($1)", min(slot for _, slot in added))
        for rollup, slot in rounds:
            await history.roll_up(database, rollup, start + slot * five, market_timezone, users_max=users_max)
    until = start + 8 * DAY
    await roll_up_all(database, until, market_timezone, users_max)
    for rollup in ROLLUPS:
        complete = (await tier(database, rollup.tier))["complete_until"]
        rows = await database.fetch(f"SELECT * FROM {rollup.table} WHERE bucket < $1", complete)  # noqa: S608
        assert {
            (row["user_id"], row["bucket"]): (row["timestamp"], int(row["total_value"])) for row in rows
        } == expected_rows(snapshots, rollup, complete, market_timezone)
        assert complete >= until - DAY


# ---- retention -------------------------------------------------------------------------------------


async def old_history(database: Database) -> int:
    """One user with a snapshot and a position for each day from Monday on, for 28 days."""
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "10")
    for day in range(28):
        await queries.take_snapshots(database, MONDAY + day * DAY + 12 * HOUR, 0, 1)
    return user_id


async def drop_details(database: Database, keep_from: datetime) -> None:
    for name in await history.expired_partitions(database, "details", keep_from):
        assert await history.drop_partition(database, "details", name, keep_from)


def policy(snapshots: int, positions: int, rollups: int = 400) -> Upkeep:
    return Upkeep(UPKEEP.interval, NEW_YORK, snapshots * DAY, positions * DAY, rollups * DAY)


async def test_exactly_what_is_expired_is_dropped(database: Database) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    await steady_clock(database, now)
    # Positions for 10 days: 18 days are expired. Snapshots for 14: two of four weeks.
    done = await keep(database, now, policy(14, 10))
    assert done.dropped == 18 + 2
    assert not done.held
    assert await database.fetch_value("SELECT min(timestamp) FROM position_snapshots") == at("03-20 12:00")
    assert await database.fetch_value("SELECT min(timestamp) FROM portfolio_snapshots") == at("03-16 12:00")
    assert (await tier(database, "details"))["kept_from"] == at("03-20 00:00")
    assert (await tier(database, "raw"))["kept_from"] == at("03-16 00:00")
    assert (await tier(database, "30m"))["kept_from"] is None
    assert len(await rolled(database, "30m")) == 27  # the last day is not over in New York, but in UTC it is
    assert (await keep(database, now, policy(14, 10))).dropped == 0


async def test_instant_before_the_end_of_its_time_a_partition_stays(database: Database) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY - timedelta(microseconds=1)
    await steady_clock(database, now)
    await keep(database, now, policy(14, 10))
    assert (await tier(database, "details"))["kept_from"] == at("03-19 00:00")
    assert (await tier(database, "raw"))["kept_from"] == at("03-09 00:00")


async def test_snapshots_stay_until_every_rollup_has_them(database: Database) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    keep_from = now - 14 * DAY
    assert await history.expired_partitions(database, "raw", keep_from) == []
    await drop_details(database, now)
    for rollup in ROLLUPS:
        # Monday's midnight in UTC is Sunday in New York: that date must be done as well.
        assert await history.expired_partitions(database, "raw", keep_from) == []
        while await history.roll_up(database, rollup, MONDAY + 14 * DAY + 4 * HOUR, NEW_YORK):
            pass
    expired = ["portfolio_snapshots_20260302", "portfolio_snapshots_20260309"]
    assert await history.expired_partitions(database, "raw", keep_from) == expired


async def test_snapshots_stay_while_their_positions_do(database: Database) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    await roll_up_all(database, now)
    await drop_details(database, MONDAY + 6 * DAY)
    assert await history.expired_partitions(database, "raw", now) == []
    await drop_details(database, MONDAY + 7 * DAY)
    assert await history.expired_partitions(database, "raw", now) == ["portfolio_snapshots_20260302"]


async def test_rollups_are_dropped_by_months_and_daily_ones_never(database: Database) -> None:
    user_id = await create_user(database)
    start = datetime(2024, 1, 15, tzinfo=UTC)
    for days in (0, 31, 60, 400):
        await add_snapshot(database, user_id, start + days * DAY, "1")
    # 2025-04-22 less 400 days is 2024-03-18: January and February are over, March is not.
    now = datetime(2025, 4, 22, tzinfo=UTC)
    await steady_clock(database, now)
    await keep(database, now)
    assert [row[0] for row in await rolled(database, "1h")] == ["03-15 00:00", "02-18 00:00"]
    assert [row[0] for row in await rolled(database, "3h")] == ["03-15 00:00", "02-18 00:00"]
    assert [row[0] for row in await rolled(database, "30m")] == ["02-18 00:00"]
    assert len(await rolled(database, "1d")) == 4
    assert (await tier(database, "1h"))["kept_from"] == datetime(2024, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize("leap", [timedelta(days=3650), timedelta(days=8), -timedelta(hours=2)])
async def test_clock_that_leaps_drops_nothing_for_a_day(database: Database, leap: timedelta) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    await steady_clock(database, now)
    leapt = now + leap
    held = await keep(database, leapt, policy(14, 10))
    assert (held.dropped, held.held) == (0, True)
    almost = await keep(database, leapt + DAY - timedelta(seconds=1), policy(14, 10))
    assert (almost.dropped, almost.held) == (0, True)
    await keep(database, now + timedelta(minutes=5), policy(14, 10))  # and the clock is right again
    assert await database.fetch_value("SELECT count(*) FROM portfolio_snapshots") == 28


async def test_after_a_day_of_a_steady_clock_what_is_expired_goes(database: Database) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    assert (await keep(database, now, policy(14, 10))).held  # the first look at a clock
    for hours in range(1, 24):
        assert (await keep(database, now + hours * HOUR, policy(14, 10))).dropped == 0
    assert (await keep(database, now + DAY, policy(14, 10))).dropped == 19 + 2


async def test_reader_holds_up_a_drop_and_the_drop_holds_up_nobody(
    database: Database, database_url: str
) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    keep_from = now - 14 * DAY
    await roll_up_all(database, now)
    names = await history.expired_partitions(database, "details", now - 10 * DAY)
    async with another_session(database_url) as reader, another_session(database_url) as second:
        await reader.execute("BEGIN")
        await reader.fetch("SELECT FROM position_snapshots")
        stop = asyncio.Event()
        waits: list[float] = []

        async def read() -> None:
            while not stop.is_set():
                began = time.perf_counter()
                await second.fetch("SELECT FROM position_snapshots")
                waits.append(time.perf_counter() - began)

        reading = asyncio.create_task(read())
        for _ in range(10):
            with pytest.raises(DatabaseUnavailable):
                await history.drop_partition(database, "details", names[0], keep_from)
        # What holds the partition alone lets the drop have the parent, where all others queue.
        await reader.execute("ROLLBACK")
        await reader.execute("BEGIN")
        await reader.execute(f"LOCK TABLE {names[0]} IN ACCESS SHARE MODE")
        for _ in range(10):
            with pytest.raises(DatabaseUnavailable):
                await history.drop_partition(database, "details", names[0], keep_from)
        stop.set()
        await reading
        assert len(waits) > 20
        # Each attempt may hold them up once, for its bound of 80 ms, to which a busy machine adds its own; without the
        # bound the first would hold them up until the reader ends.
        assert sorted(waits)[-3] < 0.4
        assert max(waits) < 2.0
        await reader.execute("ROLLBACK")
    assert await history.drop_partition(database, "details", names[0], keep_from)
    assert names[0] not in await tables(database, "position_snapshots")


async def test_expired_partition_goes_while_snapshots_are_taken(database: Database) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    await steady_clock(database, now)
    stop = asyncio.Event()

    async def write() -> int:
        added = 0
        while not stop.is_set():
            slot = now + added * timedelta(minutes=5)
            added += (await queries.take_snapshots(database, slot, 0, 1)).added
        return added

    writing = asyncio.create_task(write())
    done = await keep(database, now, policy(14, 10))
    stop.set()
    added = await writing
    assert done.dropped == 20
    assert (
        await database.fetch_value("SELECT count(*) FROM portfolio_snapshots WHERE timestamp >= $1", now)
        == added
    )


async def test_replicas_that_drop_at_once_disturb_each_other_in_nothing(database: Database) -> None:
    await old_history(database)
    now = MONDAY + 28 * DAY
    await steady_clock(database, now)
    done = await asyncio.gather(*(keep(database, now, policy(14, 10)) for _ in range(3)))
    done += [await keep(database, now, policy(14, 10))]
    assert sum(replica.dropped for replica in done) == 20


async def test_reopened_history_is_not_dropped(database: Database) -> None:
    """It was expired when a round looked, and is to be rolled up again when its turn comes."""
    user_id = await create_user(database)
    await add_snapshot(database, user_id, MONDAY, "1")
    now = MONDAY + 28 * DAY
    await keep(database, now)
    await drop_details(database, now)
    keep_from = now - 14 * DAY
    (name,) = await history.expired_partitions(database, "raw", keep_from)
    await add_snapshot(database, user_id, MONDAY + HOUR, "2")
    await drop_details(database, now)
    await database.fetch("SELECT reopen_history($1)", MONDAY + HOUR)
    assert not await history.drop_partition(database, "raw", name, keep_from)
    await keep(database, now)
    assert await history.drop_partition(database, "raw", name, keep_from)
    assert [row[2] for row in await rolled(database, "3h")] == ["2.00"]


async def test_table_that_somebody_attached_is_left_alone(database: Database) -> None:
    await database.fetch("CREATE TABLE archive (LIKE portfolio_snapshots)")
    await database.fetch(
        "ALTER TABLE portfolio_snapshots ATTACH PARTITION archive FOR VALUES FROM ('2001-01-01') TO ('2002-01-01')"
    )
    now = utc_now()
    await steady_clock(database, now)
    await keep(database, now)
    assert "archive" in await tables(database, "portfolio_snapshots")


async def test_idle_system_keeps_no_empty_tables_for_ever(database: Database) -> None:
    now = utc_now()
    await steady_clock(database, now)
    weeks = len(await tables(database, "portfolio_snapshots"))
    later = now + 200 * DAY
    for _ in range(2):
        await keep(database, later)
        await steady_clock(database, later)
    assert len(await tables(database, "portfolio_snapshots")) <= weeks


# ---- deletion --------------------------------------------------------------------------------------


async def test_user_with_a_long_history_leaves_nothing_and_is_found_by_index(
    database: Database, database_url: str
) -> None:
    """A thousand users in 48 slots: a user's positions of a slot are in a few of its ten block ranges."""
    await database.fetch("INSERT INTO users (subject) SELECT 'user ' || n FROM generate_series(1, 1000) AS n")
    until = MONDAY + 2 * DAY
    await make_partitions(database, MONDAY, until)
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots (timestamp, user_id, total_value, cash_balance, investment_value)
        SELECT slot, users.id, 1, 1, 0
        FROM generate_series($1::timestamptz, $2::timestamptz - interval '1 second', interval '1 hour') AS slot
        CROSS JOIN users
        ORDER BY slot, users.id
        """,
        *(MONDAY, until),
        timeout=60,
    )
    await database.fetch(
        """
        INSERT INTO position_snapshots
        SELECT timestamp, user_id, 'S' || n, 1, 1, 1, 1
        FROM portfolio_snapshots CROSS JOIN generate_series(1, 10) AS n
        ORDER BY timestamp, user_id
        """,
        timeout=60,
    )
    await keep(database, until + 12 * HOUR)
    leaving: int = await database.fetch_value("SELECT min(id) + 500 FROM users")
    async with another_session(database_url) as deleter:
        await deleter.execute("BEGIN")
        await deleter.execute("DELETE FROM users WHERE id = $1", leaving)
        scans = await deleter.fetchrow(
            r"""
            SELECT
                sum(seq_scan) AS sequential,
                sum(idx_tup_fetch) FILTER (WHERE relname LIKE 'position%') AS positions_read
            FROM pg_stat_xact_user_tables
            WHERE relname LIKE 'portfolio\_%' OR relname LIKE 'position\_snapshots\_%'
            """
        )
        await deleter.execute("COMMIT")
    for table in ("portfolio_snapshots", "position_snapshots", *(rollup.table for rollup in ROLLUPS)):
        assert not await database.fetch_value(
            f"SELECT count(*) FROM {table} WHERE user_id = $1",  # noqa: S608
            leaving,
        )
    assert await database.fetch_value("SELECT count(*) FROM position_snapshots") == 999 * 48 * 10
    assert scans is not None
    assert scans["sequential"] == 0
    assert 480 <= scans["positions_read"] < 480_000 * 0.35


async def test_positions_of_an_import_are_indexed_once_history_is_reopened(database: Database) -> None:
    await keep(database, MONDAY + 10 * DAY)
    user_id = await create_user(database)
    await make_partitions(database, MONDAY, MONDAY)
    await database.fetch(
        "INSERT INTO position_snapshots SELECT $1, $2, 'S' || n, 1, 1, 1, 1 FROM generate_series(1, 10000) AS n",
        *(MONDAY, user_id),
    )

    async def ranges_left_out() -> int:
        """Index what is not, and tell how much that was."""
        left: int = await database.fetch_value(
            "SELECT brin_summarize_new_values('position_snapshots_20260302_timestamp_user_id_idx')"
        )
        return left

    await keep(database, MONDAY + 10 * DAY)
    await database.fetch("SELECT reopen_history($1)", MONDAY)
    await keep(database, MONDAY + 10 * DAY)
    assert await ranges_left_out() == 0
