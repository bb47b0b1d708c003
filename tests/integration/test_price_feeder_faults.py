"""The price feeder under faults of the market, of its servers and of itself: what stays, what heals, what is seen."""

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import nats
import psutil
import pytest
from nats.js import JetStreamContext
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from services.price_feeder import metrics, streams
from services.price_feeder.feed import Feed
from services.price_feeder.market_data import THREADS
from services.price_feeder.queries import cached_price, cached_prices
from services.price_feeder.signals import Signals
from services.price_feeder.streaming import Streaming
from shared.bus import Bus
from shared.clock import utc_now
from shared.database import Database
from shared.health import Degraded
from shared.market_calendar import Calendar
from shared.messages import AssetClass, PriceTick, price_subject
from tests.factories import create_user, set_price
from tests.integration.fake_alpaca import FakeAlpaca, answers, hangs, running_fake, trade
from tests.integration.feeder_process import Process, price_feeder
from tests.integration.feeding import market_data
from tests.integration.leases import held_lease
from tests.integration.simulated_market import SimulatedMarket, simulated_market
from tests.integration.wire import Wire
from tests.market import open_now
from tests.waiting import eventually

SYMBOLS = ("AAPL", "BTC/USD", "MSFT")
HELD = dict.fromkeys(SYMBOLS, ("1", "1"))
KILLS = ("at random", "while NATS stands still", "while PostgreSQL stands still")


@pytest.fixture
async def market(database: Database) -> AsyncIterator[SimulatedMarket]:
    await create_user(database, positions=HELD)
    async with simulated_market(rate_limit=100_000) as running:
        yield running


@pytest.fixture
async def alpaca() -> AsyncIterator[FakeAlpaca]:
    async with running_fake() as fake:
        yield fake


@pytest.fixture
async def js(nats_url: str) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(nats_url)
    yield client.jetstream()
    await client.close()


@asynccontextmanager
async def leading(database: Database, bus: Bus, url: str, **options: Any) -> AsyncIterator[Feed]:
    """Make a feed with the lease, whose market is open."""
    async with market_data(url, **options) as client, held_lease(database) as held:
        yield Feed(database, bus, client, held, calendar=Calendar(open_now()))


async def round_of(feed: Feed) -> str:
    return (await feed.take_round(asyncio.Event())).outcome


async def last_ticks(js: JetStreamContext) -> dict[str, PriceTick]:
    found = {}
    for symbol in SYMBOLS:
        message = await js.get_last_msg("PRICES", price_subject(symbol))
        found[symbol] = PriceTick.model_validate_json(message.data or b"")
    return found


# ---- killed between the cache and the bus --------------------------------------------------------


async def test_feeder_that_is_killed_at_any_moment_is_healed_by_one_round_of_the_next(  # noqa: PLR0917
    database: Database,
    database_url: str,
    nats_url: str,
    bus: Bus,
    js: JetStreamContext,
    market: SimulatedMarket,
    unused_tcp_port: int,
) -> None:
    """Afterwards the table and the last values of the stream are the same, and nothing has become older."""
    moments = random.Random(6)
    await market.control("PUT", "stream/load", {"symbols": list(SYMBOLS), "ticks_per_second": 100})
    behind: dict[str, int] = {}
    before: dict[str, PriceTick] = {}
    for kill in KILLS:
        async with Wire(database_url) as postgres, Wire(nats_url) as wire:
            await postgres.connect()
            await wire.connect()
            settings = {
                "PRICE_STREAM_ENABLED": "true",
                "ALPACA_STREAM_URL": market.url.replace("http", "ws", 1),
                "ALPACA_REQUESTS_PER_MINUTE": "100000",
                "PRICE_UPDATE_INTERVAL_SECONDS": "0.2",
            }
            async with price_feeder(
                postgres.url, wire.url, market.url, unused_tcp_port, **settings
            ) as feeder:
                await feeder.wait_for("stream_subscribed", timeout=40)
                await feeder.wait_for("prices_updated", 3)
                if "NATS" in kill:
                    wire.freeze()
                if "PostgreSQL" in kill:
                    postgres.freeze()
                await asyncio.sleep(moments.uniform(0.3, 1.5))
                feeder.process.kill()
                await feeder.process.wait()
        cached = await cached_prices(database, SYMBOLS)
        published = await last_ticks(js)
        behind[kill] = sum(cached[symbol].tick.sequence - published[symbol].sequence for symbol in SYMBOLS)
        await database.fetch("UPDATE leases SET expires_at = now() - interval '1 second'")
        await market.order("server_error", times=2)  # what the market says must not be what heals
        async with leading(database, bus, market.url) as successor:
            assert await round_of(successor) == "failed"
        after = await last_ticks(js)
        cached = await cached_prices(database, SYMBOLS)
        assert after == {symbol: price.tick for symbol, price in cached.items()}, kill
        for symbol, tick in before.items():
            assert after[symbol].sequence > tick.sequence
            assert after[symbol].traded_at >= tick.traded_at
        before = after
    assert behind["while NATS stands still"] > 0  # it was killed between the two


