"""Of several price feeders one works: the lease on real PostgreSQL, and real processes that are killed and frozen."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import aiohttp
import nats
import pytest
from nats.aio.msg import Msg

from services.price_feeder import lease as leases
from services.price_feeder import queries
from services.price_feeder.lease import Lease
from services.price_feeder.queries import LeaseLost, Term, cached_price
from services.price_feeder.trades import LastTrade
from shared import database as databases
from shared.bus import Bus
from shared.database import Database
from shared.health import Note
from shared.messages import PriceTick
from tests.factories import create_user
from tests.integration.feeder_process import Process, price_feeder
from tests.integration.feeding import feeding
from tests.integration.leases import held_lease
from tests.integration.simulated_market import SimulatedMarket, simulated_market
from tests.waiting import eventually, settled

PortFactory = Callable[[], int]
TEN = datetime(2026, 3, 2, 15, 0, 0, tzinfo=UTC)
TAKEOVER_SECONDS_MAX = 15.0


def last(price: str, at: datetime = TEN, symbol: str = "AAPL") -> LastTrade:
    return LastTrade(symbol, Decimal(price), at, "iex")


async def run_out(database: Database) -> None:
    """Let the lease have run out a second ago."""
    await database.fetch("UPDATE leases SET expires_at = clock_timestamp() - interval '1 second'")


@asynccontextmanager
async def leading(lease: Lease) -> AsyncIterator[list[Term]]:
    """Let a lease be led; give the terms that it got."""
    stop = asyncio.Event()
    terms: list[Term] = []

    async def work(over: asyncio.Event) -> None:
        terms.append(lease.term)
        await over.wait()

    task = asyncio.create_task(lease.lead(work, stop))
    try:
        yield terms
    finally:
        stop.set()
        await task


# ---- the lease -----------------------------------------------------------------------------------


async def test_second_feeder_stands_by_until_the_first_one_stops(database: Database) -> None:
    second = Lease(database, holder="second")
    async with held_lease(database, "first") as first, leading(second) as terms:
        assert first.holds()
        assert await first.check() is None

        async def stands_by() -> bool:
            said = await second.check()
            return isinstance(said, Note) and said == "standby: first has the lease"

        await eventually(stands_by)
        assert terms == []
        assert not second.holds()
    # The first one has released it on its way out of the block; the second one was stopped as well.
    async with held_lease(database, "third") as third:
        assert third.term.number >= 2


async def test_release_lets_the_next_one_begin_at_once(database: Database) -> None:
    async with held_lease(database, "first"):
        pass
    began = time.monotonic()
    async with held_lease(database, "second"):
        assert time.monotonic() - began < leases.ACQUIRE_EVERY_SECONDS


async def test_every_term_has_a_higher_number(database: Database) -> None:
    numbers = []
    for holder in ("first", "second", "first"):
        async with held_lease(database, holder) as lease:
            numbers.append(lease.term.number)
    assert numbers == [1, 2, 3]


async def test_lease_that_outlasts_any_grant_is_free(database: Database) -> None:
    """The server's clock has gone back by an hour."""
    await queries.acquire_lease(database, "first", leases.LASTS)
    await database.fetch("UPDATE leases SET expires_at = clock_timestamp() + interval '1 hour'")
    term, before = await queries.acquire_lease(database, "second", leases.LASTS)
    assert (term, before) == (Term("second", 2), "first")


async def test_running_lease_is_not_granted_again(database: Database) -> None:
    await queries.acquire_lease(database, "first", leases.LASTS)
    assert await queries.acquire_lease(database, "second", leases.LASTS) == (None, "first")
    await run_out(database)
    assert (await queries.acquire_lease(database, "second", leases.LASTS))[0] == Term("second", 2)
    assert not await queries.renew_lease(database, Term("first", 1), leases.LASTS)


