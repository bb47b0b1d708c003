"""Alpaca's REST answers: whatever comes, the good trades are stored, the bad ones counted, and the feeder goes on."""

import asyncio
import gzip
import json
import threading
import zlib
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.price_feeder.calendar import AlpacaCalendar
from services.price_feeder.failures import MarketDataError
from services.price_feeder.feed import Feed
from services.price_feeder.market_data import LastTrades
from services.price_feeder.trades import LastTrade, last_trade
from shared.bus import Bus
from shared.clock import utc_now
from shared.database import Database
from shared.market_calendar import Calendar
from tests.factories import create_user
from tests.fuzz.babbling import babbling, http
from tests.fuzz.strategies import GARBAGE, VALUES, cut, encoded, spoiled
from tests.fuzz.trying import examples, nothing_unexpected_logged, try_each
from tests.integration.fake_alpaca import running_fake, trade
from tests.integration.feeding import market_data
from tests.integration.leases import held_lease
from tests.market import open_now
from tests.waiting import eventually

HELD = ("AAPL", "BRK.B", "BTC/USD", "MSFT", "NVDA")
RIGHT = {"c": ["@"], "i": 1, "p": 175.25, "s": 100, "t": "2026-03-02T15:00:00.123456789Z", "x": "V", "z": "C"}
LIMIT = Decimal("99999999999.9999")
"""The largest price that NUMERIC(15,4) holds."""
FUTURE_MAX = timedelta(minutes=5)

PRICES = st.decimals(Decimal("0.0001"), LIMIT, places=4).filter(
    lambda price: Decimal(str(float(price))) == price
)
"""Prices that survive being a number of JSON."""
AGES = st.integers(0, 3_600_000_000).map(lambda microseconds: timedelta(microseconds=microseconds))


async def cached(database: Database) -> dict[str, tuple[Decimal, datetime]]:
    """Return the price cache, of which every row must be possible."""
    rows = await database.fetch("SELECT symbol, price, traded_at FROM asset_prices")
    for row in rows:
        assert row["symbol"] in HELD
        assert 0 < row["price"] <= LIMIT
        assert datetime(1970, 1, 1, tzinfo=UTC) <= row["traded_at"] <= utc_now() + FUTURE_MAX
    return {row["symbol"]: (row["price"], row["traded_at"]) for row in rows}


# ---- trades --------------------------------------------------------------------------------------


