"""`GET /api/portfolio/performance`, on a real database; every expected point worked by hand."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from services.api_gateway import performance
from services.api_gateway.performance import MarketDays, Timeframe
from services.api_gateway.responses import Performance
from shared.clock import last_boundary, utc_now
from shared.database import Database
from tests.factories import add_snapshot, create_user, make_partitions, set_price
from tests.gateway import Answer, Gateway, running, series_of

CHART = "/api/portfolio/performance"
NEW_YORK = ZoneInfo("America/New_York")


@pytest.fixture
async def gateway(database_url: str) -> AsyncIterator[Gateway]:
    async with running(database_url) as started:
        yield started


def chart(answer: Answer) -> Performance:
    """Check the answer strictly against the contract, and return it."""
    assert answer.status == 200, answer.text
    data = answer.json()
    assert all(point.get("partial", True) is True for point in data["data_points"])
    data["timeframe"] = Timeframe(data["timeframe"])
    return Performance.model_validate(data)


async def points_at(
    database: Database, user_id: int, timeframe: Timeframe, now: datetime
) -> list[tuple[str, str]]:
    """Return (timestamp, value) of the series as it is at `now`."""
    series = await series_of(database, user_id, performance.buckets(timeframe, now, NEW_YORK))
    points: list[dict[str, Any]] = json.loads(f"[{series.points}]", parse_float=str)
    return [(point["timestamp"], point["value"]) for point in points]


async def add_snapshots(
    database: Database, user_id: int, first: datetime, last: datetime, every: timedelta
) -> None:
    await make_partitions(database, first, last)
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots (user_id, timestamp, total_value, cash_balance, investment_value)
        SELECT $1, slot, 100, 100, 0 FROM generate_series($2::timestamptz, $3, $4::interval) AS slot
        """,
        user_id,
        first,
        last,
        every,
        timeout=60,
    )


async def test_the_specifications_chart_has_the_specifications_numbers(
    database: Database, gateway: Gateway
) -> None:
    user_id = await create_user(
        database, cash="5000.50", positions={"AAPL": ("100", "15000"), "BTC/USD": ("2.5", "100000")}
    )
    await set_price(database, "AAPL", "175.00")
    await set_price(database, "BTC/USD", "41000", feed="us")
    start = last_boundary(utc_now(), timedelta(minutes=5)) - timedelta(hours=1)
    await add_snapshot(database, user_id, start, "120000")
    await add_snapshot(database, user_id, start + timedelta(minutes=5), "120500")
    answer = await gateway.get(f"{CHART}?timeframe=1D")
    found = chart(answer)
    assert list(answer.json()) == [
        "timeframe",
        "data_points",
        "start_value",
        "current_value",
        "profit_loss",
        "profit_loss_percent",
        "data_available",
        "simulated",
    ]
    assert answer.text.endswith(
        '"start_value":120000.00,"current_value":125000.50,"profit_loss":5000.50'
        ',"profit_loss_percent":4.17,"data_available":true,"simulated":false}'
    )
    assert [(point.timestamp, str(point.value)) for point in found.data_points] == [
        (f"{start:%Y-%m-%dT%H:%M}:00Z", "120000.00"),
        (f"{start + timedelta(minutes=5):%Y-%m-%dT%H:%M}:00Z", "120500.00"),
    ]
    assert '"partial"' not in answer.text


async def test_one_day_is_the_default(database: Database, gateway: Gateway) -> None:
    await create_user(database)
    assert chart(await gateway.get(CHART)).timeframe == "1D"


@pytest.mark.parametrize("timeframe", ["1D", "1W", "1M", "3M", "YTD", "ALL"])
async def test_without_a_snapshot_there_is_no_data_but_a_live_value(
    database: Database, gateway: Gateway, timeframe: str
) -> None:
    await create_user(database, cash="5000.50")
    answer = await gateway.get(f"{CHART}?timeframe={timeframe}")
    chart(answer)
    assert answer.text == (
        f'{{"timeframe":"{timeframe}","data_points":[],"start_value":null,"current_value":5000.50'
        ',"profit_loss":null,"profit_loss_percent":null,"data_available":false,"simulated":false}'
    )


