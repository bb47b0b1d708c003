"""The price feeder under load: how long a streamed trade takes to the bus, what many cost, and whether all is right."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import aiohttp
import nats
import orjson
import psutil
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bench.figures import Figure, Measured
from bench.processes import (
    START_SECONDS_MAX,
    Helper,
    cpu_seconds,
    helper,
    running,
    wait_for_port,
    wait_until,
)
from bench.progress import say
from bench.server import Databases, connected
from bench.sizes import Size
from bench.snapshots import kept_portfolios
from local.settings import free_port
from shared.messages import ALL_PRICES, PRICES

FEW, MANY = 1_000, 5_000
"""Trades a second."""
LATENCY_MS_MAX = 20
CPU_PERCENT_MAX = 60
WARM_UP_SECONDS = 3.0
SETTLE_SECONDS_MAX = 10.0
SETTLE_PAUSE_SECONDS = 0.5
_SYMBOLS_MAX = "1000"
_STREAMED = re.compile(r'^price_feeder_streamed_symbols\{stream="equity"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class _Market:
    """The market simulator and its control of the load."""

    url: str
    session: aiohttp.ClientSession

    @property
    def stream_url(self) -> str:
        return self.url.replace("http", "ws")

    async def load(self, symbols: list[str], ticks_per_second: int) -> None:
        body = {"symbols": symbols, "ticks_per_second": ticks_per_second}
        async with self.session.put(f"{self.url}/simulator/stream/load", json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def end_load(self) -> None:
        async with self.session.delete(f"{self.url}/simulator/stream/load") as answer:
            assert answer.status == 200, await answer.text()


async def measure(server: Databases, size: Size, nats_url: str) -> Measured:
    name = await kept_portfolios(server, size.users, seed_like=False)
    market_port, health_port = free_port(), free_port()
    market_url = f"http://127.0.0.1:{market_port}"
    async with server.copy(name) as url, aiohttp.ClientSession() as session:
        async with connected(url) as connection:
            rows = await connection.fetch("SELECT DISTINCT ticker FROM positions ORDER BY ticker")
        symbols = [row["ticker"] for row in rows]
        with (
            running("services.market_simulator", _simulator_environment(market_port)),
            running(
                "services.price_feeder", _feeder_environment(url, nats_url, market_url, health_port)
            ) as feeder,
        ):
            await wait_for_port(market_port)
            await _wait_for_streams(session, health_port, len(symbols))
            market = _Market(market_url, session)
            async with (
                helper("bench.tick_ears", nats_url, f"{market.stream_url}/v2/sip") as ears,
                helper("bench.tick_publisher", nats_url) as publisher,
            ):
                await ears.ask(do="follow", symbols=symbols)
                say(f"  {FEW:,} trades a second")
                few = await _loaded(market.load(symbols, FEW), ears, feeder, size.tick_seconds)
                say(f"  {MANY:,} trades a second")
                many = await _loaded(market.load(symbols, MANY), ears, feeder, size.tick_seconds)
                await market.end_load()
                wrong_at_end = await _wrong_at_end(url, nats_url, ears)
                feeder.terminate()  # which would poll beside the limit
                feeder.wait(15)
                say("  the limit")
                bare_few = await _bare(publisher, ears, symbols, few, size.tick_seconds)
                bare_many = await _bare(publisher, ears, symbols, many, size.tick_seconds)
    return _figures(len(symbols), (few, many), (bare_few, bare_many), wrong_at_end)


@dataclass(frozen=True)
class _Run:
    """What was heard and used during one load."""

    heard: dict[str, Any]
    cpu_percent: float

    @property
    def batch(self) -> int:
        """How many ticks came together."""
        return int(self.heard["ticks"] / self.heard["batches"])


def _figures(symbols: int, ours: tuple[_Run, _Run], limit: tuple[_Run, _Run], wrong_at_end: int) -> Measured:
    (few, many), (bare_few, bare_many) = ours, limit
    figures = []
    for percent in ("p50", "p99"):
        figures.append(
            Figure(
                f"trade due to its tick heard, {FEW:,} a second in {symbols} symbols, {percent}",
                "ms",
                few.heard["since_due"][percent],
                limit=bare_few.heard["since_received"][percent],
                at_most=LATENCY_MS_MAX if percent == "p99" else None,
            )
        )
    figures += [
        Figure(
            f"the feeder's CPU at {MANY:,} trades a second (limit: bare publishing)",
            "% of a core",
            many.cpu_percent,
            limit=bare_many.cpu_percent,
            at_most=CPU_PERCENT_MAX,
        ),
        Figure(
            f"  at {FEW:,} trades a second",
            "% of a core",
            few.cpu_percent,
            limit=bare_few.cpu_percent,
        ),
        Figure("  ticks that went back, or that no trade was", "ticks", many.heard["wrong"], at_most=0),
        Figure("  prices and last values that are not the newest trade", "prices", wrong_at_end, at_most=0),
        Figure(
            "  a trade's tick heard at that load, p99",
            "ms",
            many.heard["since_due"]["p99"],
            limit=bare_many.heard["since_received"]["p99"],
        ),
    ]
    return Measured(figures, {})


async def _loaded(load: Awaitable[None], ears: Helper, feeder: psutil.Process, seconds: float) -> _Run:
    await load
    await asyncio.sleep(min(WARM_UP_SECONDS, seconds))
    return await _heard(ears, feeder, lambda: asyncio.sleep(seconds))


async def _bare(publisher: Helper, ears: Helper, symbols: list[str], ours: _Run, seconds: float) -> _Run:
    """Publish batches as large and as many as ours, each message acknowledged."""

    async def publish() -> None:
        await publisher.ask(
            symbols=symbols,
            batch=ours.batch,
            every_seconds=seconds / ours.heard["batches"],
            seconds=seconds,
            first=1,
            acknowledged=True,
        )

    return await _heard(ears, publisher.measured, publish)


async def _heard(ears: Helper, measured: psutil.Process, work: Callable[[], Awaitable[None]]) -> _Run:
    await ears.ask(do="begin")
    loop = asyncio.get_running_loop()
    used, began = cpu_seconds(measured), loop.time()
    await work()
    spent = (cpu_seconds(measured) - used) / (loop.time() - began) * 100
    return _Run(await ears.ask(do="report"), spent)


async def _wrong_at_end(url: str, nats_url: str, ears: Helper) -> int:
    """Return how many cached prices and last values on the bus are not the symbol's newest trade, once all is quiet."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SETTLE_SECONDS_MAX
    while True:
        sent = (await ears.ask(do="newest"))["trades"]
        newest = {symbol: (at_us, Decimal(str(price))) for symbol, (at_us, price) in sent.items()}
        assert newest
        kept = (await _cached(url), await _last_values(nats_url, len(newest)))
        wrong = sum(prices.get(symbol) != trade for prices in kept for symbol, trade in newest.items())
        if not wrong or loop.time() >= until:
            return wrong
        await asyncio.sleep(SETTLE_PAUSE_SECONDS)


