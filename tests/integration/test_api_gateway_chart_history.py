"""Charts over a history that is rolled up and dropped: the same values, from fewer rows."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.api_gateway import performance, queries
from services.api_gateway.performance import Buckets, MarketDays, Timeframe
from services.snapshotter import upkeep
from services.snapshotter.upkeep import Upkeep
from shared.clock import last_boundary
from shared.database import Database
from tests.factories import create_user, make_partitions
from tests.gateway import series_of

NEW_YORK = ZoneInfo("America/New_York")
NOW = datetime(2026, 3, 12, 14, 3, tzinfo=UTC)  # four days after the clocks of New York changed
FIVE_MINUTES = timedelta(minutes=5)
DAY = timedelta(days=1)


def kept_for(days: int, rollup_days: int) -> Upkeep:
    return Upkeep(FIVE_MINUTES, NEW_YORK.key, timedelta(days=days), DAY, timedelta(days=rollup_days))


async def keep(database: Database, policy: Upkeep, now: datetime) -> upkeep.Done:
    """One round of upkeep by a clock that has been steady for long."""
    await database.fetch(
        """
        INSERT INTO history_clock (seen_at, steady_since) VALUES ($1, $1::timestamptz - interval '1 year')
        ON CONFLICT (id) DO UPDATE SET seen_at = $1, steady_since = $1::timestamptz - interval '1 year'
        """,
        now,
    )
    return await upkeep.keep(database, policy, now, asyncio.Event())


async def points(
    database: Database, user_id: int, window: Buckets | MarketDays
) -> list[tuple[str, str, bool]]:
    """Return (timestamp, value, partial) of each point."""
    series = await series_of(database, user_id, window)
    found: list[dict[str, Any]] = json.loads(f"[{series.points}]", parse_float=str)
    return [(point["timestamp"], point["value"], point.get("partial", False)) for point in found]


async def add_snapshots(database: Database, user_id: int, snapshots: list[tuple[datetime, int]]) -> None:
    """Insert snapshots of (slot, value in cents); an odd number of cents has an unpriced position."""
    if snapshots:
        await make_partitions(database, min(snapshots)[0], max(snapshots)[0])
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots
            (timestamp, user_id, unpriced_positions, total_value, cash_balance, investment_value)
        SELECT slot, $1, cents % 2, cents / 100.0, cents / 100.0, 0
        FROM unnest($2::timestamptz[], $3::integer[]) AS given (slot, cents)
        """,
        user_id,
        [slot for slot, _ in snapshots],
        [cents for _, cents in snapshots],
    )


