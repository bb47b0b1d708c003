"""The price feeder on real PostgreSQL and NATS, with prices from a hand-written Alpaca."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats
import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy

from local.servers import nats_server
from services.price_feeder import feed, queries
from services.price_feeder.feed import Feed
from services.price_feeder.frames import Withdrawal
from services.price_feeder.lease import Lease
from services.price_feeder.market_data import MarketData
from services.price_feeder.outbox import Outbox
from services.price_feeder.queries import (
    Stored,
    cached_price,
    cached_prices,
    held_symbols,
)
from services.price_feeder.streaming import Streaming
from services.price_feeder.trades import LastTrade
from shared import database as databases
from shared.bus import Bus
from shared.clock import utc_now
from shared.database import Database
from shared.market_calendar import Calendar
from shared.market_hours import MarketHours
from shared.messages import (
    FEED_STATUS,
    PRICES_CONFIRMED,
    FeedStatus,
    PricesConfirmed,
    PriceTick,
    price_subject,
)
from tests.factories import create_user, set_position, set_price
from tests.integration.fake_alpaca import FakeAlpaca, answers, hangs, running_fake, trade
from tests.integration.leases import held_lease
from tests.market import closed_now, open_now
from tests.waiting import eventually, settled

TEN = datetime(2026, 3, 2, 15, 0, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
RECEIVED = datetime(2026, 3, 2, 15, 0, 30, tzinfo=UTC)


@pytest.fixture
async def alpaca() -> AsyncIterator[FakeAlpaca]:
    async with running_fake() as fake:
        yield fake


def market_data(alpaca: FakeAlpaca) -> MarketData:
    return MarketData(
        api_key="key",
        secret_key="secret",
        url=alpaca.url,
        feed="iex",
        requests_per_minute=10_000,
        request_seconds_max=1.0,
    )


@pytest.fixture
async def market(alpaca: FakeAlpaca) -> AsyncIterator[MarketData]:
    async with market_data(alpaca) as client:
        yield client


@pytest.fixture
async def lease(database: Database) -> AsyncIterator[Lease]:
    async with held_lease(database) as held:
        yield held


NewFeed = Callable[..., Feed]


@pytest.fixture
def new_feed(database: Database, bus: Bus, market: MarketData, lease: Lease) -> NewFeed:
    """Return what makes a feed, to which the market is open if it is not given another calendar."""

    def new(calendar: Calendar | None = None) -> Feed:
        return Feed(database, bus, market, lease, calendar=calendar or Calendar(open_now()))

    return new


@pytest.fixture
async def js(nats_url: str) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(nats_url)
    yield client.jetstream()
    await client.close()


async def last_tick(js: JetStreamContext, symbol: str) -> PriceTick:
    message = await js.get_last_msg("PRICES", price_subject(symbol))
    assert message.data is not None
    return PriceTick.model_validate_json(message.data)


async def published(js: JetStreamContext) -> int:
    """How many ticks the stream has ever taken."""
    return (await js.stream_info("PRICES")).state.last_seq


async def last_status(js: JetStreamContext) -> FeedStatus:
    message = await js.get_last_msg("FEED", FEED_STATUS)
    assert message.data is not None
    return FeedStatus.model_validate_json(message.data)


async def store(database: Database, trades: Iterable[LastTrade], at: datetime, **options: Any) -> Stored:
    """Store as one who holds the lease."""
    term, _ = await queries.acquire_lease(database, "tests", timedelta(seconds=10))
    assert term
    return await queries.store_trades(database, term, trades, at, **options)


def last(price: str, at: datetime, symbol: str = "AAPL", source: str = "iex") -> LastTrade:
    return LastTrade(symbol, Decimal(price), at, source)


# ---- the cache -----------------------------------------------------------------------------------


async def test_held_symbols_are_each_named_once_least_recently_confirmed_first(database: Database) -> None:
    await create_user(
        database, "demo", positions={"AAPL": ("1", "1"), "BRK.B": ("2.5", "1"), "SOLD": ("0", "0")}
    )
    await create_user(database, "alice", positions={"AAPL": ("3", "1"), "BTC/USD": ("0.000000001", "1")})
    await set_price(database, "AAPL", "200", age=timedelta(minutes=2))
    await set_price(database, "BTC/USD", "29791", age=timedelta(minutes=3))
    await set_price(database, "MSFT", "400")
    assert await held_symbols(database) == ["BRK.B", "BTC/USD", "AAPL"]


async def test_nobody_holds_anything(database: Database) -> None:
    assert await held_symbols(database) == []
    assert not (await store(database, [], RECEIVED)).confirmed


async def test_newer_trade_replaces_the_cached_one(database: Database) -> None:
    await store(database, [last("200.5000", TEN)], RECEIVED)
    stored = await store(database, [last("201.0000", TEN + SECOND)], RECEIVED + SECOND)
    (tick,) = stored.changed
    assert tick == PriceTick(
        symbol="AAPL",
        price=Decimal("201.0000"),
        traded_at=TEN + SECOND,
        received_at=RECEIVED + SECOND,
        feed="iex",
        sequence=2,
    )
    cached = await cached_price(database, "AAPL")
    assert cached
    assert (cached.tick, cached.confirmed_at) == (tick, RECEIVED + SECOND)


async def test_older_trade_changes_and_confirms_nothing(database: Database) -> None:
    await store(database, [last("200.5000", TEN)], RECEIVED)
    before = await cached_price(database, "AAPL")
    stored = await store(database, [last("150.0000", TEN - SECOND)], RECEIVED + SECOND)
    assert (stored.changed, stored.confirmed) == ((), frozenset())
    assert await cached_price(database, "AAPL") == before


@pytest.mark.parametrize("price", ["200.5000", "201.0000"])
async def test_trade_of_the_same_instant_confirms_and_changes_nothing(database: Database, price: str) -> None:
    first = await store(database, [last("200.5000", TEN)], RECEIVED)
    stored = await store(database, [last(price, TEN)], RECEIVED + SECOND)
    assert (stored.changed, stored.confirmed) == ((), frozenset({"AAPL"}))
    cached = await cached_price(database, "AAPL")
    assert cached
    assert (cached.tick, cached.confirmed_at) == (first.changed[0], RECEIVED + SECOND)


async def test_confirmation_never_moves_back(database: Database) -> None:
    await store(database, [last("200.5000", TEN)], RECEIVED)
    await store(database, [last("201.0000", TEN + SECOND)], RECEIVED - SECOND)
    cached = await cached_price(database, "AAPL")
    assert cached
    assert (cached.tick.sequence, cached.confirmed_at) == (2, RECEIVED)


@pytest.mark.parametrize(("before", "after"), [("simulated", "iex"), ("iex", "simulated")])
async def test_real_and_simulated_prices_replace_each_other_whatever_their_times(
    database: Database, before: str, after: str
) -> None:
    await store(database, [last("200.5000", TEN, source=before)], RECEIVED)
    stored = await store(database, [last("44.1000", TEN - 999 * SECOND, source=after)], RECEIVED + SECOND)
    assert [(str(tick.price), tick.feed, tick.sequence) for tick in stored.changed] == [("44.1000", after, 2)]


async def test_older_price_of_another_real_feed_does_not_replace_a_newer_one(database: Database) -> None:
    await store(database, [last("200.5000", TEN, source="sip")], RECEIVED)
    stored = await store(database, [last("199.0000", TEN - SECOND, source="iex")], RECEIVED)
    assert stored.changed == ()


async def test_storing_twice_reports_the_same_changes(database: Database) -> None:
    """A statement is sent again when its connection was lost, and the first may have been committed."""
    batch = [last("200.5000", TEN), last("29791.0000", TEN, "BTC/USD", "us")]
    first = await store(database, batch, RECEIVED)
    assert await store(database, batch, RECEIVED) == first
    assert [tick.symbol for tick in first.changed] == ["AAPL", "BTC/USD"]


async def test_many_writers_of_the_same_symbols_do_not_deadlock(database: Database) -> None:
    term, _ = await queries.acquire_lease(database, "tests", timedelta(seconds=10))
    assert term
    symbols = [f"S{number}" for number in range(200)]
    writers = []
    for turn in range(12):
        batch = [last("10.0000", TEN + turn * SECOND, symbol) for symbol in symbols]
        ordered = batch[::-1] if turn % 2 else batch
        writers.append(queries.store_trades(database, term, ordered, RECEIVED + turn * SECOND))
    await asyncio.gather(*writers)
    cached = await cached_prices(database, symbols)
    assert {price.tick.traded_at for price in cached.values()} == {TEN + 11 * SECOND}


async def test_cached_prices_are_those_asked_for(database: Database) -> None:
    await set_price(database, "AAPL", "200.5")
    await set_price(database, "MSFT", "400")
    assert list(await cached_prices(database, ["AAPL", "NONE"])) == ["AAPL"]
    assert await cached_price(database, "NONE") is None


# ---- a round -------------------------------------------------------------------------------------


async def test_round_caches_prices_and_publishes_each_as_the_last_of_its_subject(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    held = {"AAPL": ("1", "1"), "BRK.B": ("1", "1"), "BTC/USD": ("1", "1")}
    await create_user(database, positions=held)
    alpaca.trades = {"AAPL": trade("200.5"), "BRK.B": trade("412.3"), "BTC/USD": trade("29791")}
    done = await new_feed().take_round(asyncio.Event())
    assert (done.outcome, done.symbols, done.confirmed, done.changed) == ("ok", 3, 3, 3)
    for symbol, price in (("AAPL", "200.5000"), ("BRK.B", "412.3000"), ("BTC/USD", "29791.0000")):
        tick = await last_tick(js, symbol)
        assert (tick.symbol, str(tick.price), tick.sequence) == (symbol, price, 1)
        cached = await cached_price(database, symbol)
        assert cached
        assert cached.tick == tick
    subjects = (await js.stream_info("PRICES", subjects_filter=">")).state.subjects
    assert subjects
    assert set(subjects) == {
        "prices.v1.equity.AAPL",
        "prices.v1.equity.BRK_2EB",
        "prices.v1.crypto.BTC_2FUSD",
    }


async def test_only_changes_are_published(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1"), "MSFT": ("1", "1")})
    alpaca.trades = {
        "AAPL": trade("200.5", "2026-03-02T15:00:00Z"),
        "MSFT": trade("400", "2026-03-02T15:00:00Z"),
    }
    feeder = new_feed()
    await feeder.take_round(asyncio.Event())
    assert await published(js) == 2
    assert (await feeder.take_round(asyncio.Event())).changed == 0
    alpaca.trades["AAPL"] = trade("199", "2026-03-02T14:00:00Z")
    assert (await feeder.take_round(asyncio.Event())).changed == 0
    assert await published(js) == 2
    alpaca.trades["AAPL"] = trade("201", "2026-03-02T15:00:01Z")
    done = await feeder.take_round(asyncio.Event())
    assert (done.changed, done.unpublished) == (1, 0)
    assert await published(js) == 3
    assert str((await last_tick(js, "AAPL")).price) == "201.0000"


async def test_tick_that_is_heard_is_found_in_the_table(
    database: Database, alpaca: FakeAlpaca, nats_url: str, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    compared: list[tuple[int, int]] = []
    listener = await nats.connect(nats_url)

    async def compare(message: Msg) -> None:
        tick = PriceTick.model_validate_json(message.data)
        cached = await cached_price(database, tick.symbol)
        compared.append((tick.sequence, cached.tick.sequence if cached else 0))

    await listener.subscribe("prices.v1.>", cb=compare)
    await settled(listener)
    feeder = new_feed()
    for second in range(20):
        alpaca.trades = {"AAPL": trade(f"{200 + second}", f"2026-03-02T15:00:{second:02}Z")}
        await feeder.take_round(asyncio.Event())

    async def all_heard() -> bool:
        return len(compared) == 20

    await eventually(all_heard)
    await listener.close()
    assert [heard for heard, _ in compared] == list(range(1, 21))
    assert all(found >= heard for heard, found in compared)


async def test_absurd_and_missing_prices_do_not_cost_the_others(
    database: Database, alpaca: FakeAlpaca, new_feed: NewFeed
) -> None:
    held = ("AAPL", "HUGE", "NULL", "GONE", "ODD~SYMBOL")
    await create_user(database, positions=dict.fromkeys(held, ("1", "1")))
    await set_price(database, "HUGE", "12.5", age=timedelta(minutes=1))
    alpaca.trades = {"AAPL": trade("200.5"), "HUGE": trade("1e400"), "NULL": "null"}
    done = await new_feed().take_round(asyncio.Event())
    assert (done.outcome, done.symbols, done.confirmed, done.rejected) == ("ok", 5, 1, 4)
    cached = await cached_prices(database, held)
    assert {symbol: str(price.tick.price) for symbol, price in cached.items()} == {
        "AAPL": "200.5000",
        "HUGE": "12.5000",
    }


async def test_failing_market_keeps_the_old_prices_and_the_next_round_heals(
    database: Database, alpaca: FakeAlpaca, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "190", traded_at=TEN - SECOND)
    alpaca.trades = {"AAPL": trade("200.5")}
    alpaca.fault = answers("502 Bad Gateway", "<html><title>502 Bad Gateway</title></html>")
    feeder = new_feed()
    done = await feeder.take_round(asyncio.Event())
    assert (done.outcome, done.problem) == ("failed", "answered 502: 502 Bad Gateway")
    cached = await cached_price(database, "AAPL")
    assert cached
    assert str(cached.tick.price) == "190.0000"
    alpaca.fault = None
    assert (await feeder.take_round(asyncio.Event())).changed == 1


async def test_simulated_prices_are_labelled_on_the_bus_and_in_the_table(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.headers = {"X-Market-Simulated": "true"}
    alpaca.trades = {"AAPL": trade("200.5")}
    assert (await new_feed().take_round(asyncio.Event())).simulated
    assert (await last_tick(js, "AAPL")).feed == "simulated"


# ---- status --------------------------------------------------------------------------------------


async def test_status_follows_the_confirmation_of_prices(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    await set_price(database, "AAPL", "190", age=timedelta(minutes=6))
    alpaca.fault = answers("500 Internal Server Error", "")
    feeder = new_feed()
    await feeder.take_round(asyncio.Event())
    status = await last_status(js)
    assert (status.state, status.detail) == ("stale", "answered 500")
    alpaca.fault = None
    alpaca.trades = {"AAPL": trade("200.5", utc_now().isoformat())}
    await feeder.take_round(asyncio.Event())
    assert (await last_status(js)).state == "polling"
    alpaca.fault = answers("500 Internal Server Error", "")
    await feeder.take_round(asyncio.Event())
    assert (await last_status(js)).state == "polling"  # confirmed less than 5 minutes ago
    await feeder.say_ended()
    assert (await last_status(js)).state == "stopped"
    statuses = (await js.stream_info("FEED")).state.last_seq
    assert statuses == 3 + 1  # and the confirmation of the one round that brought a price


async def test_nothing_held_is_no_failure(
    alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    assert (await new_feed().take_round(asyncio.Event())).outcome == "idle"
    assert (await last_status(js)).state == "polling"
    assert alpaca.asked == []


async def test_round_confirms_what_it_knows_to_be_the_last(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1"), "GONE": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200.5")}
    feeder = new_feed()
    await feeder.take_round(asyncio.Event())
    await feeder.take_round(asyncio.Event())
    message = await js.get_last_msg("FEED", PRICES_CONFIRMED)
    assert message.data is not None
    confirmed = PricesConfirmed.model_validate_json(message.data)
    cached = await cached_price(database, "AAPL")
    assert cached
    assert (confirmed.symbols, confirmed.confirmed_at) == (("AAPL",), cached.confirmed_at)


async def heard_confirmations(nats_url: str, publish: Callable[[], Awaitable[object]]) -> dict[str, datetime]:
    """Return which symbols are confirmed when, by what is published."""
    client = await nats.connect(nats_url)
    confirmations = await client.subscribe(PRICES_CONFIRMED)
    await settled(client)
    await publish()
    await settled(client)
    confirmed: dict[str, datetime] = {}
    while confirmations.pending_msgs:
        message = PricesConfirmed.model_validate_json((await confirmations.next_msg()).data)
        confirmed |= dict.fromkeys(message.symbols, message.confirmed_at)
    await client.close()
    return confirmed


async def test_refresh_does_not_displace_the_confirmations_of_a_round(
    bus: Bus, lease: Lease, nats_url: str
) -> None:
    outbox = Outbox(bus, lease)
    outbox.confirm(["AAPL", "MSFT", "TSLA"], TEN)
    outbox.confirm(["MSFT"], TEN + SECOND)
    assert await heard_confirmations(nats_url, outbox.publish) == {
        "AAPL": TEN,
        "MSFT": TEN + SECOND,
        "TSLA": TEN,
    }
    assert await heard_confirmations(nats_url, outbox.publish) == {}


async def test_confirmation_that_was_not_acknowledged_is_published_again(lease: Lease, nats_url: str) -> None:
    client = await nats.connect(nats_url)
    js = client.jetstream()
    async with Bus(nats_url, name="tests") as bus:
        assert await bus.wait_until_ready(asyncio.Event())
        outbox = Outbox(bus, lease)
        outbox.confirm(["AAPL", "MSFT"], TEN)
        await js.delete_stream("FEED")
        await outbox.publish()
        outbox.confirm(["MSFT"], TEN + SECOND)
        await js.add_stream(name="FEED", subjects=[FEED_STATUS, PRICES_CONFIRMED])
        confirmed = await heard_confirmations(nats_url, outbox.publish)
    await client.close()
    assert confirmed == {"AAPL": TEN, "MSFT": TEN + SECOND}


async def test_ticks_that_a_full_stream_refuses_do_not_hold_up_the_others(
    bus: Bus, lease: Lease, js: JetStreamContext
) -> None:
    """The stream keeps three ticks of a symbol here, and has those of one that goes on."""
    full = (await js.stream_info("PRICES")).config
    await js.update_stream(full.evolve(max_msgs_per_subject=3, max_bytes=1000, discard=DiscardPolicy.NEW))
    outbox = Outbox(bus, lease)

    def ticks(*symbols: str, sequence: int) -> list[PriceTick]:
        return [
            PriceTick(
                symbol=symbol,
                price=Decimal("1.0000"),
                traded_at=TEN,
                received_at=TEN,
                feed="iex",
                sequence=sequence,
            )
            for symbol in symbols
        ]

    for sequence in (1, 2, 3):
        outbox.add(ticks("BUSY", sequence=sequence))
        await outbox.publish()
    assert len(outbox) == 0
    outbox.add(ticks(*(f"S{number:03}" for number in range(300)), "BUSY", sequence=4))
    for _ in range(2):
        await outbox.publish()
    assert len(outbox) >= 256
    assert (await last_tick(js, "BUSY")).sequence == 4


async def test_refresh_asks_for_the_given_symbols_and_says_what_came_of_it(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1"), "MSFT": ("1", "1"), "GONE": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200.5"), "MSFT": trade("400")}
    feeder = new_feed()
    await feeder.take_round(asyncio.Event())
    alpaca.trades["AAPL"] = trade("201", "2026-03-02T15:00:01Z")
    brought = await feeder.refresh(["AAPL", "MSFT", "GONE"])
    assert (set(brought.confirmed), set(brought.changed), brought.problem) == (
        {"AAPL", "MSFT"},
        {"AAPL"},
        None,
    )
    assert dict(brought.rejected) == {"GONE": "missing"}
    await feeder.outbox.publish()
    assert str((await last_tick(js, "AAPL")).price) == "201.0000"


# ---- sessions ------------------------------------------------------------------------------------


async def test_trade_outside_the_session_does_not_replace_its_last_price(
    database: Database, alpaca: FakeAlpaca, new_feed: NewFeed
) -> None:
    """2026-03-02 is a Monday in winter: the session is from 14:30 to 21:00 UTC."""
    await create_user(database, positions={"AAPL": ("1", "1"), "MSFT": ("1", "1"), "BTC/USD": ("1", "1")})
    await set_price(database, "AAPL", "200", traded_at=datetime(2026, 3, 2, 20, 59, tzinfo=UTC))
    await set_price(database, "MSFT", "400", traded_at=datetime(2026, 2, 27, 20, 59, tzinfo=UTC))
    await set_price(database, "BTC/USD", "30000", traded_at=datetime(2026, 3, 2, 20, 59, tzinfo=UTC))
    after_hours = "2026-03-02T22:00:00Z"
    alpaca.trades = {
        "AAPL": trade("201", after_hours),
        "MSFT": trade("401", after_hours),
        "BTC/USD": trade("30001", after_hours),
    }
    done = await new_feed(Calendar(MarketHours())).take_round(asyncio.Event())
    assert (done.changed, done.confirmed, done.outside, done.rejected) == (2, 3, 1, 0)
    cached = await cached_prices(database, ["AAPL", "MSFT", "BTC/USD"])
    assert {symbol: str(price.tick.price) for symbol, price in cached.items()} == {
        "AAPL": "200.0000",
        "MSFT": "401.0000",  # the cache had no trade of that session
        "BTC/USD": "30001.0000",
    }


async def test_closing_print_after_the_close_is_the_sessions_last_price(
    database: Database, alpaca: FakeAlpaca, new_feed: NewFeed
) -> None:
    """2026-03-02 is a Monday in winter: the session ends at 21:00 UTC."""
    await create_user(database, positions={"AAPL": ("1", "1"), "MSFT": ("1", "1")})
    for symbol in ("AAPL", "MSFT"):
        await set_price(database, symbol, "200", traded_at=datetime(2026, 3, 2, 20, 59, 58, tzinfo=UTC))
    soon = "2026-03-02T21:00:07Z"
    alpaca.trades = {"AAPL": trade("201", soon).replace('["@"]', '["@","6"]'), "MSFT": trade("201", soon)}
    feeder = new_feed(Calendar(MarketHours()))
    await feeder.take_round(asyncio.Event())
    alpaca.trades["AAPL"] = trade("202", "2026-03-02T21:00:09Z")
    await feeder.take_round(asyncio.Event())
    cached = await cached_prices(database, ["AAPL", "MSFT"])
    assert {symbol: str(price.tick.price) for symbol, price in cached.items()} == {
        "AAPL": "201.0000",
        "MSFT": "200.0000",
    }


async def test_trade_before_the_open_confirms_the_price_of_the_session_before(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    """So that it is not stale at the open, until a symbol that trades seldom has its first trade.

    2026-03-02 is a Monday; the session before ended on Friday at 21:00 UTC. The price of MSFT was confirmed last at
    noon of that day: later trades of it may have been missed.
    """
    friday = datetime(2026, 2, 27, 20, 59, tzinfo=UTC)
    since_friday = utc_now() - friday - timedelta(minutes=0.5)
    since_noon = utc_now() - datetime(2026, 2, 27, 17, 0, tzinfo=UTC)
    await create_user(database, positions={"AAPL": ("1", "1"), "MSFT": ("1", "1")})
    await set_price(database, "AAPL", "200", traded_at=friday, age=since_friday)
    await set_price(database, "MSFT", "400", traded_at=friday - timedelta(hours=4), age=since_noon)
    before = await cached_prices(database, ["AAPL", "MSFT"])
    early = "2026-03-02T13:00:00Z"
    alpaca.trades = {"AAPL": trade("201", early), "MSFT": trade("401", early)}
    feeder = new_feed(Calendar(MarketHours()))
    began_at = utc_now()
    done = await feeder.take_round(asyncio.Event())
    assert (done.changed, done.confirmed, done.outside, done.rejected) == (0, 1, 1, 1)
    cached = await cached_prices(database, ["AAPL", "MSFT"])
    assert cached["AAPL"].tick == before["AAPL"].tick
    assert cached["AAPL"].confirmed_at >= began_at
    assert cached["MSFT"] == before["MSFT"]
    message = await js.get_last_msg("FEED", PRICES_CONFIRMED)
    assert message.data is not None
    confirmed = PricesConfirmed.model_validate_json(message.data)
    assert (confirmed.symbols, confirmed.confirmed_at) == (("AAPL",), cached["AAPL"].confirmed_at)
    brought = await feeder.refresh(["AAPL", "MSFT"])
    assert set(brought.confirmed) == {"AAPL"}
    assert dict(brought.rejected) == {"MSFT": "outside_session"}


# ---- withdrawals ---------------------------------------------------------------------------------

CACHED, EARLIER = "2026-03-02T15:00:05Z", "2026-03-02T15:00:00Z"


@pytest.fixture
def streamed_feed(database: Database, bus: Bus, market: MarketData, lease: Lease) -> Feed:
    streaming = Streaming({}, feed="iex", symbols_max=30)
    return Feed(database, bus, market, lease, calendar=Calendar(open_now()), streaming=streaming)


async def price_after_an_answer(
    feeder: Feed, database: Database, alpaca: FakeAlpaca, answer: str
) -> str | None:
    alpaca.trades = {"AAPL": answer}
    await feeder.refresh(["AAPL"])
    cached = await cached_price(database, "AAPL")
    return str(cached.tick.price) if cached else None


async def test_cancelling_another_trade_at_the_polled_price_withdraws_nothing(
    database: Database, alpaca: FakeAlpaca, streamed_feed: Feed
) -> None:
    after = partial(price_after_an_answer, streamed_feed, database, alpaca)
    assert await after(trade("200.5", CACHED)) == "200.5000"
    assert await streamed_feed.withdraw([Withdrawal("AAPL", 99, 200.5)]) == set()
    assert await after(trade("199", EARLIER)) == "200.5000"
    assert await streamed_feed.withdraw([Withdrawal("AAPL", 1, 200.5)]) == {"AAPL"}
    assert await after(trade("199", EARLIER)) == "199.0000"


async def test_trade_that_the_venue_still_calls_the_last_is_not_withdrawn_any_more(
    database: Database, alpaca: FakeAlpaca, streamed_feed: Feed
) -> None:
    """Of a price that an earlier process cached the id is not known."""
    await set_price(database, "AAPL", "200.5", traded_at=datetime.fromisoformat(CACHED))
    after = partial(price_after_an_answer, streamed_feed, database, alpaca)
    assert await streamed_feed.withdraw([Withdrawal("AAPL", 99, 200.5)]) == {"AAPL"}
    assert await after(trade("200.5", CACHED)) == "200.5000"
    assert await after(trade("199", EARLIER)) == "200.5000"


async def test_withdrawal_outlasts_an_answer_that_lags_but_not_for_ever(
    database: Database, alpaca: FakeAlpaca, streamed_feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = partial(price_after_an_answer, streamed_feed, database, alpaca)
    assert await after(trade("200.5", CACHED)) == "200.5000"
    assert await streamed_feed.withdraw([Withdrawal("AAPL", 1, 200.5)]) == {"AAPL"}
    assert await after(trade("200.5", CACHED)) == "200.5000"
    assert await after(trade("199", EARLIER)) == "199.0000"
    assert await streamed_feed.withdraw([Withdrawal("AAPL", 1, 199)]) == {"AAPL"}
    monkeypatch.setattr(feed, "WITHDRAWAL_SETTLES", timedelta(0))
    assert await after(trade("199", EARLIER)) == "199.0000"
    assert await after(trade("198", "2026-03-02T14:59:59Z")) == "199.0000"


async def test_without_the_cache_no_withdrawal_is_taken_for_done(
    bus: Bus, market: MarketData, lease: Lease
) -> None:
    url = "postgresql://u:p@127.0.0.1:9/none"
    streaming = Streaming({}, feed="iex", symbols_max=30)
    async with databases.connect(url, application_name="tests", connections_max=1) as unreachable:
        feeder = Feed(unreachable, bus, market, lease, streaming=streaming)
        assert await feeder.withdraw([Withdrawal("AAPL", 1, 200.5)]) is None


async def test_round_that_failed_while_the_market_is_closed_is_taken_again(
    database: Database, alpaca: FakeAlpaca, bus: Bus, market: MarketData, lease: Lease
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1"), "GONE": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200.5")}
    alpaca.fault = answers("500 Internal Server Error", "")
    feeder = Feed(
        database, bus, market, lease, calendar=Calendar(closed_now()), closed_interval=timedelta(minutes=5)
    )
    assert (await feeder.take_round(asyncio.Event())).outcome == "failed"
    alpaca.fault = None
    assert (await feeder.take_round(asyncio.Event())).confirmed == 1
    assert (await feeder.take_round(asyncio.Event())).outcome == "resting"


async def test_status_says_that_the_market_is_closed_unless_something_trades_always(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200.5"), "BTC/USD": trade("30000")}
    feeder = new_feed(Calendar(closed_now()))
    await feeder.take_round(asyncio.Event())
    assert (await last_status(js)).state == "market_closed"
    await set_position(database, user_id, "BTC/USD", "1")
    await feeder.take_round(asyncio.Event())
    assert (await last_status(js)).state == "polling"


# ---- the lease -----------------------------------------------------------------------------------


async def test_new_holder_of_the_lease_publishes_all_last_prices_anew(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, bus: Bus, market: MarketData
) -> None:
    """Whatever the former one has done at last: the stream does not take them for second copies."""
    await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200.5")}
    for expected in (1, 2):
        async with held_lease(database, f"holder {expected}") as lease:
            await Feed(database, bus, market, lease).take_round(asyncio.Event())
        assert await published(js) == expected


async def test_without_the_lease_nothing_is_written_or_published(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, bus: Bus, market: MarketData
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200.5")}
    async with held_lease(database) as lease:
        feeder = Feed(database, bus, market, lease)
        await database.fetch("UPDATE leases SET term = term + 1")
        assert lease.holds()  # it does not know yet
        assert (await feeder.take_round(asyncio.Event())).outcome == "lost"
        assert not lease.holds()
    assert await cached_price(database, "AAPL") is None
    assert await published(js) == 0


# ---- outages -------------------------------------------------------------------------------------


async def test_new_process_publishes_what_the_killed_one_only_cached(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1"), "GONE": ("1", "1")})
    await set_price(database, "AAPL", "200.5", traded_at=TEN)
    await set_price(database, "GONE", "7.25", traded_at=TEN)
    await set_price(database, "UNHELD", "1", traded_at=TEN)
    alpaca.trades = {"AAPL": trade("201", "2026-03-02T15:00:01Z")}
    await new_feed().take_round(asyncio.Event())
    assert str((await last_tick(js, "AAPL")).price) == "201.0000"
    assert str((await last_tick(js, "GONE")).price) == "7.2500"
    assert await published(js) == 2
    await new_feed().take_round(asyncio.Event())
    assert await published(js) == 2  # the stream drops the second copies


async def test_outage_of_nats_does_not_stop_the_cache_and_is_healed(
    database: Database, alpaca: FakeAlpaca, market: MarketData, lease: Lease, tmp_path: Path
) -> None:
    """Also when the server comes back with an empty disk."""
    await create_user(database, positions={"AAPL": ("1", "1"), "QUIET": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200", "2026-03-02T15:00:00Z"), "QUIET": trade("7.25")}
    with nats_server(tmp_path / "first") as server:
        url = server.url
        async with Bus(url, name="tests") as bus:
            feeder = Feed(database, bus, market, lease, calendar=Calendar(open_now()))
            assert await bus.wait_until_ready(asyncio.Event())
            assert (await feeder.take_round(asyncio.Event())).unpublished == 0
            server.process.kill()
            server.process.wait()
            alpaca.trades["AAPL"] = trade("201", "2026-03-02T15:00:01Z")
            assert (await feeder.take_round(asyncio.Event())).unpublished == 1
            cached = await cached_price(database, "AAPL")
            assert cached
            assert str(cached.tick.price) == "201.0000"
            with empty_nats_at(url, tmp_path / "second"):
                client = await nats.connect(url)
                js = client.jetstream()

                async def is_healed() -> bool:
                    """A round that meets the server between two of its streams leaves the rest to the next."""
                    done = await feeder.take_round(asyncio.Event())
                    return done.unpublished == 0 and await published(js) >= 2

                await eventually(is_healed, every=0.1)
                assert (await last_tick(js, "AAPL")).sequence == 2
                assert str((await last_tick(js, "QUIET")).price) == "7.2500"
                assert (await last_status(js)).state == "polling"
                await client.close()


@contextmanager
def empty_nats_at(url: str, folder: Path) -> Iterator[None]:
    """Run a nats-server without any data where another one was."""
    address = urlsplit(url)
    assert address.username
    assert address.password
    command = [str(Path(sys.executable).parent / "nats-server"), "-a", "127.0.0.1", "-p", str(address.port)]
    command += ["-js", "-sd", str(folder), "--user", address.username, "--pass", address.password]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


async def test_database_away_is_survived_and_said(bus: Bus, market: MarketData, lease: Lease) -> None:
    url = "postgresql://u:p@127.0.0.1:9/none"
    async with databases.connect(url, application_name="tests", connections_max=1) as unreachable:
        done = await Feed(unreachable, bus, market, lease).take_round(asyncio.Event())
    assert done.outcome == "unstored"
    assert done.problem
    assert done.problem.startswith("database: ")


# ---- the loop ------------------------------------------------------------------------------------


async def test_loop_takes_a_round_at_once_and_then_on_every_boundary_until_stopped(
    database: Database, alpaca: FakeAlpaca, js: JetStreamContext, new_feed: NewFeed
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    stop = asyncio.Event()
    running = asyncio.create_task(feed.run(new_feed(), timedelta(seconds=0.5), stop))

    async def is_asked_often() -> bool:
        return len(alpaca.asked) >= 4

    await eventually(is_asked_often)
    stop.set()
    await asyncio.wait_for(running, 2)
    gaps = [later.at - earlier.at for earlier, later in zip(alpaca.asked[1:], alpaca.asked[2:], strict=False)]
    assert all(0.3 < gap < 0.7 for gap in gaps)
    assert (await last_status(js)).state == "stopped"


async def test_loop_goes_on_through_a_hanging_market_and_stops_during_it(
    database: Database, alpaca: FakeAlpaca, new_feed: NewFeed
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.fault = hangs
    stop = asyncio.Event()
    running = asyncio.create_task(feed.run(new_feed(), timedelta(seconds=0.5), stop))

    async def is_asked_twice() -> bool:
        return len(alpaca.asked) >= 2

    await eventually(is_asked_twice)
    alpaca.fault = None
    alpaca.trades = {"AAPL": trade("200.5"), "BRK.B": trade("412.3")}
    await set_position(database, user_id, "BRK.B", "1")

    async def both_are_priced() -> bool:
        return len(await cached_prices(database, ["AAPL", "BRK.B"])) == 2

    await eventually(both_are_priced)
    alpaca.fault = hangs
    asked = len(alpaca.asked)

    async def is_asked_again() -> bool:
        return len(alpaca.asked) > asked

    await eventually(is_asked_again)
    stop.set()
    await asyncio.wait_for(running, 1)


async def test_loop_does_not_wait_for_nats(
    database: Database, alpaca: FakeAlpaca, market: MarketData, lease: Lease
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.trades = {"AAPL": trade("200.5")}
    stop = asyncio.Event()
    async with Bus("nats://127.0.0.1:9", name="tests") as unconnected:
        running = asyncio.create_task(
            feed.run(Feed(database, unconnected, market, lease), timedelta(seconds=60), stop)
        )

        async def is_priced() -> bool:
            return await cached_price(database, "AAPL") is not None

        await eventually(is_priced, timeout=5)
        stop.set()
        await asyncio.wait_for(running, 5)