# ---- a market in trouble -------------------------------------------------------------------------

SPOILT: dict[str, dict[str, Any]] = {
    "nan": {},
    "negative_price": {},
    "huge_price": {},
    "zero_price": {},
    "wrong_types": {"as": "object"},
    "missing_symbols": {},
    "null_symbols": {},
    "stale_trades": {"price": "1"},
    "out_of_order": {"price": "1"},
}
BROKEN: dict[str, dict[str, Any]] = {
    "bad_gateway": {},
    "server_error": {"status": 503},
    "empty_body": {},
    "reset": {},
    "redirect": {},
    "truncated_json": {},
    "hang": {"hang_seconds": 2},
    "byte_drip": {"interval_seconds": 0.05},
}


@pytest.mark.parametrize("kind", SPOILT)
async def test_garbage_for_one_symbol_costs_that_symbol_alone_and_is_over_with_the_next_answer(
    database: Database, bus: Bus, market: SimulatedMarket, kind: str
) -> None:
    async with leading(database, bus, market.url) as feed:
        assert await round_of(feed) == "ok"
        before = await cached_price(database, "AAPL")
        assert before
        await market.order(kind, symbols=["AAPL"], **SPOILT[kind])
        done = await feed.take_round(asyncio.Event())
        assert done.rejected == 1
        assert done.confirmed == len(SYMBOLS) - 1
        assert await cached_price(database, "AAPL") == before
        done = await feed.take_round(asyncio.Event())
        assert (done.rejected, done.confirmed) == (0, len(SYMBOLS))


async def test_symbols_that_nobody_asked_for_are_left_alone(
    database: Database, bus: Bus, market: SimulatedMarket
) -> None:
    await market.order("unknown_symbols", symbols=["ZZZZ"])
    async with leading(database, bus, market.url) as feed:
        assert (await feed.take_round(asyncio.Event())).confirmed == len(SYMBOLS)
    assert await cached_price(database, "ZZZZ") is None


@pytest.mark.parametrize("kind", BROKEN)
async def test_broken_answer_costs_its_batch_alone_is_said_once_and_over_with_the_next_one(
    database: Database, bus: Bus, market: SimulatedMarket, kind: str
) -> None:
    signals = Signals()
    async with leading(database, bus, market.url, request_seconds_max=0.5) as feed, signals.of(feed):
        assert await round_of(feed) == "ok"
        before = await cached_price(database, "AAPL")
        assert before
        await market.order(kind, path="/v2/stocks", times=2, **BROKEN[kind])
        with capture_logs() as logged:
            for _ in range(2):
                done = await feed.take_round(asyncio.Event())
                assert (done.outcome, done.confirmed) == ("partial", 1)  # of BTC/USD
                assert await signals.rounds() == Degraded(done.problem)
            assert await cached_price(database, "AAPL") == before
            assert await round_of(feed) == "ok"
            assert await signals.rounds() is None
        said = [line for line in logged if line["event"] in ("prices_not_updated", "prices_recovered")]
        assert [line["event"] for line in said] == ["prices_not_updated", "prices_recovered"]
        assert said[0]["advice"]


async def test_thirty_hangs_take_no_thread_no_task_and_no_connection(
    database: Database, bus: Bus, alpaca: FakeAlpaca
) -> None:
    """Two classes hang in every round; each request is given up by its own deadline, in its own thread."""
    await create_user(database, positions=HELD)
    port = urlsplit(alpaca.url).port

    def of_the_feeder() -> tuple[int, int]:
        """Return the threads of the process, as the kernel counts them, and the connections to the market."""
        connections = psutil.Process().net_connections("tcp")
        return (
            len(os.listdir("/proc/self/task")),
            sum(getattr(each.raddr, "port", None) == port for each in connections),
        )

    def tasks() -> int:
        """Return the tasks, less those of the fake market."""
        return len(asyncio.all_tasks() - alpaca.serving)

    async with leading(database, bus, alpaca.url, request_seconds_max=0.1) as feed:
        alpaca.fault = hangs
        assert await round_of(feed) == "failed"
        threads, _ = of_the_feeder()
        assert sum(thread.name.startswith("alpaca-") for thread in threading.enumerate()) >= THREADS
        tasks_before = tasks()
        for _ in range(15):
            assert await round_of(feed) == "failed"
        assert len(alpaca.asked) == 2 + 30
        threads_after, connections_after = of_the_feeder()
        assert threads_after <= threads
        assert connections_after == 0
        assert tasks() <= tasks_before
        alpaca.fault = None
        alpaca.trades = dict.fromkeys(SYMBOLS, trade("200.5", utc_now().isoformat()))
        assert await round_of(feed) == "ok"


