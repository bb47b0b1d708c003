"""Trading days as the trading host shows them: local hours, settlement. Pure; the rules are `shared.market_hours`."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta

from services.market_simulator.instants import ns_of
from shared.market_hours import NEW_YORK, regular_hours

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
    hours = regular_hours(day)
    return hours and Session(day, *hours)


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
