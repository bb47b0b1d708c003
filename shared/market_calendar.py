"""The market hours of a running service: the rules, and the table `market_days` that goes before them."""

import asyncio
from collections.abc import Mapping
from datetime import date, datetime, timedelta

from shared import clock, logs
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.market_hours import NEW_YORK, MarketHours, Session, is_on_day

READ_SECONDS = 300.0
RETRY_SECONDS = 15.0
READ_SINCE = timedelta(days=30)
"""Older days are not asked about, so that what is read stays small."""

PUBLISHED_DAYS = """
SELECT day, opens_at, closes_at
FROM market_days
WHERE day >= $1
ORDER BY day
"""

# A row that says the same already is left alone.
STORE_DAYS = """
INSERT INTO market_days (day, opens_at, closes_at)
SELECT day, opens_at, closes_at
FROM unnest($1::date[], $2::timestamptz[], $3::timestamptz[]) AS published (day, opens_at, closes_at)
ON CONFLICT (day) DO UPDATE SET opens_at = EXCLUDED.opens_at, closes_at = EXCLUDED.closes_at
WHERE (market_days.opens_at, market_days.closes_at) IS DISTINCT FROM (EXCLUDED.opens_at, EXCLUDED.closes_at)
RETURNING day
"""

log = logs.get_logger()


class Calendar:
    """Holds the current `hours`, which can be asked at any time: at first they are the rules alone.

    Making one loads the rules, 0.2 s: do so before the service has work that must not wait.
    """

    def __init__(self, hours: MarketHours | None = None) -> None:
        self.hours = hours or MarketHours()
        self._published: dict[date, Session | None] | None = None
        self._problem: str | None = None
        self.hours.last_session(clock.utc_now())

    async def keep(self, database: Database, stop: asyncio.Event) -> None:
        """Read the table every five minutes until `stop` is set; without a database what was read last stays."""
        while not stop.is_set():
            is_read = await self.read(database, clock.utc_now())
            await clock.wait_for_stop(stop, READ_SECONDS if is_read else RETRY_SECONDS)

    async def read(self, database: Database, now: datetime) -> bool:
        """Read the table once; tell whether that was possible."""
        try:
            published = await published_days(database, (now - READ_SINCE).date())
        except (DatabaseUnavailable, SchemaMissing) as error:
            if self._problem is None:
                log.warning(
                    "market_days_not_read",
                    advice="the exchange's rules hold meanwhile; see /readyz and PostgreSQL",
                    reason=str(error),
                    retry_seconds=RETRY_SECONDS,
                )
            self._problem = str(error)
            return False
        self._problem = None
        if published != self._published:
            self._published = published
            self.hours = MarketHours(
                {day: session for day, session in published.items() if _fits(day, session)}
            )
            self.hours.last_session(now)
            log.info(
                "market_days_read",
                days=len(published),
                unfit=[day.isoformat() for day, session in published.items() if not _fits(day, session)],
            )
        return True


async def published_days(database: Database, since: date) -> dict[date, Session | None]:
    """Return what the venue publishes of each day from `since` on: its session, or None for a closed day."""
    rows = await database.fetch(PUBLISHED_DAYS, since)
    return {
        row["day"]: None if row["opens_at"] is None else Session(row["opens_at"], row["closes_at"])
        for row in rows
    }


async def store_days(database: Database, days: Mapping[date, Session | None]) -> list[date]:
    """Store what the venue publishes of these days; return those of which something else was known, or nothing."""
    rows = await database.fetch(
        STORE_DAYS,
        list(days),
        [session and session.opens_at for session in days.values()],
        [session and session.closes_at for session in days.values()],
    )
    return sorted(row["day"] for row in rows)


def market_date(at: datetime) -> date:
    """Return the date in New York."""
    return at.astimezone(NEW_YORK).date()


def _fits(day: date, session: Session | None) -> bool:
    return session is None or is_on_day(session, day)
