"""The table `market_days`: written from Alpaca's calendar, read by every service that asks for market hours."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, time, timedelta

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from services.price_feeder import calendar
from services.price_feeder.calendar import AlpacaCalendar, CalendarSource, days_of
from services.price_feeder.failures import MarketDataError, MarketDataUnavailable, RateLimited, Unauthorized
from shared import database as databases
from shared.clock import utc_now
from shared.database import Database
from shared.market_calendar import Calendar, market_date, published_days, store_days
from shared.market_hours import NEW_YORK, Session
from tests.integration.simulated_market import simulated_market
from tests.waiting import eventually

THURSDAY, FRIDAY, SATURDAY = date(2026, 11, 26), date(2026, 11, 27), date(2026, 11, 28)
HALF_DAY = Session(datetime(2026, 11, 27, 14, 30, tzinfo=UTC), datetime(2026, 11, 27, 18, tzinfo=UTC))
CLOSES_AFTER_TIME_ENDS = '[{"date":"9999-12-31","open":"09:30","close":"23:00"}]'
NOWHERE = "postgresql://nobody:nothing@127.0.0.1:1/none"


# ---- what Alpaca says ----------------------------------------------------------------------------


async def test_alpacas_calendar_is_read_through_its_own_client() -> None:
    async with (
        simulated_market() as market,
        AlpacaCalendar(api_key="key", secret_key="secret", url=market.url) as source,
    ):
        found = await source.days(date(2026, 11, 23), date(2026, 11, 29))
        summer = await source.days(date(2026, 10, 30), date(2026, 11, 2))
    assert list(found) == [date(2026, 11, day) for day in range(23, 30)]
    assert (found[THURSDAY], found[FRIDAY], found[SATURDAY]) == (None, HALF_DAY, None)
    assert sum(session is not None for session in found.values()) == 4
    opens = {day: session.opens_at.hour for day, session in summer.items() if session}
    assert opens == {date(2026, 10, 30): 13, date(2026, 11, 2): 14}  # the clocks went back in between


@asynccontextmanager
async def answering(answer: Callable[[], web.StreamResponse]) -> AsyncIterator[str]:
    """A trading host that always answers so; yields its URL."""

    async def respond(_: web.Request) -> web.StreamResponse:
        return answer()

    app = web.Application()
    app.add_routes([web.get("/v2/calendar", respond)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "headers", "error"),
    [
        (200, "<html>", {}, MarketDataUnavailable),
        (200, "", {}, MarketDataUnavailable),
        (200, "{}", {}, MarketDataUnavailable),
        (200, "[]", {}, MarketDataUnavailable),
        (200, "[1]", {}, MarketDataUnavailable),
        (200, CLOSES_AFTER_TIME_ENDS, {}, MarketDataUnavailable),
        (401, "{}", {}, Unauthorized),
        (429, "{}", {"Retry-After": "7"}, RateLimited),
        (500, "{}", {}, MarketDataUnavailable),
    ],
)
async def test_what_is_no_calendar_is_refused(
    status: int, body: str, headers: dict[str, str], error: type[MarketDataError]
) -> None:
    asked = 0

    def answer() -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=status, text=body, headers=headers)

    async with (
        answering(answer) as url,
        AlpacaCalendar(api_key="key", secret_key="secret", url=url) as source,
    ):
        with pytest.raises(error):
            await source.days(THURSDAY, SATURDAY)
    assert asked == 1  # not tried again by itself


async def test_mute_trading_host_is_given_up_in_time() -> None:
    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stopped.wait()
        writer.close()

    stopped = asyncio.Event()
    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with (
        server,
        AlpacaCalendar(api_key="key", secret_key="secret", url=url, request_seconds_max=0.2) as source,
    ):
        with pytest.raises(MarketDataUnavailable, match=r"no complete answer within 0\.2 s"):
            await source.days(THURSDAY, SATURDAY)
        stopped.set()


def entry(day: str, opens: str = "09:30", closes: str = "16:00") -> dict[str, str]:
    return {"date": day, "open": opens, "close": closes}


def test_days_that_are_left_out_are_closed_and_others_are_not_taken() -> None:
    raw = [entry("2026-11-25"), entry("2026-11-27", closes="13:00"), entry("2026-11-30")]
    assert days_of(raw, THURSDAY, SATURDAY) == {THURSDAY: None, FRIDAY: HALF_DAY, SATURDAY: None}


@pytest.mark.parametrize(
    "raw",
    [
        [entry("2026-11-27", closes="09:30")],
        [entry("2026-11-27", closes="4 pm")],
        [entry("2026-11-31")],
        [{"date": "2026-11-27"}],
        [None],
        None,
        {"message": "no"},
        [entry("2026-11-24")],  # three working days and no session: not a calendar of these days
    ],
)
def test_calendar_that_cannot_be_true_is_refused(raw: object) -> None:
    with pytest.raises(MarketDataUnavailable):
        days_of(raw, date(2026, 11, 25), SATURDAY)


# ---- into the table ------------------------------------------------------------------------------


async def test_days_are_stored_once_and_changed_when_the_venue_changes_them(database: Database) -> None:
    days = {THURSDAY: None, FRIDAY: HALF_DAY}
    assert await store_days(database, days) == [THURSDAY, FRIDAY]
    assert await store_days(database, days) == []
    assert await store_days(database, {FRIDAY: None, SATURDAY: None}) == [FRIDAY, SATURDAY]
    assert await published_days(database, FRIDAY) == {FRIDAY: None, SATURDAY: None}
    assert await published_days(database, THURSDAY) == {THURSDAY: None, FRIDAY: None, SATURDAY: None}


class Published:
    """A source that answers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[date, date]] = []
        self.problem: MarketDataError | None = None

    async def days(self, first: date, last: date) -> dict[date, Session | None]:
        self.asked.append((first, last))
        if self.problem:
            raise self.problem
        return {first: None, last: None}

    async def is_asked(self, times: int) -> bool:
        return len(self.asked) >= times