async def test_live_value_is_that_of_the_current_portfolio(database: Database, gateway: Gateway) -> None:
    await create_user(database, cash="10", positions={"A": ("3", "1"), "NONE": ("1", "1")})
    await set_price(database, "A", "0.125")
    live = chart(await gateway.get(CHART)).current_value
    assert str(live) == "10.38"
    assert live == (await gateway.get("/api/portfolio/current")).json()["total_value"]


async def test_bucket_shows_its_last_snapshot_at_its_start(database: Database) -> None:
    user_id = await create_user(database)
    for minute, second, total in ((30, 0, "1"), (32, 0, "2"), (34, 59, "3"), (40, 0, "4"), (44, 59, "5")):
        await add_snapshot(database, user_id, datetime(2024, 1, 1, 9, minute, second, tzinfo=UTC), total)
    found = await points_at(database, user_id, Timeframe.ONE_DAY, datetime(2024, 1, 1, 9, 47, tzinfo=UTC))
    assert found == [("2024-01-01T09:30:00Z", "3.00"), ("2024-01-01T09:40:00Z", "5.00")]


@pytest.mark.parametrize(
    ("timeframe", "bucket"),
    [
        (Timeframe.ONE_DAY, "2024-01-01T16:35:00Z"),
        (Timeframe.ONE_WEEK, "2024-01-01T16:30:00Z"),
        (Timeframe.ONE_MONTH, "2024-01-01T16:00:00Z"),
        (Timeframe.THREE_MONTHS, "2024-01-01T15:00:00Z"),
        (Timeframe.YEAR_TO_DATE, "2024-01-01T05:00:00Z"),
        (Timeframe.ALL, "2024-01-01T05:00:00Z"),
    ],
)
async def test_each_timeframe_has_its_bucket_width(
    database: Database, timeframe: Timeframe, bucket: str
) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, datetime(2024, 1, 1, 16, 39, 59, tzinfo=UTC), "7.25")
    now = datetime(2024, 1, 1, 17, 0, tzinfo=UTC)
    assert await points_at(database, user_id, timeframe, now) == [(bucket, "7.25")]


@pytest.mark.parametrize(
    ("timeframe", "before", "inside"),
    [
        # Buckets that start after now less 1, 7, 30, 90 days; now is 2024-01-01 17:02.
        (Timeframe.ONE_DAY, (2023, 12, 31, 17, 4), (2023, 12, 31, 17, 5)),
        (Timeframe.ONE_WEEK, (2023, 12, 25, 17, 29), (2023, 12, 25, 17, 30)),
        (Timeframe.ONE_MONTH, (2023, 12, 2, 17, 59), (2023, 12, 2, 18, 0)),
        (Timeframe.THREE_MONTHS, (2023, 10, 3, 17, 59), (2023, 10, 3, 18, 0)),
        (Timeframe.YEAR_TO_DATE, (2024, 1, 1, 4, 59), (2024, 1, 1, 5, 0)),
    ],
)
async def test_window_starts_with_its_first_whole_bucket(
    database: Database,
    timeframe: Timeframe,
    before: tuple[int, int, int, int, int],
    inside: tuple[int, int, int, int, int],
) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, datetime(*before, tzinfo=UTC), "1")
    await add_snapshot(database, user_id, datetime(*inside, tzinfo=UTC), "2")
    now = datetime(2024, 1, 1, 17, 2, tzinfo=UTC)
    assert [value for _, value in await points_at(database, user_id, timeframe, now)] == ["2.00"]


@pytest.mark.parametrize(("timeframe", "most"), [("1D", 288), ("1W", 336), ("1M", 720), ("3M", 720)])
async def test_full_history_gives_the_most_points_and_no_more(
    database: Database, gateway: Gateway, timeframe: str, most: int
) -> None:
    user_id = await create_user(database)
    now = last_boundary(utc_now(), timedelta(minutes=5))
    await add_snapshots(
        database, user_id, now - timedelta(days=91), now + timedelta(minutes=5), timedelta(minutes=5)
    )
    found = chart(await gateway.get(f"{CHART}?timeframe={timeframe}"))
    assert len(found.data_points) == most
    timestamps = [point.timestamp for point in found.data_points]
    assert timestamps == sorted(set(timestamps))


