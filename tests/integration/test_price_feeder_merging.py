"""However streams and polling interleave, the cache ends with the newest trade and never goes back."""

import itertools
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.price_feeder import queries
from services.price_feeder.conflation import Conflation, StreamedTrade
from services.price_feeder.queries import cached_price
from services.price_feeder.trades import LastTrade, Rejection, streamed_last_trade
from shared.database import Database
from shared.messages import PriceTick
from tests.factories import create_user, set_position

TEN = datetime(2026, 3, 2, 15, 0, 0, tzinfo=UTC)
TEN_NS = int(TEN.timestamp()) * 10**9
NAMES = (f"X{number}" for number in itertools.count())

STEPS = st.lists(
    st.tuples(
        st.sampled_from(("trade", "trade", "hear", "flush", "ask", "answer")),
        st.integers(min_value=0, max_value=3),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_any_interleaving_of_stream_and_polling_ends_with_the_newest_trade(
    database: Database, steps: list[tuple[str, int]]
) -> None:
    """A trade is heard late and out of order, asked for early and answered late; several may share an instant."""
    term, _ = await queries.acquire_lease(database, "tests", timedelta(seconds=10))
    assert term
    symbol = next(NAMES)
    conflation = Conflation(0.0, spacing_seconds=0.0)
    market: list[StreamedTrade] = []
    on_the_way: list[StreamedTrade] = []
    asked: list[StreamedTrade] = []
    ticks: list[PriceTick] = []
    at = TEN

    async def store(trade: LastTrade | Rejection, *, in_order: bool) -> None:
        nonlocal at
        assert isinstance(trade, LastTrade)
        at += timedelta(milliseconds=1)
        ticks.extend((await queries.store_trades(database, term, [trade], at, in_order=in_order)).changed)

    async def flush() -> None:
        for trade in conflation.batch(0.0).values():
            await store(streamed_last_trade(symbol, trade), in_order=True)

    for step, number in (("trade", 0), *steps, *[("hear", 0)] * 40, ("flush", 0)):
        if step == "trade":
            # Of one instant, of the same microsecond, or later.
            later_ns = (0, 1_000_000, 400, 2_000_000)[number] if market else 0
            at_ns = (market[-1].traded_at_ns if market else TEN_NS) + later_ns
            trade = StreamedTrade(100.0 + len(market), at_ns, len(market), "iex")
            market.append(trade)
            on_the_way.append(trade)
        elif step == "hear" and on_the_way:
            # Out of order, but for trades of one instant, whose order is all that tells them apart.
            at_ns = on_the_way[min(number, len(on_the_way) - 1)].traded_at_ns
            first = next(place for place, each in enumerate(on_the_way) if each.traded_at_ns == at_ns)
            conflation.take(symbol, on_the_way.pop(first))
        elif step == "flush":
            await flush()
        elif step == "ask" and market:
            asked.append(market[-1])
        elif step == "answer" and asked:
            await store(streamed_last_trade(symbol, asked.pop(0)), in_order=False)
    cached = await cached_price(database, symbol)
    assert cached
    assert cached.tick == ticks[-1]
    assert cached.tick.price == Decimal(str(market[-1].price))
    assert [tick.sequence for tick in ticks] == list(range(1, len(ticks) + 1))
    assert [tick.traded_at for tick in ticks] == sorted(tick.traded_at for tick in ticks)


async def test_withdrawn_trade_is_replaced_by_an_older_one_but_nothing_else_is(database: Database) -> None:
    term, _ = await queries.acquire_lease(database, "tests", timedelta(seconds=10))
    assert term
    second = timedelta(seconds=1)
    wrong, right = TEN + 5 * second, TEN + 3 * second

    def trade(symbol: str, price: str, when: datetime) -> LastTrade:
        return LastTrade(symbol, Decimal(price), when, "iex")

    await queries.store_trades(
        database, term, [trade("AAPL", "2000", wrong), trade("MSFT", "400", wrong)], TEN
    )
    answers = [trade("AAPL", "200", right), trade("MSFT", "399", right)]
    withdrawn = {"AAPL": wrong}
    stored = await queries.store_trades(database, term, answers, TEN + second, withdrawn=withdrawn)
    assert [(tick.symbol, tick.sequence) for tick in stored.changed] == [("AAPL", 2)]
    again = await queries.store_trades(database, term, answers, TEN + 2 * second, withdrawn=withdrawn)
    assert again.changed == ()
    # An answer that still has the withdrawn trade changes nothing.
    same = await queries.store_trades(
        database, term, [trade("MSFT", "400", wrong)], TEN + second, withdrawn={"MSFT": wrong}
    )
    assert same.changed == ()


async def test_most_widely_held_symbols_come_first(database: Database) -> None:
    for number in range(5):
        user_id = await create_user(
            database, f"user{number}", positions={"AAPL": ("1", "1"), "BTC/USD": ("1", "1")}
        )
        if number < 3:
            await set_position(database, user_id, "MSFT", "1")
        if number < 4:
            await set_position(database, user_id, "SOLD", "0")
    await set_position(database, user_id, "TSLA", "1")
    await set_position(database, user_id, "GME", "1")
    most = await queries.most_widely_held(database, is_pair=False, count_max=3)
    assert most == ["AAPL", "MSFT", "GME"]
    assert await queries.most_widely_held(database, is_pair=True, count_max=3) == ["BTC/USD"]
