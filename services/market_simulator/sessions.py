"""Sessions of the New York Stock Exchange: holidays, early closes, settlement. Pure.

The rules are those of the `holidays` package, days of mourning and storms included.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import holidays

from services.market_simulator.instants import ns_of

NEW_YORK = ZoneInfo("America/New_York")

_OPEN = time(9, 30)
_CLOSE = time(16, 0)
_EARLY_CLOSE = re.compile(r"markets close at (\d+):(\d\d)([ap])m")
_SETTLEMENT_DAYS = ((date(2024, 5, 28), 1), (date(2017, 9, 5), 2), (date(1995, 6, 7), 3), (date.min, 5))
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Session:
    """A trading day and its regular hours in New York."""

    day: date
    open: time
    close: time

    @property
    def open_ns(self) -> int:
        return ns_of(datetime.combine(self.day, self.open, NEW_YORK))

    @property
    def close_ns(self) -> int:
        return ns_of(datetime.combine(self.day, self.close, NEW_YORK))


def session(day: date) -> Session | None:
    """Return the session of a day; None at weekends and on holidays."""
    closed, early = _special_days(day.year)
    if day.weekday() >= 5 or day in closed:
        return None
    return Session(day, _OPEN, early.get(day, _CLOSE))


def sessions(first: date, last: date) -> Iterator[Session]:
    """Yield the sessions from a day to another, both inclusive."""
    day = first
    while day <= last:
        if found := session(day):
            yield found
        day += _DAY


def next_session(day: date) -> Session:
    """Return the first session after a day."""
    while True:
        day += _DAY
        if found := session(day):
            return found


def settlement_day(trading_day: date) -> date:
    """Return the day on which trades of a day settle: one trading day later since May 2024, before that more."""
    count = next(days for since, days in _SETTLEMENT_DAYS if trading_day >= since)
    day = trading_day
    for _ in range(count):
        day = next_session(day).day
    return day


@lru_cache(maxsize=256)
def _special_days(year: int) -> tuple[frozenset[date], dict[date, time]]:
    """Return the days of a year without a session, and the early closes by day."""
    closed = holidays.financial_holidays("NYSE", years=year)
    early = holidays.financial_holidays("NYSE", years=year, categories=("half_day",))
    return frozenset(closed), {day: _early_close(name) for day, name in early.items()}


def _early_close(name: str) -> time:
    match = _EARLY_CLOSE.search(name)
    assert match is not None, f"the half day {name!r} tells no time"
    hour, minute, half = int(match[1]), int(match[2]), match[3]
    return time(hour % 12 + (12 if half == "p" else 0), minute)
