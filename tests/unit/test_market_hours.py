"""The sessions of equities, against instants that are worked by hand: 9:30 in New York is 14:30 or 13:30 UTC."""

import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.market_hours import (
    NEW_YORK,
    MarketHours,
    Session,
    is_on_day,
    is_session_bound,
    regular_hours,
)

MICROSECOND = timedelta(microseconds=1)


def instant(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}Z")


def session(opens_at: str, closes_at: str) -> Session:
    return Session(instant(opens_at), instant(closes_at))


@pytest.mark.parametrize(
    ("day", "opens_at", "closes_at"),
    [
        ("2026-11-27", "2026-11-27T14:30", "2026-11-27T18:00"),  # after Thanksgiving: 13:00
        ("2026-12-24", "2026-12-24T14:30", "2026-12-24T18:00"),  # Christmas Eve: 13:00
        ("2024-07-03", "2024-07-03T13:30", "2024-07-03T17:00"),  # in summer time
        ("2026-03-06", "2026-03-06T14:30", "2026-03-06T21:00"),  # the Friday before the clocks go forward
        ("2026-03-09", "2026-03-09T13:30", "2026-03-09T20:00"),  # the Monday after
        ("2026-10-30", "2026-10-30T13:30", "2026-10-30T20:00"),  # the Friday before they go back
        ("2026-11-02", "2026-11-02T14:30", "2026-11-02T21:00"),  # the Monday after
        ("2026-12-31", "2026-12-31T14:30", "2026-12-31T21:00"),  # New Year's Eve is a whole day
    ],
)
def test_session_in_utc(day: str, opens_at: str, closes_at: str) -> None:
    assert MarketHours().session_on(date.fromisoformat(day)) == session(opens_at, closes_at)


@pytest.mark.parametrize(
    "day",
    [
        "2025-01-09",  # mourning for Jimmy Carter
        "2026-06-19",  # Juneteenth
        "2026-04-03",  # Good Friday
        "2026-11-26",  # Thanksgiving
        "2026-12-25",
        "2027-01-01",
        "2026-07-03",  # Independence Day, observed
        "2026-11-28",  # a Saturday
        "2026-11-29",  # a Sunday
    ],
)
def test_there_is_no_session_on(day: str) -> None:
    assert MarketHours().session_on(date.fromisoformat(day)) is None


def test_new_year_on_a_saturday_is_not_observed_on_the_friday_before() -> None:
    assert regular_hours(date(2021, 12, 31)) == (time(9, 30), time(16, 0))


@pytest.mark.parametrize(
    ("at", "is_open", "last_close", "next_open"),
    [
        ("2026-11-25T20:59:59", True, "2026-11-25T21:00", "2026-11-27T14:30"),  # over Thanksgiving
        ("2026-11-26T17:00", False, "2026-11-25T21:00", "2026-11-27T14:30"),
        ("2026-11-27T14:29:59", False, "2026-11-25T21:00", "2026-11-27T14:30"),
        ("2026-11-27T14:30", True, "2026-11-27T18:00", "2026-11-30T14:30"),
        ("2026-11-27T17:59:59", True, "2026-11-27T18:00", "2026-11-30T14:30"),
        ("2026-11-27T18:00", False, "2026-11-27T18:00", "2026-11-30T14:30"),
        ("2026-12-24T18:00", False, "2026-12-24T18:00", "2026-12-28T14:30"),  # Christmas, then a weekend
        ("2026-12-31T21:00", False, "2026-12-31T21:00", "2027-01-04T14:30"),  # the year ends on a Thursday
        ("2026-03-08T12:00", False, "2026-03-06T21:00", "2026-03-09T13:30"),  # the clocks went forward
        ("2026-11-01T12:00", False, "2026-10-30T20:00", "2026-11-02T14:30"),  # the clocks went back
        ("2026-03-09T13:30", True, "2026-03-09T20:00", "2026-03-10T13:30"),
        ("2026-11-03T01:30", False, "2026-11-02T21:00", "2026-11-03T14:30"),  # New York is a day behind
    ],
)
def test_market_at(at: str, is_open: bool, last_close: str, next_open: str) -> None:
    hours = MarketHours()
    last = hours.last_session(instant(at))
    assert last.closes_at == instant(last_close)
    assert hours.next_session(instant(at)).opens_at == instant(next_open)
    assert hours.session_at(instant(at)) == (last if is_open else None)


