"""The calendar of the New York Stock Exchange, against dates that are known."""

from datetime import UTC, date, datetime, time, timedelta

import pytest

from services.market_simulator.instants import ns_of
from services.market_simulator.sessions import session, sessions, settlement_day
from services.market_simulator.wire import calendar_days, market_clock


@pytest.mark.parametrize(
    "day",
    [
        "2026-11-26",  # Thanksgiving
        "2026-07-03",  # Independence Day, observed
        "2026-04-03",  # Good Friday
        "2025-01-09",  # mourning for Jimmy Carter
        "2018-12-05",  # mourning for George H. W. Bush
        "2012-10-29",  # Hurricane Sandy
        "2001-09-11",
        "2022-06-20",  # Juneteenth, observed
        "2026-11-22",  # a Sunday
    ],
)
def test_there_is_no_session_on(day: str) -> None:
    assert session(date.fromisoformat(day)) is None


@pytest.mark.parametrize("day", ["2013-11-29", "2026-11-27", "2026-12-24", "2024-07-03", "2018-12-24"])
def test_the_session_closes_at_one_on(day: str) -> None:
    found = session(date.fromisoformat(day))
    assert found is not None
    assert (found.open, found.close) == (time(9, 30), time(13, 0))


@pytest.mark.parametrize("day", ["2013-10-11", "2026-07-02", "2021-12-31", "2021-06-18", "2026-11-30"])
def test_the_session_is_whole_on(day: str) -> None:
    found = session(date.fromisoformat(day))
    assert found is not None
    assert (found.open, found.close) == (time(9, 30), time(16, 0))


def test_a_year_has_as_many_sessions_as_the_exchange_published() -> None:
    counts = [len(list(sessions(date(year, 1, 1), date(year, 12, 31)))) for year in (2012, 2013, 2024, 2025)]
    assert counts == [250, 252, 252, 250]


def test_trades_settle_after_fewer_days_than_before() -> None:
    assert settlement_day(date(2025, 1, 2)) == date(2025, 1, 3)  # one day; Alpaca's own example
    assert settlement_day(date(2024, 5, 24)) == date(2024, 5, 29)  # two, over Memorial Day
    assert settlement_day(date(2013, 10, 11)) == date(2013, 10, 16)  # three


@pytest.mark.parametrize(
    ("now", "is_open", "next_open", "next_close"),
    [
        ("2013-10-11T13:29:59Z", False, "2013-10-11T09:30:00-04:00", "2013-10-11T16:00:00-04:00"),
        ("2013-10-11T13:30:00Z", True, "2013-10-14T09:30:00-04:00", "2013-10-11T16:00:00-04:00"),
        ("2013-10-11T19:59:59Z", True, "2013-10-14T09:30:00-04:00", "2013-10-11T16:00:00-04:00"),
        ("2013-10-11T20:00:00Z", False, "2013-10-14T09:30:00-04:00", "2013-10-14T16:00:00-04:00"),
        ("2026-11-25T23:00:00Z", False, "2026-11-27T09:30:00-05:00", "2026-11-27T13:00:00-05:00"),
        ("2026-11-28T02:00:00Z", False, "2026-11-30T09:30:00-05:00", "2026-11-30T16:00:00-05:00"),
    ],
)
def test_the_clock_tells_the_next_open_and_close(
    now: str, is_open: bool, next_open: str, next_close: str
) -> None:
    at = datetime.fromisoformat(now)
    told = market_clock(ns_of(at), at)
    assert (told["is_open"], told["next_open"], told["next_close"]) == (is_open, next_open, next_close)
    assert datetime.fromisoformat(told["timestamp"]) == at


def test_the_clock_writes_the_time_of_new_york_to_the_nanosecond() -> None:
    at = datetime(2025, 6, 24, 18, 15, 22, tzinfo=UTC)
    assert market_clock(ns_of(at) + 5, at)["timestamp"] == "2025-06-24T14:15:22.000000005-04:00"


def test_an_early_close_ends_the_late_session_early() -> None:
    day, after = date(2026, 11, 27), date(2026, 11, 30)
    assert calendar_days(list(sessions(day, day + timedelta(days=2)))) == [
        {
            "date": "2026-11-27",
            "open": "09:30",
            "close": "13:00",
            "session_open": "0400",
            "session_close": "1700",
            "settlement_date": after.isoformat(),
        }
    ]
