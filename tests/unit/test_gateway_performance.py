"""The chart's buckets and arithmetic."""

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest

from services.api_gateway.performance import (
    Buckets,
    MarketDays,
    Timeframe,
    answer,
    buckets,
    buckets_until,
    end,
    last_value,
)

NEW_YORK = ZoneInfo("America/New_York")
NOW = datetime(2024, 1, 1, 9, 37, 12, 345678, tzinfo=UTC)


@pytest.mark.parametrize(
    ("timeframe", "first", "last", "width"),
    [
        (
            Timeframe.ONE_DAY,
            datetime(2023, 12, 31, 9, 40, tzinfo=UTC),
            datetime(2024, 1, 1, 9, 35, tzinfo=UTC),
            timedelta(minutes=5),
        ),
        (
            Timeframe.ONE_WEEK,
            datetime(2023, 12, 25, 10, 0, tzinfo=UTC),
            datetime(2024, 1, 1, 9, 30, tzinfo=UTC),
            timedelta(minutes=30),
        ),
        (
            Timeframe.ONE_MONTH,
            datetime(2023, 12, 2, 10, 0, tzinfo=UTC),
            datetime(2024, 1, 1, 9, 0, tzinfo=UTC),
            timedelta(hours=1),
        ),
        (
            Timeframe.THREE_MONTHS,
            datetime(2023, 10, 3, 12, 0, tzinfo=UTC),
            datetime(2024, 1, 1, 9, 0, tzinfo=UTC),
            timedelta(hours=3),
        ),
    ],
)
def test_fixed_window_holds_the_buckets_that_start_inside_it(
    timeframe: Timeframe, first: datetime, last: datetime, width: timedelta
) -> None:
    assert buckets(timeframe, NOW, NEW_YORK) == Buckets(first, last, width)


@pytest.mark.parametrize(
    ("timeframe", "most"),
    [
        (Timeframe.ONE_DAY, 288),
        (Timeframe.ONE_WEEK, 336),
        (Timeframe.ONE_MONTH, 720),
        (Timeframe.THREE_MONTHS, 720),
    ],
)
@pytest.mark.parametrize("second", [0, 1, 59])
def test_fixed_window_has_its_number_of_buckets_at_any_second(
    timeframe: Timeframe, most: int, second: int
) -> None:
    found = buckets(timeframe, NOW.replace(minute=0, second=second, microsecond=0), NEW_YORK)
    assert isinstance(found, Buckets)
    assert (found.last - found.first) / found.width + 1 == most


def test_now_on_a_boundary_starts_the_last_bucket() -> None:
    on_boundary = datetime(2024, 1, 1, 9, 35, tzinfo=UTC)
    found = buckets(Timeframe.ONE_DAY, on_boundary, NEW_YORK)
    assert isinstance(found, Buckets)
    assert found.last == on_boundary
    assert found.first == datetime(
        2023, 12, 31, 9, 40, tzinfo=UTC
    )  # 09:35 the day before is not after now - 24 h


def test_last_market_date_is_new_yorks_and_not_greenwichs() -> None:
    one_at_night_in_london = datetime(2025, 1, 5, 1, 0, tzinfo=UTC)
    assert buckets(Timeframe.ALL, one_at_night_in_london, NEW_YORK) == MarketDays(None, date(2025, 1, 4))


def test_new_year_begins_at_midnight_in_new_york() -> None:
    before, after = datetime(2025, 1, 1, 4, 59, 59, tzinfo=UTC), datetime(2025, 1, 1, 5, 0, tzinfo=UTC)
    assert buckets(Timeframe.YEAR_TO_DATE, before, NEW_YORK) == MarketDays(
        date(2024, 1, 1), date(2024, 12, 31)
    )
    assert buckets(Timeframe.YEAR_TO_DATE, after, NEW_YORK) == MarketDays(date(2025, 1, 1), date(2025, 1, 1))


def parsed(text: str) -> dict[str, object]:
    result: dict[str, object] = json.loads(text, parse_float=str)
    return result


def test_profit_is_measured_from_the_first_point_to_the_live_value() -> None:
    found = parsed(answer(Timeframe.ONE_DAY, "", Decimal("120000.00"), Decimal("125000.50"), simulated=False))
    assert found["profit_loss"] == "5000.50"
    assert found["profit_loss_percent"] == "4.17"


@pytest.mark.parametrize(
    ("start", "now", "profit", "percent"),
    [
        ("0.00", "100.00", "100.00", "0.00"),
        ("0.00", "0.00", "0.00", "0.00"),
        ("200.00", "199.99", "-0.01", "-0.01"),  # -0.005 is rounded away from zero
        ("100000.00", "99999.99", "-0.01", "0.00"),  # and no negative zero
        ("5000.00", "5100.00", "100.00", "2.00"),
        ("1400.00", "1500.00", "100.00", "7.14"),
    ],
)
def test_profit_and_percentage_are_rounded_once(start: str, now: str, profit: str, percent: str) -> None:
    found = parsed(answer(Timeframe.ALL, "", Decimal(start), Decimal(now), simulated=False))
    assert (found["profit_loss"], found["profit_loss_percent"]) == (profit, percent)


