"""When equities trade: the regular sessions of the New York Stock Exchange. Pure.

The rules are those of the `holidays` package (holidays, early closes, days of mourning and storms). What the venue
publishes goes before them, day by day. Crypto trades always.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

NEW_YORK = ZoneInfo("America/New_York")

OPEN = time(9, 30)
CLOSE = time(16, 0)

SIMULATED = "simulated"
"""The feed of a price that a market simulator made."""
FEEDS_WITHOUT_SESSION = frozenset({SIMULATED, "overnight", "boats"})
"""Feeds of equities that have trades while the exchange is closed; with them a price is as old as it is."""

CLOSING_PRINT_WITHIN = timedelta(minutes=15)
"""So long after the close its auction's trade may be reported."""

_CLOSED_DAYS_MAX = 400
"""Bound of the search for a session; the longest closure there was, in 1914, took four months."""
_EARLY_CLOSE = re.compile(r"markets close at (\d+):(\d\d)([ap])m")
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Session:
    """The regular hours of a trading day, aware and in UTC; it trades from `opens_at` until before `closes_at`."""

    opens_at: datetime
    closes_at: datetime


class MarketHours:
    """The sessions by rule, except on the days that are published: a session each, or None for a closed day.

    A published session lies on its day in New York. Answers take well under a microsecond while one session
    is the last, and some more when the next has begun.
    """

    def __init__(self, published: Mapping[date, Session | None] | None = None) -> None:
        self._published = dict(published or {})
        assert all(is_on_day(session, day) for day, session in self._published.items() if session)
        self._around: tuple[Session, Session] | None = None

    def session_on(self, day: date) -> Session | None:
        """Return the session of a day in New York; None when it has none."""
        if day in self._published:
            return self._published[day]
        hours = regular_hours(day)
        return hours and Session(*(datetime.combine(day, at, NEW_YORK).astimezone(UTC) for at in hours))

    def session_at(self, at: datetime) -> Session | None:
        """Return the session under way; None while the market is closed."""
        last = self.last_session(at)
        return last if at < last.closes_at else None

    def last_session(self, at: datetime) -> Session:
        """Return the latest session that began at or before `at`; it may be under way."""
        return self._sessions_around(at)[0]

    def next_session(self, at: datetime) -> Session:
        """Return the first session that opens after `at`."""
        return self._sessions_around(at)[1]

    def is_in_session(self, at: datetime) -> bool:
        """Tell whether `at` is in a session or is its close, whose prices are the session's last."""
        return at <= self.last_session(at).closes_at

    def is_near_session(self, at: datetime, *, before: timedelta, after: timedelta) -> bool:
        """Tell whether `at` is in a session, less than `after` past its close or at most `before` ahead of an open."""
        last, following = self._sessions_around(at)
        return at < last.closes_at + after or following.opens_at - before <= at

    def sets_price(
        self, traded_at: datetime, priced_at: datetime | None, *, is_closing_print: bool = False
    ) -> bool:
        """Tell whether a session-bound trade may take the place of one of `priced_at` (None: there is no price yet).

        Outside the session it may not once a trade of that last session is there, so that the session's last
        price stays until the next open. A closing auction's trade, reported soon after the close, is of the session.
        """
        last = self.last_session(traded_at)
        ends_at = last.closes_at + CLOSING_PRINT_WITHIN if is_closing_print else last.closes_at
        return traded_at < ends_at or priced_at is None or priced_at < last.opens_at

    def _sessions_around(self, at: datetime) -> tuple[Session, Session]:
        around = self._around
        if around is None or not around[0].opens_at <= at < around[1].opens_at:
            around = self._around = self._search(at)
        return around

    def _search(self, at: datetime) -> tuple[Session, Session]:
        today = at.astimezone(NEW_YORK).date()
        session = self.session_on(today)
        if session and session.opens_at <= at:
            return session, self._nearest(today, _DAY)
        return self._nearest(today, -_DAY), session or self._nearest(today, _DAY)

    def _nearest(self, day: date, step: timedelta) -> Session:
        """Return the first session before or after a day."""
        for _ in range(_CLOSED_DAYS_MAX):
            day += step
            if session := self.session_on(day):
                return session
        raise AssertionError(f"no session within {_CLOSED_DAYS_MAX} days of {day}")


def is_session_bound(symbol: str, feed: str) -> bool:
    """Tell whether a price changes during regular sessions only: an equity's, unless its feed has other hours."""
    return "/" not in symbol and feed not in FEEDS_WITHOUT_SESSION


def is_on_day(session: Session, day: date) -> bool:
    """Tell whether a session lies on a day in New York, and opens before it closes."""
    local_days = {at.astimezone(NEW_YORK).date() for at in (session.opens_at, session.closes_at)}
    return local_days == {day} and session.opens_at < session.closes_at


def regular_hours(day: date) -> tuple[time, time] | None:
    """Return when the exchange opens and closes by rule, in New York; None at weekends and on holidays."""
    closed, early = _special_days(day.year)
    if day.weekday() >= 5 or day in closed:
        return None
    return OPEN, early.get(day, CLOSE)


@lru_cache(maxsize=256)
def _special_days(year: int) -> tuple[frozenset[date], dict[date, time]]:
    """Return the days of a year without a session, and the early closes by day."""
    import holidays  # noqa: PLC0415  0.2 s and 20 MB, for those who ask only

    closed = holidays.financial_holidays("NYSE", years=year)
    early = holidays.financial_holidays("NYSE", years=year, categories=("half_day",))
    return frozenset(closed), {day: _early_close(name) for day, name in early.items()}


def _early_close(name: str) -> time:
    match = _EARLY_CLOSE.search(name)
    assert match is not None, f"the half day {name!r} tells no time"
    hour, minute, half = int(match[1]), int(match[2]), match[3]
    return time(hour % 12 + (12 if half == "p" else 0), minute)