@examples(150)
@given(spoiled(RIGHT), st.integers(0, 31_536_000))
def test_a_spoiled_trade_is_rejected_or_fits_the_table(raw: bytes, seconds: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    found = last_trade("AAPL", json.loads(raw), feed="iex", now=now)
    if isinstance(found, LastTrade):
        assert 0 < found.price <= LIMIT
        assert found.price == round(found.price, 4)
        assert found.traded_at.tzinfo is UTC
        assert datetime(1970, 1, 1, tzinfo=UTC) <= found.traded_at <= now + FUTURE_MAX


async def test_of_a_mixed_answer_the_good_trades_are_kept_and_the_bad_ones_counted(
    database: Database, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    await create_user(database, positions=dict.fromkeys(HELD, ("1", "1")))
    known: dict[str, tuple[Decimal, datetime]] = {}

    async def check(
        good: dict[str, tuple[Decimal, timedelta]], bad: dict[str, bytes], extra: dict[str, Any]
    ) -> None:
        nonlocal known
        now = utc_now()
        expected = dict(known)
        alpaca.trades = {symbol: raw.decode() for symbol, raw in bad.items()}
        alpaca.trades |= {
            f"X{number}": encoded(value).decode() for number, value in enumerate(extra.values())
        }
        for symbol, (price, age) in good.items():
            alpaca.trades[symbol] = trade(f"{price:f}", (now - age).isoformat())
            if symbol not in known or known[symbol][1] < now - age:
                expected[symbol] = price, now - age
        round_ = await feed.take_round(asyncio.Event())
        assert (round_.outcome, round_.problem) == ("ok", None)
        assert round_.symbols == len(HELD)
        assert round_.confirmed + round_.rejected == len(HELD)
        stored = await cached(database)
        assert {symbol: stored[symbol] for symbol in good} == {symbol: expected[symbol] for symbol in good}
        for symbol, (_, traded_at) in known.items():
            assert stored[symbol][1] >= traded_at, f"{symbol} went back in time"
        for symbol, (price, traded_at) in stored.items():
            if symbol in known and traded_at == known[symbol][1]:
                assert price == known[symbol][0], f"{symbol} has another price of the same instant"
        known = stored

    good = st.dictionaries(st.sampled_from(HELD), st.tuples(PRICES, AGES), max_size=4)
    bad = st.dictionaries(st.sampled_from(HELD), st.one_of(spoiled(RIGHT), VALUES.map(encoded)), max_size=3)
    async with (
        running_fake() as alpaca,
        held_lease(database) as lease,
        market_data(alpaca.url, requests_per_minute=10_000_000) as market,
    ):
        feed = Feed(database, bus, market, lease, calendar=Calendar(open_now()))
        with nothing_unexpected_logged(caplog):
            await try_each(check, good, bad, st.dictionaries(st.text(), VALUES, max_size=3), count=25)


BODIES = st.one_of(
    GARBAGE,
    VALUES.map(lambda value: encoded({"trades": value})),
    st.lists(VALUES, max_size=3).map(
        lambda values: encoded({"trades": dict(zip(HELD, values, strict=False))})
    ),
    spoiled({"trades": {"AAPL": RIGHT}, "next_page_token": None}),
    cut(encoded({"trades": dict.fromkeys(HELD, RIGHT)})),
    st.sampled_from([b" " * 17_000_000, b'{"trades":{' + b'"AAPL":null,' * 100_000 + b'"AAPL":null}}']),
)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Return an answer of HTTP with anything in it; what is said of it need not be true."""
    body = draw(BODIES)
    status = draw(
        st.sampled_from(["200 OK"] * 6 + ["204 No Content", "302 Found", "400 Bad", "422 No", "500 Oh"])
        | st.integers(100, 999).map(str)
    )
    headers: dict[str, str] = {}
    match draw(st.integers(0, 6)):
        case 1:
            body = draw(
                st.sampled_from([gzip.compress(body[:1_000_000]), zlib.compress(body[:1_000_000]), body])
            )
            headers["Content_Encoding"] = draw(
                st.sampled_from(["gzip", "deflate", "br", "zstd", "x", "gzip, gzip"])
            )
        case 2:
            headers["Content_Type"] = draw(
                st.sampled_from(["text/html", "application/json; charset=x", "\xff", ""])
            )
        case 3:
            headers["Content_Length"] = draw(
                st.sampled_from(["0", "-1", "x", "99999999999999999999", str(len(body) + 1)])
            )
        case 4:
            headers["Transfer_Encoding"] = "chunked"
        case 5:
            headers["Retry_After"] = draw(
                st.sampled_from(["-1", "1e400", "NaN", "9" * 5000, "x", "Fri, 99 Foo 0000"])
            )
        case 6:
            headers["Location"] = draw(
                st.sampled_from(["", "/", "http://127.0.0.1:1/", "file:///etc/passwd", "\xff"])
            )
    answer = http(body, status, **headers)
    return draw(cut(answer)) if draw(st.integers(0, 5)) == 0 else answer


async def test_no_answer_of_any_kind_ends_the_feeder(caplog: pytest.LogCaptureFixture) -> None:
    threads = threading.active_count()

    async def check(answer: bytes) -> None:
        babbler.answer = answer
        async with market_data(babbler.url, request_seconds_max=2.0) as market:
            found = await market.latest_trades(HELD, now=utc_now(), seconds_max=5.0, stop=asyncio.Event())
        assert isinstance(found, LastTrades)
        for one in found.trades:
            assert one.symbol in HELD
            assert 0 < one.price <= LIMIT
        assert found.problems or len(found.trades) + len(found.rejected) == len(HELD)
        for problem in found.problems:
            assert len(str(problem)) < 500
            assert "/work" not in str(problem)

    async with babbling() as babbler:
        with nothing_unexpected_logged(caplog):
            await try_each(check, answers(), count=40)

    async def threads_are_gone() -> bool:
        return threading.active_count() <= threads + 2

    await eventually(threads_are_gone)


# ---- the calendar --------------------------------------------------------------------------------

FIRST, LAST = date(2026, 3, 2), date(2026, 3, 6)
DAYS = [
    {
        "date": f"2026-03-0{day}",
        "open": "09:30",
        "close": "16:00",
        "session_open": "0400",
        "session_close": "2000",
    }
    for day in range(2, 7)
]
DATES = st.sampled_from(
    ["9999-12-31", "0001-01-01", "2026-03-08", "2026-W10-1", "20260302", "2026-02-30", ""]
)
TIMES = st.sampled_from(
    ["23:59:59.999999", "00:00", "24:00", "09:30+23:59", "0001", "1600", "", "16:00", "9"]
)


@st.composite
def calendars(draw: st.DrawFn) -> bytes:
    """Return a calendar of which some days are spoiled, missing, doubled or added."""
    entries = [encoded(day) for day in DAYS]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(entries) - 1))
        far = st.fixed_dictionaries({"date": DATES, "open": TIMES, "close": TIMES}).map(encoded)
        entry = draw(st.one_of(spoiled(DAYS[place % len(DAYS)]), far, VALUES.map(encoded)))
        entries[place : place + draw(st.integers(0, 1))] = [entry]
    return b"[" + b",".join(entries) + b"]"


async def test_a_calendar_is_read_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def check(body: bytes) -> None:
        babbler.answer = http(body)
        async with AlpacaCalendar(api_key="key", secret_key="secret", url=babbler.url) as calendar:
            try:
                days = await calendar.days(FIRST, LAST)
            except MarketDataError as error:
                assert len(str(error)) < 500  # noqa: PT017  # a refusal is one of two good ends
                return
        assert list(days) == [FIRST + timedelta(days=number) for number in range(5)]
        for day, session in days.items():
            assert session is None or (
                session.opens_at < session.closes_at
                and abs(session.opens_at - datetime(day.year, day.month, day.day, 17, tzinfo=UTC))
                < timedelta(days=1)
            )

    async with babbling() as babbler:
        with nothing_unexpected_logged(caplog):
            await try_each(check, st.one_of(calendars(), GARBAGE), count=40)
