"""The feeder's answers to requests for prices, from a real cache over a real bus."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from services.price_feeder import answers
from shared import database as databases
from shared.bus import Bus, Refused, Unanswered
from shared.clock import utc_now
from shared.database import Database
from shared.messages import PRICES_REQUESTED, PricesReply, PricesRequested
from tests.factories import set_price
from tests.waiting import eventually


async def ask(bus: Bus, *symbols: str) -> PricesReply:
    """Ask until the feeder is there."""

    async def answer() -> PricesReply | None:
        try:
            return await bus.request(
                PRICES_REQUESTED, PricesRequested(symbols=symbols), PricesReply, timeout_seconds=5
            )
        except Unanswered:
            return None

    found = await eventually(answer)
    assert found is not None
    return found


@pytest.fixture
async def feeder(database: Database, bus: Bus) -> AsyncIterator[None]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answers.run(database, bus, stop))
        yield
        stop.set()


@pytest.mark.usefixtures("feeder")
async def test_known_prices_come_in_the_order_of_the_request_each_once(database: Database, bus: Bus) -> None:
    await set_price(database, "AAPL", "175.25")
    await set_price(database, "BRK.B", "715.50")
    reply = await ask(bus, "BRK.B", "NONE", "AAPL", "BRK.B", "BTC/USD")
    assert [(price.symbol, price.price) for price in reply.prices] == [
        ("BRK.B", Decimal("715.5000")),
        ("AAPL", Decimal("175.2500")),
    ]
    assert reply.unknown == ("NONE", "BTC/USD")


@pytest.mark.usefixtures("feeder")
async def test_a_price_says_when_it_was_last_confirmed(database: Database, bus: Bus) -> None:
    await set_price(database, "AAPL", "175.25", age=timedelta(minutes=7))
    (price,) = (await ask(bus, "AAPL")).prices
    assert timedelta(minutes=7) <= utc_now() - price.confirmed_at < timedelta(minutes=8)
    assert price.sequence >= 1


@pytest.mark.usefixtures("feeder")
async def test_the_longest_answer_fits_into_a_message(database: Database, bus: Bus) -> None:
    symbols = [f"{number:031d}/" for number in range(1000)]
    await database.fetch(
        "INSERT INTO asset_prices (symbol, price, traded_at, received_at, updated_at, feed, sequence)"
        " SELECT unnest($1::text[]), 12345678901.2345, $2, $2, $2, 'simulated', 123456789012",
        symbols,
        datetime(2026, 3, 2, 15, 0, 0, 123456, tzinfo=UTC),
    )
    assert len((await ask(bus, *symbols)).prices) == 1000


async def test_without_the_cache_the_request_is_refused_for_a_while(bus: Bus) -> None:
    nowhere = "postgresql://nobody@127.0.0.1:9/none"
    stop = asyncio.Event()
    async with (
        databases.connect(nowhere, application_name="tests", connections_max=1) as database,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(answers.run(database, bus, stop))
        with pytest.raises(Refused) as refused:
            await ask(bus, "AAPL")
        assert (refused.value.code, refused.value.retry_after_seconds) == (503, 2)
        stop.set()