async def add_regular_snapshots(
    database: Database, user_id: int, first: datetime, last: datetime, every: timedelta
) -> None:
    await make_partitions(database, first, last)
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots (timestamp, user_id, total_value, cash_balance, investment_value)
        SELECT slot, $1, 100, 100, 0 FROM generate_series($2::timestamptz, $3, $4::interval) AS slot
        """,
        user_id,
        first,
        last,
        every,
        timeout=60,
    )


ages = st.one_of(
    st.integers(
        0, 12 * 24 * 3
    ),  # the last three days, and with them the border between rollups and snapshots
    st.integers(0, 12 * 24 * 100),
)
histories = st.dictionaries(ages, st.integers(0, 10**9), max_size=120)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=histories,
    rounds=st.lists(st.integers(0, 12 * 24 * 5), max_size=3),
    kept_days=st.sampled_from([8, 92, 100]),
)
async def test_value_that_was_shown_never_changes_because_of_a_rollup(
    database: Database, history: dict[int, int], rounds: list[int], kept_days: int
) -> None:
    await database.fetch("DELETE FROM users")
    await database.fetch(
        "UPDATE history_tiers SET complete_until = DEFAULT, users_done = 0, kept_from = DEFAULT"
    )
    user_id = await create_user(database)
    snapshots = [(NOW - timedelta(minutes=3) - age * FIVE_MINUTES, cents) for age, cents in history.items()]
    await add_snapshots(database, user_id, snapshots)
    windows = {timeframe: performance.buckets(timeframe, NOW, NEW_YORK) for timeframe in Timeframe}
    shown = {timeframe: await points(database, user_id, window) for timeframe, window in windows.items()}
    for age in sorted(rounds, reverse=True):
        await keep(database, kept_for(100, 400), NOW - age * FIVE_MINUTES)
    await keep(database, kept_for(kept_days, 400), NOW)
    for timeframe, window in windows.items():
        assert await points(database, user_id, window) == shown[timeframe], timeframe
    # The same slot has the same value wherever it is kept.
    tables = ["portfolio_snapshots", *(f"portfolio_rollups_{tier}" for tier in ("30m", "1h", "3h", "1d"))]
    copies = " UNION ALL ".join(f"SELECT timestamp, total_value FROM {table}" for table in tables)  # noqa: S608
    assert (
        await database.fetch(
            f"SELECT timestamp FROM ({copies}) AS copies GROUP BY timestamp HAVING count(DISTINCT total_value) > 1"  # noqa: S608
        )
        == []
    )


untils = st.lists(st.integers(0, 12 * 24 * 60), min_size=1, max_size=4)
closely = st.integers(12 * 24 * 5, 12 * 24 * 60)
nights = st.builds(  # around the midnights of New York, at 05:00
    lambda days, slots: 12 * 24 * days + 12 * 9 + slots, st.integers(5, 60), st.integers(-30, 30)
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.dictionaries(st.one_of(closely, nights), st.integers(0, 10**9), min_size=1, max_size=120),
    untils=untils,
    kept_days=st.sampled_from([(8, 8), (8, 30), (30, 30)]),
)
async def test_point_that_is_left_of_the_past_is_one_that_was_shown(
    database: Database, history: dict[int, int], untils: list[int], kept_days: tuple[int, int]
) -> None:
    """At the same time it has the same value, but for three hours around a midnight of New York: such a bucket may keep
    the last snapshot of the earlier market date alone."""
    await database.fetch("DELETE FROM users")
    await database.fetch(
        "UPDATE history_tiers SET complete_until = DEFAULT, users_done = 0, kept_from = DEFAULT"
    )
    user_id = await create_user(database)
    snapshots = [(NOW - timedelta(minutes=3) - age * FIVE_MINUTES, cents) for age, cents in history.items()]
    await add_snapshots(database, user_id, snapshots)
    windows = [
        (timeframe, performance.buckets_until(timeframe, NOW - age * FIVE_MINUTES, NEW_YORK))
        for timeframe in Timeframe
        for age in untils
    ]
    shown = [await points(database, user_id, window) for _, window in windows]
    await keep(database, kept_for(*kept_days), NOW)
    in_three_hours = {
        (
            f"{last_boundary(slot, timedelta(hours=3)):%Y-%m-%dT%H:%M:%SZ}",
            f"{cents // 100}.{cents % 100:02}",
            cents % 2 == 1,
        )
        for slot, cents in snapshots
    }
    for (timeframe, window), before in zip(windows, shown, strict=True):
        left = await points(database, user_id, window)
        timestamps = [timestamp for timestamp, _, _ in left]
        assert timestamps == sorted(set(timestamps)), (timeframe, window)
        assert set(timestamps) <= {timestamp for timestamp, _, _ in before}, (timeframe, window)
        allowed = in_three_hours if timeframe is Timeframe.THREE_MONTHS else set(before)
        assert set(left) <= allowed, (timeframe, window)
        if isinstance(window, MarketDays):
            assert left == before, (timeframe, window)


async def test_of_times_that_have_been_dropped_the_coarser_points_are_left(database: Database) -> None:
    """Of 1 January 2025: after 8 days 24 hourly points, after 92 days the market date's one."""
    user_id = await create_user(database)
    day = datetime(2025, 1, 1, tzinfo=UTC)
    await add_snapshots(
        database, user_id, [(day + slot * FIVE_MINUTES, 10_000 + 2 * slot) for slot in range(288)]
    )
    window = performance.buckets_until(Timeframe.ONE_DAY, day + DAY, NEW_YORK)
    assert len(await points(database, user_id, window)) == 288
    await keep(database, kept_for(8, 92), day + timedelta(days=30))
    hourly = await points(database, user_id, window)
    assert len(hourly) == 24
    assert hourly[0] == ("2025-01-01T00:55:00Z", "100.22", False)  # slot 11
    assert hourly[-1] == ("2025-01-01T23:55:00Z", "105.74", False)  # slot 287
    await keep(database, kept_for(8, 92), day + timedelta(days=150))
    # New York's 1 January begins at 05:00 and its last snapshot is slot 287; 31 December began before the window.
    assert await points(database, user_id, window) == [("2025-01-01T23:55:00Z", "105.74", False)]