async def test_holder_that_cannot_renew_stops_before_the_row_runs_out(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LASTS", timedelta(seconds=3))
    monkeypatch.setattr(leases, "HELD_SECONDS_MAX", 2.0)
    monkeypatch.setattr(leases, "RENEW_EVERY_SECONDS", 0.2)
    lease = Lease(database, holder="first")
    over_at: list[bool] = []
    has_begun = asyncio.Event()
    stop = asyncio.Event()

    async def work(over: asyncio.Event) -> None:
        has_begun.set()
        await over.wait()
        runs = "SELECT expires_at > clock_timestamp() FROM leases"
        over_at.append(await database.fetch_value(runs))
        stop.set()

    async with asyncio.timeout(15):
        task = asyncio.create_task(lease.lead(work, stop))
        await has_begun.wait()
        async with database.transaction() as connection:
            await connection.execute("SELECT FROM leases FOR UPDATE")  # renewals wait for this
            await eventually(lambda: _there_is_one(over_at))
        await task
    assert over_at == [True]
    assert not lease.holds()


async def _there_is_one(found: list[bool]) -> bool:
    return bool(found)


async def test_database_that_is_away_grants_nothing_and_harms_nothing() -> None:
    url = "postgresql://u:p@127.0.0.1:9/none"
    async with databases.connect(url, application_name="tests", connections_max=1) as unreachable:
        lease = Lease(unreachable)
        async with leading(lease) as terms:
            assert isinstance(await lease.check(), Note)
            await asyncio.sleep(0)
        assert terms == []


# ---- fencing -------------------------------------------------------------------------------------


async def test_write_of_a_former_term_does_nothing_and_says_so(database: Database) -> None:
    former, _ = await queries.acquire_lease(database, "first", leases.LASTS)
    assert former
    await queries.store_trades(database, former, [last("200")], TEN)
    await run_out(database)
    current, _ = await queries.acquire_lease(database, "second", leases.LASTS)
    assert current
    with pytest.raises(LeaseLost):
        await queries.store_trades(database, former, [last("201", TEN + timedelta(seconds=1))], TEN)
    cached = await cached_price(database, "AAPL")
    assert cached
    assert str(cached.tick.price) == "200.0000"
    stored = await queries.store_trades(database, current, [last("202", TEN + timedelta(seconds=2))], TEN)
    assert [tick.sequence for tick in stored.changed] == [2]


async def test_write_after_the_lease_ran_out_does_nothing_though_nobody_else_has_it(
    database: Database,
) -> None:
    term, _ = await queries.acquire_lease(database, "first", leases.LASTS)
    assert term
    await run_out(database)
    with pytest.raises(LeaseLost):
        await queries.store_trades(database, term, [last("200")], TEN)
    assert await cached_price(database, "AAPL") is None


async def test_feeder_that_lost_its_lease_ends_its_streams_and_begins_anew(
    database: Database, bus: Bus, nats_url: str
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    async with (
        simulated_market(rate_limit=100_000) as market,
        feeding(database, bus, nats_url, market.url, interval=timedelta(seconds=0.3)) as fed,
    ):
        await fed.streams("AAPL")
        await run_out(database)
        await queries.acquire_lease(database, "another", leases.LASTS)

        async def streams_have_ended() -> bool:
            return not (await market.control("GET", "status"))["streams"]

        await eventually(streams_have_ended)
        assert not fed.lease.holds()
        await run_out(database)

        async def streams_again() -> bool:
            return len((await market.control("GET", "status"))["streams"]) == 1

        await eventually(streams_again)


async def test_holder_without_a_database_says_stale_and_streams_no_more(
    database: Database, bus: Bus, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LASTS", timedelta(seconds=4))
    monkeypatch.setattr(leases, "HELD_SECONDS_MAX", 2.0)
    monkeypatch.setattr(leases, "RENEW_EVERY_SECONDS", 0.2)
    await create_user(database, positions={"AAPL": ("1", "1")})
    async with (
        simulated_market(rate_limit=100_000) as market,
        feeding(database, bus, nats_url, market.url) as fed,
    ):
        await fed.streams("AAPL")
        await fed.says("live")
        async with database.transaction() as connection:
            await connection.execute("SELECT FROM leases FOR UPDATE")  # renewals wait for this
            await fed.says("stale")
            assert not (await market.control("GET", "status"))["streams"]


# ---- processes -----------------------------------------------------------------------------------


@pytest.fixture
async def market(database: Database) -> AsyncIterator[SimulatedMarket]:
    await create_user(database, positions={"AAPL": ("1", "1"), "MSFT": ("1", "1")})
    async with simulated_market(rate_limit=100_000) as running:
        yield running


@asynccontextmanager
async def two_feeders(
    database_url: str, nats_url: str, market: SimulatedMarket, ports: tuple[int, int]
) -> AsyncIterator[tuple[Process, Process]]:
    """Run a feeder that streams, and a second one that stands by."""
    settings = {
        "PRICE_STREAM_ENABLED": "true",
        "ALPACA_STREAM_URL": market.url.replace("http", "ws", 1),
        "ALPACA_REQUESTS_PER_MINUTE": "100000",
    }
    async with price_feeder(database_url, nats_url, market.url, ports[0], **settings) as first:
        await first.wait_for("stream_subscribed")
        async with price_feeder(database_url, nats_url, market.url, ports[1], **settings) as second:
            await second.wait_for("standby")
            yield first, second


async def open_streams(market: SimulatedMarket) -> int:
    return len((await market.control("GET", "status"))["streams"])


async def test_standby_is_ready_streams_nothing_and_takes_over_at_once_from_one_that_stops(
    database_url: str, nats_url: str, market: SimulatedMarket, unused_tcp_port_factory: PortFactory
) -> None:
    ports = unused_tcp_port_factory(), unused_tcp_port_factory()
    async with two_feeders(database_url, nats_url, market, ports) as (first, second):
        async with aiohttp.ClientSession(second.health_url) as client:

            async def is_ready_and_stands_by() -> bool:
                async with client.get("/readyz") as ready:
                    said: str = (await ready.json())["checks"]["lease"]
                    return ready.status == 200 and said.startswith("standby: ")

            await eventually(is_ready_and_stands_by)
        assert await open_streams(market) == 1
        assert second.logged("prices_updated") == []
        assert (await first.terminate())[0] == 0
        began = time.monotonic()
        await second.wait_for("stream_subscribed")
        assert time.monotonic() - began < 5
        assert await open_streams(market) == 1


async def test_standby_takes_over_from_one_that_is_killed(
    database_url: str, nats_url: str, market: SimulatedMarket, unused_tcp_port_factory: PortFactory
) -> None:
    ports = unused_tcp_port_factory(), unused_tcp_port_factory()
    async with two_feeders(database_url, nats_url, market, ports) as (first, second):
        first.process.kill()
        killed_at = time.monotonic()
        await second.wait_for("stream_subscribed")
        assert time.monotonic() - killed_at < TAKEOVER_SECONDS_MAX
        assert second.logged("lease_acquired")[0]["term"] == 2


async def test_feeder_that_was_frozen_writes_and_publishes_nothing_when_it_wakes(
    database: Database,
    database_url: str,
    nats_url: str,
    market: SimulatedMarket,
    unused_tcp_port_factory: PortFactory,
) -> None:
    ports = unused_tcp_port_factory(), unused_tcp_port_factory()
    ticks: list[PriceTick] = []

    async def heard(message: Msg) -> None:
        ticks.append(PriceTick.model_validate_json(message.data))

    listener = await nats.connect(nats_url)
    async with two_feeders(database_url, nats_url, market, ports) as (first, second):
        await market.control("PUT", "stream/load", {"symbols": ["AAPL", "MSFT"], "ticks_per_second": 50})
        first.process.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        await second.wait_for("prices_updated")  # the frozen one's connection has the stream's place still
        assert time.monotonic() - frozen_at < TAKEOVER_SECONDS_MAX
        await listener.subscribe("prices.v1.>", cb=heard)
        await settled(listener)
        rounds = len(first.logged("prices_updated"))
        first.process.send_signal(signal.SIGCONT)
        await first.wait_for("lease_lost")
        await first.wait_for("standby")
        await second.wait_for("stream_subscribed")
        assert await open_streams(market) == 1
        seen = len(ticks)

        async def many_more() -> bool:
            return len(ticks) >= seen + 20

        await eventually(many_more)
        assert len(first.logged("prices_updated")) <= rounds + 1  # at most the end of the round it was in
    await listener.close()
    for symbol in ("AAPL", "MSFT"):
        sequences = [tick.sequence for tick in ticks if tick.symbol == symbol]
        assert sequences == sorted(sequences)
        cached = await cached_price(database, symbol)
        assert cached
        assert cached.tick.sequence >= sequences[-1]