async def test_pause_that_alpaca_asks_for_is_kept_by_the_whole_feeder_and_old_prices_stay(
    database: Database, bus: Bus, alpaca: FakeAlpaca
) -> None:
    await create_user(database, positions=HELD)
    await set_price(database, "AAPL", "190", age=timedelta(minutes=6))
    alpaca.fault = answers("429 Too Many Requests", '{"message": "too many requests."}', Retry_After="60")
    signals = Signals()
    async with leading(database, bus, alpaca.url) as feed, signals.of(feed):
        for _ in range(5):
            assert await round_of(feed) == "failed"
        asked = len(alpaca.asked)
        assert asked <= 2  # one of each class may have been under way when the first answer came
        cached = await cached_price(database, "AAPL")
        assert cached
        assert str(cached.tick.price) == "190.0000"
        assert await signals.rounds() == "answered 429: too many requests."
        said = await signals.prices()
        assert said == f"none confirmed since {cached.confirmed_at:%Y-%m-%dT%H:%M:%SZ}: {feed.problem}"
        assert isinstance(said, Degraded)
        assert REGISTRY.get_sample_value("price_feeder_feed_state", {"state": "stale"}) == 1
        assert metrics.WAITING._value.get() == len(SYMBOLS)
    assert REGISTRY.get_sample_value("price_feeder_feed_state", {"state": "stale"}) is None
    assert metrics.WAITING._value.get() == 0


async def test_budget_that_does_not_suffice_is_said_once_and_never_exceeded(
    database: Database, bus: Bus, alpaca: FakeAlpaca
) -> None:
    symbols = [f"S{number:03}" for number in range(300)]
    await create_user(database, positions=dict.fromkeys(symbols, ("1", "1")))
    alpaca.trades = {symbol: trade("10.25") for symbol in symbols}
    signals = Signals()
    async with leading(database, bus, alpaca.url, requests_per_minute=4) as feed, signals.of(feed):
        with capture_logs() as logged:
            assert (await feed.take_round(asyncio.Event())).waiting == 0
            assert await signals.budget() is None
            assert (await feed.take_round(asyncio.Event())).waiting == 200
            assert (await feed.take_round(asyncio.Event())).waiting == 300
        assert await signals.budget() == "spent: 300 symbols wait for the next round"
        assert [line["symbols"] for line in logged if line["event"] == "request_budget_spent"] == [200]
        assert len(alpaca.asked) == 4


async def test_key_that_is_refused_is_seen_as_such(database: Database, bus: Bus, alpaca: FakeAlpaca) -> None:
    await create_user(database, positions=HELD)
    alpaca.fault = answers("401 Unauthorized", '{"message": "unauthorized."}')
    signals = Signals()
    async with leading(database, bus, alpaca.url) as feed, signals.of(feed):
        with capture_logs() as logged:
            for _ in range(3):
                await round_of(feed)
        (line,) = [line for line in logged if line["event"] == "market_data_unauthorized"]
        assert "ALPACA_API_KEY" in line["advice"]
        assert str(await signals.rounds()).startswith(
            "Alpaca answered 401: unauthorized: check ALPACA_API_KEY"
        )


# ---- streams -------------------------------------------------------------------------------------


def test_pauses_between_tries_grow_to_their_bound_and_are_spread() -> None:
    for failures in range(100):
        pauses = [streams._pause(1.0, 30.0, failures) for _ in range(50)]
        assert all(1.0 <= pause <= min(2.0 ** (failures + 1), 30.0) for pause in pauses)
        assert (
            max(pauses) - min(pauses) > 0.3
        )  # of a hundred clients that were cut off at once, few come at once