async def test_clock_change_in_march_loses_no_hour(database: Database) -> None:
    """2026-03-08 has 23 hours in New York: from 05:00 UTC to 04:00 UTC."""
    user_id = await create_user(database)
    for at, total in (
        (datetime(2026, 3, 8, 4, 59, tzinfo=UTC), "1"),  # still the 7th
        (datetime(2026, 3, 8, 5, 0, tzinfo=UTC), "2"),
        (datetime(2026, 3, 9, 3, 59, 59, tzinfo=UTC), "3"),  # the last second of the 8th
        (datetime(2026, 3, 9, 4, 0, tzinfo=UTC), "4"),  # the 9th begins
    ):
        await add_snapshot(database, user_id, at, total)
    for timeframe in (Timeframe.ALL, Timeframe.YEAR_TO_DATE):
        assert await points_at(database, user_id, timeframe, datetime(2026, 3, 9, 12, tzinfo=UTC)) == [
            ("2026-03-07T05:00:00Z", "1.00"),
            ("2026-03-08T05:00:00Z", "3.00"),
            ("2026-03-09T04:00:00Z", "4.00"),
        ]


async def test_clock_change_in_november_doubles_no_hour(database: Database) -> None:
    """2026-11-01 has 25 hours in New York: from 04:00 UTC to 05:00 UTC."""
    user_id = await create_user(database)
    for at, total in (
        (datetime(2026, 11, 1, 3, 59, tzinfo=UTC), "1"),  # still 31 October
        (datetime(2026, 11, 1, 4, 0, tzinfo=UTC), "2"),
        (datetime(2026, 11, 1, 5, 30, tzinfo=UTC), "3"),  # 01:30, the first time
        (datetime(2026, 11, 1, 6, 30, tzinfo=UTC), "4"),  # 01:30, the second time
        (datetime(2026, 11, 2, 4, 59, 59, tzinfo=UTC), "5"),  # the last second of the 1st
        (datetime(2026, 11, 2, 5, 0, tzinfo=UTC), "6"),  # the 2nd begins
    ):
        await add_snapshot(database, user_id, at, total)
    for timeframe in (Timeframe.ALL, Timeframe.YEAR_TO_DATE):
        assert await points_at(database, user_id, timeframe, datetime(2026, 11, 2, 12, tzinfo=UTC)) == [
            ("2026-10-31T04:00:00Z", "1.00"),
            ("2026-11-01T04:00:00Z", "5.00"),
            ("2026-11-02T05:00:00Z", "6.00"),
        ]


@pytest.mark.parametrize("year", [2024, 2026])
async def test_every_day_of_a_year_has_one_point(database: Database, year: int) -> None:
    user_id = await create_user(database)
    start, end = datetime(year, 1, 1, 5, tzinfo=UTC), datetime(year + 1, 1, 1, 4, 59, tzinfo=UTC)
    await add_snapshots(database, user_id, start, end, timedelta(minutes=30))
    found = await points_at(database, user_id, Timeframe.YEAR_TO_DATE, end)
    assert len(found) == {2024: 366, 2026: 365}[year]
    assert found == await points_at(database, user_id, Timeframe.ALL, end)


async def test_new_year_in_new_york_ends_the_old_years_chart(database: Database) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, datetime(2025, 1, 1, 4, 59, 59, tzinfo=UTC), "1")
    await add_snapshot(database, user_id, datetime(2025, 1, 1, 5, 0, tzinfo=UTC), "2")
    old = await points_at(
        database, user_id, Timeframe.YEAR_TO_DATE, datetime(2025, 1, 1, 4, 59, 59, tzinfo=UTC)
    )
    new = await points_at(database, user_id, Timeframe.YEAR_TO_DATE, datetime(2025, 1, 1, 5, 0, tzinfo=UTC))
    assert old == [("2024-12-31T05:00:00Z", "1.00")]
    assert new == [("2025-01-01T05:00:00Z", "2.00")]


async def test_saturday_night_is_a_day_of_its_own(database: Database) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, datetime(2025, 1, 5, 0, 55, tzinfo=UTC), "9")
    now = datetime(2025, 1, 5, 1, 0, tzinfo=UTC)  # Saturday evening, 2025-01-04, in New York
    assert await points_at(database, user_id, Timeframe.ALL, now) == [("2025-01-04T05:00:00Z", "9.00")]