@asynccontextmanager
async def keeping(
    database: Database, source: CalendarSource, is_leading: Callable[[], bool], *, seconds: float
) -> AsyncIterator[None]:
    stop = asyncio.Event()
    running = asyncio.create_task(
        calendar.run(
            database,
            source,
            is_leading,
            stop,
            refresh_seconds=seconds,
            retry_seconds=0.05,
            look_seconds=0.01,
        )
    )
    try:
        yield
    finally:
        stop.set()
        await running


async def test_the_leading_feeder_alone_keeps_the_table(database: Database) -> None:
    source, leading = Published(), False
    today = market_date(utc_now())
    async with keeping(database, source, lambda: leading, seconds=3600):
        asked_of_nobody = list(source.asked)
        leading = True

        async def is_stored() -> bool:
            return len(await published_days(database, date(2000, 1, 1))) == 2

        await eventually(is_stored)
    assert asked_of_nobody == []
    assert len(source.asked) == 1
    first, last = source.asked[0]
    assert ((today - first).days, (last - today).days) == (14, 60)


async def test_a_calendar_that_cannot_be_had_is_said_once_and_asked_for_again(database: Database) -> None:
    source = Published()
    source.problem = MarketDataUnavailable("answered 500")
    with capture_logs() as logs:
        async with keeping(database, source, lambda: True, seconds=3600):
            await eventually(lambda: source.is_asked(3))
            source.problem = None

            async def is_stored() -> bool:
                return len(await published_days(database, date(2000, 1, 1))) == 2

            await eventually(is_stored)
    said = [(line["event"], line.get("reason")) for line in logs]
    assert said == [("market_calendar_not_stored", "answered 500"), ("market_calendar_stored", None)]


async def test_the_calendar_is_asked_for_again_after_some_hours(database: Database) -> None:
    source = Published()
    async with keeping(database, source, lambda: True, seconds=0.05):
        await eventually(lambda: source.is_asked(3))


# ---- out of the table ----------------------------------------------------------------------------


async def test_what_is_published_is_known_after_the_next_reading(database: Database) -> None:
    held = Calendar()
    noon = datetime(2026, 11, 27, 17, tzinfo=UTC)
    assert held.hours.session_at(noon) == HALF_DAY
    await store_days(database, {FRIDAY: None})
    assert await held.read(database, noon)
    assert held.hours.session_at(noon) is None
    hours = held.hours
    assert await held.read(database, noon)
    assert held.hours is hours  # nothing changed, so what it remembers stays


async def test_without_a_database_the_last_calendar_stays_and_one_line_says_so(database: Database) -> None:
    noon = datetime(2026, 11, 27, 17, tzinfo=UTC)
    held = Calendar()
    await store_days(database, {FRIDAY: None})
    assert await held.read(database, noon)
    with capture_logs() as logs:
        async with databases.connect(NOWHERE, application_name="tests", connections_max=1) as nowhere:
            assert not await held.read(nowhere, noon)
            assert not await held.read(nowhere, noon)
    assert held.hours.session_at(noon) is None
    assert [line["event"] for line in logs] == ["market_days_not_read"]


async def test_calendar_without_any_database_has_the_rules_and_stops_at_once() -> None:
    held = Calendar()
    stop = asyncio.Event()
    async with databases.connect(NOWHERE, application_name="tests", connections_max=1) as nowhere:
        task = asyncio.create_task(held.keep(nowhere, stop))
        assert held.hours.session_at(datetime(2026, 11, 27, 17, tzinfo=UTC)) == HALF_DAY
        stop.set()
        async with asyncio.timeout(5):
            await task


async def test_calendar_that_is_kept_reads_the_table(database: Database) -> None:
    today = market_date(utc_now())
    await store_days(database, {today: around_noon(today), today + timedelta(days=1): None})
    held = Calendar()
    stop = asyncio.Event()
    task = asyncio.create_task(held.keep(database, stop))

    async def is_read() -> bool:
        return held.hours.session_on(today) == around_noon(today)

    await eventually(is_read)
    stop.set()
    async with asyncio.timeout(5):
        await task
    assert held.hours.session_on(today + timedelta(days=1)) is None


def around_noon(day: date) -> Session:
    opens_at, closes_at = (
        datetime.combine(day, time(hour, 11), NEW_YORK).astimezone(UTC) for hour in (11, 13)
    )
    return Session(opens_at, closes_at)


async def test_session_that_does_not_lie_on_its_day_is_left_to_the_rules(database: Database) -> None:
    await store_days(database, {SATURDAY: HALF_DAY, THURSDAY: None})
    held = Calendar()
    with capture_logs() as logs:
        assert await held.read(database, HALF_DAY.opens_at)
    assert held.hours.session_on(SATURDAY) is None
    assert [(line["event"], line["days"], line["unfit"]) for line in logs] == [
        ("market_days_read", 2, ["2026-11-28"])
    ]