def test_what_the_venue_publishes_goes_before_the_rules() -> None:
    early = session("2026-12-02T14:30", "2026-12-02T16:00")
    extra = session("2026-12-05T15:00", "2026-12-05T17:00")  # a Saturday
    hours = MarketHours({date(2026, 12, 1): None, date(2026, 12, 2): early, date(2026, 12, 5): extra})
    assert hours.last_session(instant("2026-12-01T18:00")) == session("2026-11-30T14:30", "2026-11-30T21:00")
    assert hours.next_session(instant("2026-12-01T18:00")) == early
    assert hours.session_at(instant("2026-12-02T16:00")) is None
    assert hours.session_at(instant("2026-12-05T16:00")) == extra
    assert hours.session_at(instant("2026-12-07T15:00")) == session("2026-12-07T14:30", "2026-12-07T21:00")


def test_a_published_holiday_of_months_is_searched_through() -> None:
    days = {date(2026, 1, 1) + timedelta(days=number): None for number in range(120)}  # until 30 April
    hours = MarketHours(days)
    assert hours.last_session(instant("2026-03-01T00:00")) == session("2025-12-31T14:30", "2025-12-31T21:00")
    assert hours.next_session(instant("2026-03-01T00:00")) == session("2026-05-01T13:30", "2026-05-01T20:00")


def test_a_session_belongs_to_its_day_in_new_york() -> None:
    assert is_on_day(session("2026-12-02T14:30", "2026-12-02T21:00"), date(2026, 12, 2))
    assert is_on_day(session("2026-12-02T05:00", "2026-12-03T04:59"), date(2026, 12, 2))
    assert not is_on_day(session("2026-12-02T14:30", "2026-12-02T21:00"), date(2026, 12, 3))
    assert not is_on_day(session("2026-12-02T14:30", "2026-12-03T05:00"), date(2026, 12, 2))
    assert not is_on_day(session("2026-12-02T21:00", "2026-12-02T14:30"), date(2026, 12, 2))


@pytest.mark.parametrize(
    ("at", "is_in"),
    [
        ("2026-11-27T14:29:59", False),
        ("2026-11-27T14:30", True),
        ("2026-11-27T18:00", True),  # trading is over, and this instant's prices are the session's last
        ("2026-11-27T18:00:01", False),
        ("2026-11-28T16:00", False),
    ],
)
def test_a_session_includes_its_close(at: str, is_in: bool) -> None:
    assert MarketHours().is_in_session(instant(at)) is is_in


@pytest.mark.parametrize(
    ("at", "is_near"),
    [
        ("2026-11-27T14:24:59", False),
        ("2026-11-27T14:25", True),
        ("2026-11-27T16:00", True),
        ("2026-11-27T18:14:59", True),
        ("2026-11-27T18:15", False),
        ("2026-11-28T16:00", False),
    ],
)
def test_near_a_session_is_some_minutes_around_it(at: str, is_near: bool) -> None:
    before, after = timedelta(minutes=5), timedelta(minutes=15)
    assert MarketHours().is_near_session(instant(at), before=before, after=after) is is_near


@pytest.mark.parametrize(
    ("traded_at", "priced_at", "may"),
    [
        ("2026-11-27T17:59:59", "2026-11-27T17:59:58", True),
        ("2026-11-27T18:00", "2026-11-27T17:59:59", False),  # after the close, and the session has its price
        ("2026-11-28T00:59", "2026-11-27T14:30", False),
        ("2026-11-28T00:59", "2026-11-25T20:59", True),  # no trade in that session yet
        ("2026-11-28T00:59", None, True),
        ("2026-11-30T13:00", "2026-11-27T15:00", False),  # before the open
        ("2026-11-30T14:30", "2026-11-27T15:00", True),
    ],
)
def test_trade_outside_the_session_does_not_replace_the_sessions_price(
    traded_at: str, priced_at: str | None, may: bool
) -> None:
    assert MarketHours().sets_price(instant(traded_at), instant(priced_at) if priced_at else None) is may