async def test_other_market_other_days(database: Database) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, datetime(2025, 1, 4, 15, 30, tzinfo=UTC), "1")  # 00:30 in Tokyo
    days = performance.buckets(Timeframe.ALL, datetime(2025, 1, 4, 16, 0, tzinfo=UTC), ZoneInfo("Asia/Tokyo"))
    assert isinstance(days, MarketDays)
    series = await series_of(database, user_id, days, "Asia/Tokyo")
    assert series.points == '{"timestamp":"2025-01-04T15:00:00Z","value":1.00}'


async def test_point_of_an_incomplete_snapshot_is_partial(database: Database, gateway: Gateway) -> None:
    user_id = await create_user(database)
    start = last_boundary(utc_now(), timedelta(minutes=5)) - timedelta(hours=1)
    await add_snapshot(database, user_id, start, "1", unpriced=2)
    await add_snapshot(database, user_id, start + timedelta(minutes=5), "2")
    answer = await gateway.get(CHART)
    chart(answer)
    assert [point.get("partial", "absent") for point in answer.json()["data_points"]] == [True, "absent"]


async def test_simulated_point_or_live_value_makes_the_answer_simulated(
    database: Database, gateway: Gateway
) -> None:
    user_id = await create_user(database, positions={"A": ("1", "1")})
    await set_price(database, "A", "1")
    await add_snapshot(database, user_id, utc_now() - timedelta(hours=1), "1")
    assert chart(await gateway.get(CHART)).simulated is False
    await database.fetch("UPDATE portfolio_snapshots SET simulated = TRUE")
    assert chart(await gateway.get(CHART)).simulated is True
    await database.fetch("UPDATE portfolio_snapshots SET simulated = FALSE")
    await set_price(database, "A", "1", feed="simulated")
    assert chart(await gateway.get(CHART)).simulated is True


async def test_simulated_snapshot_outside_the_window_does_not_count(
    database: Database, gateway: Gateway
) -> None:
    user_id = await create_user(database)
    await add_snapshot(database, user_id, utc_now() - timedelta(days=2), "1")
    await database.fetch("UPDATE portfolio_snapshots SET simulated = TRUE")
    assert chart(await gateway.get(f"{CHART}?timeframe=1D")).simulated is False
    assert chart(await gateway.get(f"{CHART}?timeframe=1W")).simulated is True


async def test_a_token_sees_its_own_history_only(database: Database, gateway: Gateway) -> None:
    at = utc_now() - timedelta(hours=1)
    for subject, total in (("alice", "1"), ("bob", "2")):
        await add_snapshot(database, await create_user(database, subject), at, total)
    for timeframe in ("1D", "ALL"):
        found = chart(await gateway.get(f"{CHART}?timeframe={timeframe}", "bob"))
        assert [str(point.value) for point in found.data_points] == ["2.00"]


async def test_unknown_user_has_no_chart(gateway: Gateway) -> None:
    assert (await gateway.get(CHART, "nobody")).status == 404


@pytest.mark.parametrize("timeframe", ["2D", "1d", "", "1D ", "ytd", "%00", "%FF", "1D%2C1W"])
async def test_unknown_timeframe_lists_the_allowed_ones(
    database: Database, gateway: Gateway, timeframe: str
) -> None:
    await create_user(database)
    answer = await gateway.get(f"{CHART}?timeframe={timeframe}")
    assert answer.status == 400
    assert answer.problem().type == "urn:foliotick:problem:unknown-timeframe"
    assert answer.problem().allowed == ["1D", "1W", "1M", "3M", "YTD", "ALL"]


@pytest.mark.parametrize("query", ["timeframe=1D&timeframe=1W", "timeframe=1D&timeframe=1D", "days=3", "x"])
async def test_parameter_that_would_be_ignored_is_refused(
    database: Database, gateway: Gateway, query: str
) -> None:
    await create_user(database)
    answer = await gateway.get(f"{CHART}?{query}")
    assert answer.status == 400
    assert answer.problem().type == "urn:foliotick:problem:unexpected-parameter"