def test_without_a_first_point_nothing_is_compared() -> None:
    found = parsed(answer(Timeframe.ONE_WEEK, "", None, Decimal("5000.50"), simulated=True))
    assert found == {
        "timeframe": "1W",
        "data_points": [],
        "start_value": None,
        "current_value": "5000.50",
        "profit_loss": None,
        "profit_loss_percent": None,
        "data_available": False,
        "simulated": True,
    }


@pytest.mark.parametrize(
    ("timeframe", "first", "last", "over_at", "number"),
    [
        # Until 2024-01-01 09:37:12: the last bucket that is over by then.
        (Timeframe.ONE_DAY, (2023, 12, 31, 9, 35), (2024, 1, 1, 9, 30), (2024, 1, 1, 9, 35), 288),
        (Timeframe.ONE_WEEK, (2023, 12, 25, 9, 30), (2024, 1, 1, 9, 0), (2024, 1, 1, 9, 30), 336),
        (Timeframe.ONE_MONTH, (2023, 12, 2, 9, 0), (2024, 1, 1, 8, 0), (2024, 1, 1, 9, 0), 720),
        (Timeframe.THREE_MONTHS, (2023, 10, 3, 9, 0), (2024, 1, 1, 6, 0), (2024, 1, 1, 9, 0), 720),
    ],
)
def test_range_until_an_instant_holds_the_buckets_that_are_over(
    timeframe: Timeframe,
    first: tuple[int, int, int, int, int],
    last: tuple[int, int, int, int, int],
    over_at: tuple[int, int, int, int, int],
    number: int,
) -> None:
    found = buckets_until(timeframe, NOW, NEW_YORK)
    assert isinstance(found, Buckets)
    assert (found.first, found.last) == (datetime(*first, tzinfo=UTC), datetime(*last, tzinfo=UTC))
    assert (found.last - found.first) / found.width + 1 == number
    assert end(found, NEW_YORK) == datetime(*over_at, tzinfo=UTC)
    assert buckets_until(timeframe, end(found, NEW_YORK), NEW_YORK) == found  # the same range by its own end


@pytest.mark.parametrize(
    ("until", "first", "last", "over_at"),
    [
        # Midnight in New York is 05:00 UTC in winter, 04:00 in summer.
        ((2025, 1, 1, 4, 59), (2024, 1, 1), (2024, 12, 30), (2024, 12, 31, 5)),
        ((2025, 1, 1, 5, 0), (2024, 1, 1), (2024, 12, 31), (2025, 1, 1, 5)),
        ((2025, 1, 2, 5, 0), (2025, 1, 1), (2025, 1, 1), (2025, 1, 2, 5)),
        ((2026, 3, 9, 3, 59), (2026, 1, 1), (2026, 3, 7), (2026, 3, 8, 5)),  # the 8th has 23 hours
        ((2026, 3, 9, 4, 0), (2026, 1, 1), (2026, 3, 8), (2026, 3, 9, 4)),
        ((2026, 11, 2, 4, 59), (2026, 1, 1), (2026, 10, 31), (2026, 11, 1, 4)),  # the 1st has 25 hours
        ((2026, 11, 2, 5, 0), (2026, 1, 1), (2026, 11, 1), (2026, 11, 2, 5)),
    ],
)
def test_range_of_market_dates_ends_at_a_midnight_in_new_york(
    until: tuple[int, int, int, int, int],
    first: tuple[int, int, int],
    last: tuple[int, int, int],
    over_at: tuple[int, int, int, int],
) -> None:
    at = datetime(*until, tzinfo=UTC)
    this_year = buckets_until(Timeframe.YEAR_TO_DATE, at, NEW_YORK)
    assert this_year == MarketDays(date(*first), date(*last))
    assert buckets_until(Timeframe.ALL, at, NEW_YORK) == MarketDays(None, date(*last))
    assert end(this_year, NEW_YORK) == datetime(*over_at, tzinfo=UTC)


def test_live_window_is_over_with_its_last_bucket() -> None:
    assert end(buckets(Timeframe.ONE_DAY, NOW, NEW_YORK), NEW_YORK) == datetime(2024, 1, 1, 9, 40, tzinfo=UTC)
    assert end(buckets(Timeframe.ALL, NOW, NEW_YORK), NEW_YORK) == datetime(2024, 1, 2, 5, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("points", "value"),
    [
        ("", None),
        ('{"timestamp":"2024-01-01T09:30:00Z","value":7.25}', Decimal("7.25")),
        ('{"timestamp":"a","value":1.00},{"timestamp":"b","value":-2.50,"partial":true}', Decimal("-2.50")),
    ],
)
def test_last_value_is_that_of_the_last_point(points: str, value: Decimal | None) -> None:
    assert last_value(points) == value


def test_range_says_its_end_and_has_no_value_without_a_point() -> None:
    until = datetime(2024, 1, 1, 9, 35, tzinfo=UTC)
    assert answer(Timeframe.ONE_DAY, "", None, None, simulated=False, until=until) == (
        '{"timeframe":"1D","until":"2024-01-01T09:35:00Z","data_points":[],"start_value":null'
        ',"current_value":null,"profit_loss":null,"profit_loss_percent":null'
        ',"data_available":false,"simulated":false}'
    )