@pytest.mark.parametrize(
    ("traded_at", "may"),
    [
        ("2026-11-27T17:59:59", True),
        ("2026-11-27T18:00", True),
        ("2026-11-27T18:00:07", True),
        ("2026-11-27T18:14:59", True),
        ("2026-11-27T18:15", False),
        ("2026-11-30T13:00", False),
    ],
)
def test_closing_print_soon_after_the_close_is_of_the_session(traded_at: str, may: bool) -> None:
    priced_at = instant("2026-11-27T17:59:58")
    assert MarketHours().sets_price(instant(traded_at), priced_at, is_closing_print=True) is may


def test_crypto_and_feeds_with_hours_of_their_own_are_not_bound_to_the_session() -> None:
    bound = [
        (symbol, feed)
        for symbol in ("AAPL", "BRK.B", "BTC/USD")
        for feed in ("iex", "sip", "us", "simulated", "overnight", "boats")
        if is_session_bound(symbol, feed)
    ]
    assert bound == [
        ("AAPL", "iex"),
        ("AAPL", "sip"),
        ("AAPL", "us"),
        ("BRK.B", "iex"),
        ("BRK.B", "sip"),
        ("BRK.B", "us"),
    ]


def test_rules_are_loaded_when_they_are_first_asked_for() -> None:
    program = """
import sys
from datetime import UTC, datetime
from shared.market_hours import MarketHours
hours = MarketHours()
assert "holidays" not in sys.modules
hours.session_at(datetime(2026, 11, 27, tzinfo=UTC))
assert "holidays" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


instants = st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
published = st.dictionaries(
    st.dates(date(2026, 10, 1), date(2026, 12, 31)),
    st.one_of(
        st.none(),
        st.tuples(st.integers(0, 1438), st.integers(1, 1439)).filter(lambda pair: pair[0] < pair[1]),
    ),
    max_size=30,
)


@given(instants)
def test_sessions_lie_around_every_instant(at: datetime) -> None:
    check_around(MarketHours(), at)


@given(published, st.lists(st.integers(0, 96 * 24 * 60), min_size=1, max_size=10))
def test_sessions_lie_around_every_instant_whatever_is_published(
    minutes: dict[date, tuple[int, int] | None], later: list[int]
) -> None:
    hours = MarketHours({day: pair and on_day(day, *pair) for day, pair in minutes.items()})
    for number in later:  # one object is asked for all, so that what it remembers is tested too
        check_around(hours, instant("2026-10-01T00:00") + timedelta(minutes=number))


@given(instants)
def test_remembered_sessions_are_those_of_a_fresh_search(at: datetime) -> None:
    hours = MarketHours()
    hours.last_session(at + timedelta(days=2))
    hours.last_session(at - timedelta(days=2))
    assert hours.last_session(at) == MarketHours().last_session(at)
    assert hours.next_session(at) == MarketHours().next_session(at)


@given(st.dates(date(1990, 1, 1), date(2090, 1, 1)))
def test_a_session_lies_on_its_day_and_opens_at_half_past_nine(day: date) -> None:
    found = MarketHours().session_on(day)
    if found:
        assert is_on_day(found, day)
        assert found.opens_at.astimezone(NEW_YORK).time() == time(9, 30)


def check_around(hours: MarketHours, at: datetime) -> None:
    last, following = hours.last_session(at), hours.next_session(at)
    assert last.opens_at <= at < following.opens_at
    assert last.opens_at < last.closes_at <= following.opens_at < following.closes_at
    assert hours.session_at(at) == (last if at < last.closes_at else None)
    assert hours.next_session(last.opens_at) == following
    assert hours.next_session(last.opens_at - MICROSECOND) == last
    assert hours.last_session(following.opens_at) == following
    assert hours.last_session(following.opens_at - MICROSECOND) == last


def on_day(day: date, opens: int, closes: int) -> Session:
    """Return a session from one minute of the day to another; when the clocks go back the day has minutes left over."""
    midnight = datetime.combine(day, time(), NEW_YORK).astimezone(UTC)
    return Session(midnight + timedelta(minutes=opens), midnight + timedelta(minutes=closes))