async def test_market_date_whose_snapshot_lies_after_the_window_has_no_point_in_it(
    database: Database,
) -> None:
    """New York's 1 January has its last snapshot at 01:00 of the 2nd, an hour after the window's end."""
    user_id = await create_user(database)
    day = datetime(2025, 1, 1, tzinfo=UTC)
    await add_snapshots(
        database, user_id, [(day + timedelta(hours=12), 10_000), (day + timedelta(hours=25), 20_000)]
    )
    await keep(database, kept_for(8, 92), day + timedelta(days=150))
    window = performance.buckets_until(Timeframe.ONE_DAY, day + DAY, NEW_YORK)
    assert await points(database, user_id, window) == []
    window = performance.buckets_until(Timeframe.ONE_DAY, day + timedelta(hours=28), NEW_YORK)
    assert await points(database, user_id, window) == [("2025-01-02T01:00:00Z", "200.00", False)]


async def test_market_dates_that_meet_in_one_bucket_have_its_last_value(database: Database) -> None:
    """New York's 1 January ends at 05:00 of the 2nd, within the three hours from 03:00."""
    user_id = await create_user(database)
    midnight = datetime(2025, 1, 2, 5, tzinfo=UTC)
    await add_snapshots(database, user_id, [(midnight - FIVE_MINUTES, 10_000), (midnight, 20_000)])
    window = performance.buckets_until(Timeframe.THREE_MONTHS, midnight + DAY, NEW_YORK)
    shown = await points(database, user_id, window)
    assert shown == [("2025-01-02T03:00:00Z", "200.00", False)]
    await keep(database, kept_for(8, 92), midnight + timedelta(days=150))
    assert await points(database, user_id, window) == shown


async def test_no_time_stands_twice_when_tiers_overlap_in_reopened_history(database: Database) -> None:
    """Of 8 days snapshots are left from Monday 30 March, half hours from 1 April; then those are made again.

    Whether a rollup is complete or has to begin anew, 30 and 31 March have one point an hour and what follows two.
    """
    user_id = await create_user(database)
    first, now = datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 4, 9, 1, tzinfo=UTC)
    april = datetime(2026, 4, 1, tzinfo=UTC)
    await add_regular_snapshots(database, user_id, first, now, FIVE_MINUTES)
    await keep(database, kept_for(8, 400), now)
    kept_from = {
        row["tier"]: row["kept_from"]
        for row in await database.fetch("SELECT tier, kept_from FROM history_tiers")
    }
    assert (kept_from["raw"], kept_from["30m"]) == (datetime(2026, 3, 30, tzinfo=UTC), april)
    window = performance.buckets_until(Timeframe.ONE_WEEK, datetime(2026, 4, 4, tzinfo=UTC), NEW_YORK)
    hourly = [
        f"{first + number * timedelta(hours=1) + timedelta(minutes=30):%Y-%m-%dT%H:%M:%SZ}"
        for number in range(4 * 24)
    ]
    halves = [f"{april + number * timedelta(minutes=30):%Y-%m-%dT%H:%M:%SZ}" for number in range(3 * 48)]
    assert [timestamp for timestamp, _, _ in await points(database, user_id, window)] == hourly + halves
    await database.fetch("SELECT reopen_history($1)", datetime(2026, 3, 30, 12, tzinfo=UTC))
    assert [timestamp for timestamp, _, _ in await points(database, user_id, window)] == hourly + halves
    await keep(database, kept_for(100, 400), now)
    assert (
        await database.fetch_value("SELECT count(*) FROM portfolio_rollups_30m WHERE bucket < $1", april)
        == 2 * 48
    )
    assert [timestamp for timestamp, _, _ in await points(database, user_id, window)] == hourly + halves


