"""Alpaca's calendar of sessions, from the trading host into the table `market_days`.

It knows what no rule does: an early close or a day of mourning that was decided last week.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from time import monotonic
from typing import Protocol, Self
from urllib.parse import urlsplit

from alpaca.trading.client import TradingClient
from alpaca.trading.requests import GetCalendarRequest

from services.price_feeder import metrics
from services.price_feeder.budget import RateBudget
from services.price_feeder.failures import MarketDataError, MarketDataUnavailable, Unsent
from services.price_feeder.transport import DaemonThreads, Door, Pause
from shared import clock, logs
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.market_calendar import market_date, store_days
from shared.market_hours import NEW_YORK, MarketHours, Session, is_on_day

DAYS_BACK, DAYS_AHEAD = 14, 60
REFRESH_SECONDS = 4 * 3600.0
RETRY_SECONDS = 300.0
LOOK_SECONDS = 5.0
"""How soon a feeder that got the lease asks."""
REQUESTS_PER_MINUTE = 10
REQUEST_SECONDS_MAX = 5.0
ANSWER_SECONDS_MAX = 15.0
"""Bound of what the request's own deadline leaves open: resolving the host's name."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DAY = timedelta(days=1)

log = logs.get_logger()


class CalendarSource(Protocol):
    """Where sessions are published."""

    async def days(self, first: date, last: date) -> dict[date, Session | None]:
        """Return every day from one to another, both inclusive, with its session; raises MarketDataError."""
        ...


class AlpacaCalendar:
    """The calendar of Alpaca's trading host, asked in a thread of its own. Use as an async context manager."""

    def __init__(
        self, *, api_key: str, secret_key: str, url: str, request_seconds_max: float = REQUEST_SECONDS_MAX
    ) -> None:
        self._thread = DaemonThreads(1, name="alpaca-calendar")
        self._door = Door(
            RateBudget(REQUESTS_PER_MINUTE),
            Pause(),
            connections_max=1,
            request_seconds_max=request_seconds_max,
        )
        self._client = TradingClient(api_key, secret_key, raw_data=True, url_override=url)
        self._client._retry = 0  # its own retries sleep in the thread and ignore Retry-After
        self._client._session.trust_env = urlsplit(url).hostname not in _LOOPBACK  # no proxy leads there
        for scheme in ("http://", "https://"):
            self._client._session.mount(scheme, self._door)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._thread.shutdown()  # not waited for: a request that hangs ends by its own deadline
        self._client._session.close()

    async def days(self, first: date, last: date) -> dict[date, Session | None]:
        """Return every day from one to another, both inclusive; raises MarketDataError."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                raw = await asyncio.get_running_loop().run_in_executor(self._thread, self._fetch, first, last)
        except TimeoutError as error:
            raise MarketDataUnavailable(f"no answer within {ANSWER_SECONDS_MAX:g} s") from error
        except Unsent as error:
            raise error.pause or MarketDataUnavailable(str(error)) from error
        return days_of(raw, first, last)

    def _fetch(self, first: date, last: date) -> object:
        self._door.expect_one_request()
        try:
            return self._client.get_calendar(GetCalendarRequest(start=first, end=last))
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise MarketDataUnavailable("answered with something that is not a calendar") from error


def days_of(raw: object, first: date, last: date) -> dict[date, Session | None]:
    """Read Alpaca's answer: the days with a session, whose times are New York's and name no zone.

    A day that it leaves out is closed; so an answer without most of the working days is none, and raises
    MarketDataUnavailable as one that cannot be read does.
    """
    if not isinstance(raw, list):
        raise MarketDataUnavailable("answered with something that is not a calendar")
    days = _each_day(first, last)
    for entry in raw:
        try:
            day = date.fromisoformat(entry["date"])
            opens_at, closes_at = (
                datetime.combine(day, time.fromisoformat(entry[name]), NEW_YORK).astimezone(UTC)
                for name in ("open", "close")
            )
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise MarketDataUnavailable("answered with a calendar that cannot be read") from error
        session = Session(opens_at, closes_at)
        if not is_on_day(session, day):
            raise MarketDataUnavailable(f"answered with a session of {day} that ends before it begins")
        if day in days:
            days[day] = session
    working_days = sum(day.weekday() < 5 for day in days)
    sessions = sum(session is not None for session in days.values())
    if sessions * 2 < working_days:
        raise MarketDataUnavailable(f"answered with {sessions} sessions on {working_days} working days")
    return days


def _each_day(first: date, last: date) -> dict[date, Session | None]:
    return {first + number * _DAY: None for number in range((last - first).days + 1)}


async def run(
    database: Database,
    calendar_source: CalendarSource,
    is_leading: Callable[[], bool],
    stop: asyncio.Event,
    *,
    refresh_seconds: float = REFRESH_SECONDS,
    retry_seconds: float = RETRY_SECONDS,
    look_seconds: float = LOOK_SECONDS,
) -> None:
    """Keep the table up to date while this feeder leads, until `stop` is set; without Alpaca the rules hold.

    Two feeders that both think so write the same.
    """
    due_at = monotonic()
    problem = ""
    while not stop.is_set():
        if is_leading() and monotonic() >= due_at:
            said = await _refresh(database, calendar_source, clock.utc_now())
            if said and said != problem:
                log.warning(
                    "market_calendar_not_stored",
                    reason=said,
                    retry_seconds=retry_seconds,
                    advice="the exchange's rules hold meanwhile; see ALPACA_BASE_URL and the key",
                )
            problem = said
            due_at = monotonic() + (retry_seconds if said else refresh_seconds)
        await clock.wait_for_stop(stop, look_seconds)


async def _refresh(database: Database, calendar_source: CalendarSource, now: datetime) -> str:
    """Ask and store once; return why that was not possible, or nothing."""
    today = market_date(now)
    try:
        days = await calendar_source.days(today - DAYS_BACK * _DAY, today + DAYS_AHEAD * _DAY)
        changed = await store_days(database, days)
    except (MarketDataError, DatabaseUnavailable, SchemaMissing) as error:
        return str(error)
    metrics.CALENDAR_STORED.set(now.timestamp())
    rules = MarketHours()
    unlike_the_rules = [day.isoformat() for day, session in days.items() if session != rules.session_on(day)]
    log.info(
        "market_calendar_stored", **_counts(days), changed=len(changed), unlike_the_rules=unlike_the_rules
    )
    return ""


def _counts(days: Mapping[date, Session | None]) -> dict[str, int]:
    return {"days": len(days), "sessions": sum(session is not None for session in days.values())}