async def test_market_that_hangs_up_is_not_stormed(
    database: Database, bus: Bus, market: SimulatedMarket
) -> None:
    """With the pauses as they are: at least a second between two tries of each of the two streams."""
    async with Wire(market.url) as wire:  # it refuses
        connect = streams.connections(
            wire.url.replace("http", "ws", 1), "iex", api_key="key", secret_key="secret"
        )
        tries = 0

        def counted(kind: AssetClass) -> Any:
            def connection() -> streams.Connection:
                nonlocal tries
                tries += 1
                return connect[kind]()

            return connection

        streaming = Streaming({kind: counted(kind) for kind in connect}, feed="iex", symbols_max=30)
        async with market_data(market.url) as client, held_lease(database) as lease:
            feed = Feed(database, bus, client, lease, calendar=Calendar(open_now()), streaming=streaming)
            running = asyncio.create_task(streaming.run(feed))
            began = asyncio.get_running_loop().time()
            assert await round_of(feed) == "ok"  # and says what to stream

            async def are_lost() -> bool:
                return len(streaming.problems) == 2

            await eventually(are_lost)
            for _ in range(5):
                assert await round_of(feed) == "ok"  # polling is the floor
                await asyncio.sleep(0.5)
            seconds = asyncio.get_running_loop().time() - began
            assert 2 <= tries <= 2 * (1 + seconds / streams.PAUSE_SECONDS_MIN)
            running.cancel()
            await asyncio.wait({running})


# ---- what an operator sees -----------------------------------------------------------------------


async def test_every_trouble_is_seen_in_readyz_in_metrics_and_once_in_the_log(
    database_url: str, nats_url: str, market: SimulatedMarket, unused_tcp_port: int
) -> None:
    async with Wire(database_url) as postgres, Wire(nats_url) as wire:
        await postgres.connect()
        await wire.connect()
        await market.control("POST", "stream/faults", {"kind": "refuse_auth", "seconds": 600}, status=201)
        settings = {
            "PRICE_STREAM_ENABLED": "true",
            "ALPACA_STREAM_URL": market.url.replace("http", "ws", 1),
            "ALPACA_REQUESTS_PER_MINUTE": "100000",
        }
        async with price_feeder(postgres.url, wire.url, market.url, unused_tcp_port, **settings) as feeder:
            await feeder.wait_for("prices_updated", timeout=40)

            async def status() -> str:
                said = await feeder.ready()
                assert said
                return str(said["status"])

            # A stream that is refused
            await feeder.check_becomes("streams", "equity refused: ")
            assert await status() == "degraded"
            found = await feeder.metrics()
            assert found['price_feeder_stream_state{state="refused",stream="equity"}'] == 1
            assert found['foliotick_check_state{check="streams",state="degraded"}'] == 1
            assert found["foliotick_tasks"] > 5
            assert found["foliotick_threads"] > THREADS
            assert found["process_open_fds"] > 5

            # A market that wants a pause
            await market.order("rate_limited", retry_after_seconds=2, path="/v2/stocks")
            await feeder.check_becomes("rounds", "answered 429")
            found = await feeder.metrics()
            assert found['price_feeder_requests_total{outcome="rate_limited"}'] == 1
            await feeder.check_becomes("rounds", "ok")

            # A bus that has gone
            await wire.cut()
            await feeder.check_becomes("publishing", "NATS does not take prices")
            assert await status() == "not ready"

            async def prices_wait() -> bool:
                found = await feeder.metrics()
                assert found['foliotick_check_state{check="publishing",state="degraded"}'] == 1
                return found["price_feeder_unpublished_ticks"] > 0

            await eventually(prices_wait, timeout=20, every=0.2)
            await wire.connect()
            await feeder.wait_for("prices_published_again")
            await feeder.check_becomes("nats", "ok")

            # A database that has gone
            await postgres.cut()

            async def is_red() -> bool:
                found = await feeder.metrics()
                assert found['foliotick_check_state{check="postgres",state="failed"}'] == 1
                return await status() == "not ready"

            await eventually(is_red, timeout=20, every=0.2)
            await postgres.connect()
            await feeder.check_becomes("postgres", "ok")
            await feeder.check_becomes("rounds", "ok")
            assert await status() == "degraded"

            assert (await feeder.terminate())[0] == 0
        assert_said_once(feeder)


def assert_said_once(feeder: Process) -> None:
    """Each trouble is one line when it begins, with what to do, and one when it is over."""
    for event in ("market_stream_refused", "prices_unpublished", "prices_not_updated", "check_failed"):
        assert all(line["advice"] for line in feeder.logged(event)), event
    assert len(feeder.logged("market_stream_refused")) == 2  # one for each stream
    assert len(feeder.logged("prices_unpublished")) == len(feeder.logged("prices_published_again")) == 1
    failed = [line["check"] for line in feeder.logged("check_failed")]
    recovered = [line["check"] for line in feeder.logged("check_recovered")]
    assert sorted(failed) == sorted(recovered)
    assert failed.count("postgres") == 1
    assert failed.count("nats") <= 2  # once at the start, before it was connected
    limited = [line for line in feeder.logged("prices_not_updated") if "429" in line["problem"]]
    assert len(limited) == 1