async def test_snapshots_kept_longer_than_the_hours_stand_once(database: Database) -> None:
    """Of 8 days snapshots are left from Monday 30 March, hours from 1 April; New York's 30 March is the window."""
    user_id = await create_user(database)
    first, now = datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 4, 9, 1, tzinfo=UTC)
    await add_regular_snapshots(database, user_id, first, now, FIVE_MINUTES)
    window = performance.buckets_until(Timeframe.ONE_DAY, datetime(2026, 3, 31, 4, tzinfo=UTC), NEW_YORK)
    shown = await points(database, user_id, window)
    await keep(database, kept_for(8, 8), now)
    assert await database.fetch_value("SELECT kept_from FROM history_tiers WHERE tier = '1h'") == datetime(
        2026, 4, 1, tzinfo=UTC
    )
    assert await points(database, user_id, window) == shown
    assert len(shown) == 288


async def test_snapshots_written_where_they_have_been_dropped_do_not_stand_beside_the_hours(
    database: Database,
) -> None:
    user_id = await create_user(database)
    day = datetime(2025, 1, 1, tzinfo=UTC)
    await add_snapshots(database, user_id, [(day, 10_000), (day + timedelta(minutes=55), 10_100)])
    await keep(database, kept_for(8, 92), day + timedelta(days=30))
    await add_snapshots(database, user_id, [(day, 10_000), (day + timedelta(minutes=55), 10_100)])
    window = performance.buckets_until(Timeframe.ONE_DAY, day + DAY, NEW_YORK)
    assert await points(database, user_id, window) == [("2025-01-01T00:55:00Z", "101.00", False)]


async def test_work_follows_the_points_and_not_the_snapshots_behind_them(database: Database) -> None:
    """Of 28,800 snapshots (100 days) a chart touches as many rows as it has points, all by an index."""
    user_ids = [await create_user(database, f"user {number}") for number in range(4)]
    for user_id in user_ids:
        await add_regular_snapshots(database, user_id, NOW - timedelta(days=100), NOW, FIVE_MINUTES)
    await keep(database, kept_for(100, 400), NOW)
    await database.fetch("VACUUM ANALYZE portfolio_snapshots", timeout=60)
    arguments: tuple[object, ...]
    for timeframe, rows_max in (
        ("1D", 288),
        ("1W", 336),
        ("1M", 720),
        ("3M", 720),
        ("YTD", 71),
        ("ALL", 101),
    ):
        match performance.buckets(Timeframe(timeframe), NOW, NEW_YORK):
            case MarketDays(first, last):
                statement, arguments = queries.DAILY_CHART, (first, last, NEW_YORK.key)
            case Buckets(starts_at, last_starts_at, width):
                statement, arguments = queries.CHARTS[width], (starts_at, last_starts_at, width)
        (row,) = await database.fetch(
            f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}", "user 1", *arguments
        )
        plan = nodes(json.loads(row[0])[0]["Plan"])
        scans = [node for node in plan if node.get("Relation Name", "").startswith("portfolio_")]
        assert {node["Node Type"] for node in scans} <= {
            "Index Scan",
            "Index Only Scan",
            "Bitmap Heap Scan",
        }, timeframe
        rows = sum(node["Actual Rows"] * node["Actual Loops"] for node in scans)
        assert rows_max - 2 <= rows <= rows_max, timeframe


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(below for part in plan.get("Plans", []) for below in nodes(part))]