async def _cached(url: str) -> dict[str, tuple[int, Decimal]]:
    async with connected(url) as connection:
        rows = await connection.fetch("SELECT symbol, price, traded_at FROM asset_prices")
    return {row["symbol"]: (_microseconds(row["traded_at"]), row["price"]) for row in rows}


async def _last_values(nats_url: str, count: int) -> dict[str, tuple[int, Decimal]]:
    """Return the last tick of each symbol as a new subscriber gets it."""
    client = await nats.connect(nats_url)
    try:
        subscription = await client.jetstream().subscribe(
            ALL_PRICES,
            stream=PRICES.name,
            config=ConsumerConfig(deliver_policy=DeliverPolicy.LAST_PER_SUBJECT, ack_policy=AckPolicy.NONE),
        )
        found: dict[str, tuple[int, Decimal]] = {}
        while len(found) < count:
            tick = orjson.loads((await subscription.next_msg(timeout=5)).data)
            found[tick["symbol"]] = _microseconds(_instant(tick["traded_at"])), Decimal(tick["price"])
        return found
    finally:
        await client.close()


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _microseconds(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


async def _wait_for_streams(session: aiohttp.ClientSession, health_port: int, symbols: int) -> None:
    async def streams() -> bool:
        try:
            async with session.get(f"http://127.0.0.1:{health_port}/metrics") as answer:
                found = _STREAMED.search(await answer.text())
        except aiohttp.ClientError:
            return False
        return found is not None and float(found[1]) == symbols

    await wait_until(streams, f"the feeder streams {symbols} symbols", seconds_max=START_SECONDS_MAX)


def _simulator_environment(port: int) -> dict[str, str]:
    return {
        "SIMULATOR_HOST": "127.0.0.1",
        "SIMULATOR_PORT": str(port),
        "SIMULATOR_STREAM_SYMBOLS_MAX": _SYMBOLS_MAX,
        "LOG_LEVEL": "WARNING",
    }


def _feeder_environment(
    database_url: str, nats_url: str, market_url: str, health_port: int
) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "NATS_URL": nats_url,
        "ALPACA_API_KEY": "simulated",
        "ALPACA_SECRET_KEY": "simulated",
        "ALPACA_DATA_URL": market_url,
        "ALPACA_BASE_URL": market_url,
        "ALPACA_STREAM_URL": market_url.replace("http", "ws"),
        "ALPACA_STREAM_SYMBOLS_MAX": _SYMBOLS_MAX,
        "HEALTH_HOST": "127.0.0.1",
        "HEALTH_PORT": str(health_port),
        "LOG_LEVEL": "WARNING",
    }
