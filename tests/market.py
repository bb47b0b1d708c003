"""Market hours for tests that must not depend on the hour at which they run."""

from datetime import UTC, date, datetime, time, timedelta

from shared.clock import utc_now
from shared.market_calendar import market_date
from shared.market_hours import CLOSE, NEW_YORK, OPEN, MarketHours, Session

_MICROSECOND = timedelta(microseconds=1)
_DAY = timedelta(days=1)


def open_now() -> MarketHours:
    """Return hours by which the market is open, but for the last microsecond of each day in New York."""
    today = market_date(utc_now())
    return MarketHours({day: _whole(day) for day in (today - _DAY, today, today + _DAY)})


def closed_now() -> MarketHours:
    """Return hours by which the market closed two days ago and opens in two days."""
    today = market_date(utc_now())
    days: dict[date, Session | None] = {today + number * _DAY: None for number in (-1, 0, 1)}
    return MarketHours(days | {day: _working_hours(day) for day in (today - 2 * _DAY, today + 2 * _DAY)})


def _working_hours(day: date) -> Session:
    opens_at, closes_at = (datetime.combine(day, at, NEW_YORK).astimezone(UTC) for at in (OPEN, CLOSE))
    return Session(opens_at, closes_at)


def _whole(day: date) -> Session:
    midnight, next_midnight = (
        datetime.combine(of, time(), NEW_YORK).astimezone(UTC) for of in (day, day + _DAY)
    )
    return Session(midnight, next_midnight - _MICROSECOND)
