"""The price feeder as an operator runs it: `python -m services.price_feeder`."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal

import aiohttp
import psutil
import pytest

from services.price_feeder.queries import cached_price
from shared.database import Database
from tests.factories import create_user
from tests.integration.fake_alpaca import FakeAlpaca, answers, hangs, running_fake, trade
from tests.integration.feeder_process import price_feeder
from tests.waiting import eventually

CHECKS = (
    "postgres",
    "schema",
    "nats",
    "clock",
    "lease",
    "prices",
    "rounds",
    "budget",
    "streams",
    "publishing",
)


@pytest.fixture
async def alpaca() -> AsyncIterator[FakeAlpaca]:
    async with running_fake() as fake:
        yield fake


async def test_prices_flow_and_sigterm_ends_it_with_exit_code_0(
    database: Database, database_url: str, nats_url: str, alpaca: FakeAlpaca, unused_tcp_port: int
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1"), "GONE": ("1", "1")})
    alpaca.headers = {"X-Market-Simulated": "true"}
    alpaca.trades = {"AAPL": trade("200.5")}
    async with price_feeder(database_url, nats_url, alpaca.url, unused_tcp_port) as feeder:
        await feeder.wait_for("prices_updated", 3)
        cached = await cached_price(database, "AAPL")
        assert cached
        assert cached.tick.price == Decimal("200.5")
        first = feeder.logged("prices_updated")[0]
        assert {
            name: first[name] for name in ("symbols", "confirmed", "changed", "rejected", "simulated")
        } == {
            "symbols": 2,
            "confirmed": 1,
            "changed": 1,
            "rejected": 1,
            "simulated": True,
        }
        assert [line["reasons"] for line in feeder.logged("symbols_rejected")] == [{"GONE": "missing"}]
        async with aiohttp.ClientSession(feeder.health_url) as client:
            async with client.get("/readyz") as ready:
                assert await ready.json() == {
                    "service": "price_feeder",
                    "status": "ready",
                    "checks": dict.fromkeys(CHECKS, "ok"),
                }
            async with client.get("/metrics") as metrics:
                text = await metrics.text()
        assert 'price_feeder_requests_total{outcome="ok"}' in text
        assert 'price_feeder_rejected_symbols_total{reason="missing"}' in text
        code, seconds = await feeder.terminate()
        assert code == 0
        assert seconds < 2
        assert feeder.errors == []


async def test_sigterm_during_a_hanging_request_is_obeyed_at_once(
    database: Database, database_url: str, nats_url: str, alpaca: FakeAlpaca, unused_tcp_port: int
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1"), "BTC/USD": ("1", "1")})
    alpaca.fault = hangs
    async with price_feeder(database_url, nats_url, alpaca.url, unused_tcp_port) as feeder:

        async def is_asked() -> bool:
            return len(alpaca.asked) == 2

        await eventually(is_asked, timeout=20)
        code, seconds = await feeder.terminate()
        assert code == 0
        assert seconds < 2
        assert feeder.errors == []


async def test_wrong_key_is_loud_once_and_slow_and_the_service_stays_up(
    database: Database, database_url: str, nats_url: str, alpaca: FakeAlpaca, unused_tcp_port: int
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.fault = answers("403 Forbidden", '{"message": "forbidden."}')
    async with price_feeder(database_url, nats_url, alpaca.url, unused_tcp_port) as feeder:
        await feeder.wait_for("prices_updated", 4)
        (loud,) = feeder.logged("market_data_unauthorized")
        assert loud["level"] == "error"
        assert loud["problem"].startswith("Alpaca answered 403: forbidden: check ALPACA_API_KEY")
        assert len(alpaca.asked) == 1
        code, seconds = await feeder.terminate()
        assert code == 0
        assert seconds < 2


async def test_disabled_feeder_says_so_stays_healthy_and_asks_nothing(
    database: Database, database_url: str, nats_url: str, alpaca: FakeAlpaca, unused_tcp_port: int
) -> None:
    await create_user(database, positions={"AAPL": ("1", "1")})
    settings = {"PRICE_UPDATE_ENABLED": "false", "ALPACA_API_KEY": "", "ALPACA_SECRET_KEY": ""}
    async with price_feeder(database_url, nats_url, alpaca.url, unused_tcp_port, **settings) as feeder:
        await feeder.wait_for("price_updates_disabled")
        async with aiohttp.ClientSession(feeder.health_url) as client:

            async def is_ready() -> bool:
                async with client.get("/readyz") as ready:
                    return ready.status == 200

            await eventually(is_ready)
        assert (await feeder.terminate())[0] == 0
    assert alpaca.asked == []


async def test_missing_key_stops_the_start_in_words(
    database_url: str, nats_url: str, alpaca: FakeAlpaca, unused_tcp_port: int
) -> None:
    async with price_feeder(
        database_url, nats_url, alpaca.url, unused_tcp_port, ALPACA_SECRET_KEY=""
    ) as feeder:
        assert await asyncio.wait_for(feeder.process.wait(), 20) == 2
    assert "ALPACA_SECRET_KEY is not set" in "".join(feeder.errors)
    assert "Traceback" not in "".join(feeder.errors)


async def test_process_is_small_and_idle(
    database: Database, database_url: str, nats_url: str, alpaca: FakeAlpaca, unused_tcp_port: int
) -> None:
    symbols = [f"S{number}" for number in range(250)]
    await create_user(database, positions=dict.fromkeys(symbols, ("1", "1")))
    alpaca.trades = dict.fromkeys(symbols, trade("10.25"))
    async with price_feeder(database_url, nats_url, alpaca.url, unused_tcp_port) as feeder:
        await feeder.wait_for("prices_updated", 6)
        process = psutil.Process(feeder.process.pid)
        threads = process.num_threads()
        assert process.memory_info().rss < 220 * 1024 * 1024
        before, rounds = process.cpu_times(), len(feeder.logged("prices_updated"))
        await feeder.wait_for("prices_updated", rounds + 10)
        after = process.cpu_times()
        used = after.user + after.system - before.user - before.system
        assert used / 10 < 0.25  # seconds a round; at one round in 10 s that is 2.5 % of a core
        assert process.num_threads() == threads
