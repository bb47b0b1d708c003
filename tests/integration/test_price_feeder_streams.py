"""Streams beside polling: what streams bring, and that nothing they do makes prices older than polling would."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from services.price_feeder import streams
from services.price_feeder.queries import cached_price
from shared.bus import Bus
from shared.clock import utc_now
from shared.database import Database
from tests.factories import create_user, set_position
from tests.integration.feeding import OFTEN, Feeding, feeding
from tests.integration.simulated_market import SimulatedMarket, simulated_market
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("held", "hurried")

HELD = {"AAPL": ("1", "1"), "MSFT": ("1", "1"), "BTC/USD": ("1", "1")}
Feeder = Callable[..., AbstractAsyncContextManager[Feeding]]


@pytest.fixture
async def market() -> AsyncIterator[SimulatedMarket]:
    async with simulated_market(rate_limit=100_000) as running:
        yield running


@pytest.fixture
def feeder(database: Database, bus: Bus, nats_url: str, market: SimulatedMarket) -> Feeder:
    return partial(feeding, database, bus, nats_url, market.url)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries that a test can wait for."""
    monkeypatch.setattr(streams, "PAUSE_SECONDS_MIN", 0.05)
    monkeypatch.setattr(streams, "PAUSE_SECONDS_MAX", 0.2)
    monkeypatch.setattr(streams, "OTHER_CONNECTION_PAUSE_SECONDS_MIN", 0.05)
    monkeypatch.setattr(streams, "OTHER_CONNECTION_PAUSE_SECONDS_MAX", 0.2)


async def pin(market: SimulatedMarket, **prices: str) -> None:
    """Let symbols have had their last trade a minute ago; their names may end in _USD for a pair."""
    at = (utc_now() - timedelta(minutes=1)).isoformat()
    pins = {name.replace("_", "/"): {"price": price, "at": at} for name, price in prices.items()}
    await market.control("PUT", "prices", pins)


async def send(market: SimulatedMarket, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await market.control("POST", "stream/messages", {"messages": list(messages)})
    sent: list[dict[str, Any]] = answer["messages"]
    return sent


async def trade(market: SimulatedMarket, symbol: str, price: str, **other: Any) -> dict[str, Any]:
    return (await send(market, {"T": "t", "S": symbol, "p": price, **other}))[0]


async def opened(market: SimulatedMarket) -> set[str]:
    """Return when the connections that are open were opened."""
    return {stream["opened_at"] for stream in (await market.control("GET", "status"))["streams"]}


async def fault(market: SimulatedMarket, kind: str, **parameters: Any) -> None:
    await market.control("POST", "stream/faults", {"kind": kind, **parameters}, status=201)


@pytest.fixture
async def held(database: Database, market: SimulatedMarket) -> int:
    """A user who holds two equities and a coin, whose last trades were a minute ago."""
    await pin(market, AAPL="200", MSFT="400", BTC_USD="30000")
    return await create_user(database, positions=HELD)


async def test_streamed_trades_reach_the_cache_and_then_the_bus(
    feeder: Feeder, market: SimulatedMarket
) -> None:
    async with feeder() as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await fed.says("live")
        assert (fed.statuses[-1].streamed, fed.statuses[-1].polled) == (3, 0)
        await trade(market, "AAPL", "201.5")
        await fed.price_becomes("AAPL", "201.5000")
        await trade(market, "BTC/USD", "30001.25")
        await fed.price_becomes("BTC/USD", "30001.2500")

        async def both_are_heard() -> bool:
            return {"201.5000", "30001.2500"} <= {str(tick.price) for tick in fed.ticks}

        await eventually(both_are_heard)
        assert {tick.feed for tick in fed.ticks} == {"simulated"}
    assert fed.statuses[-1].state == "stopped"


async def test_whether_a_streamed_trade_is_from_the_future_is_judged_by_the_clock_of_all_replicas(
    feeder: Feeder, market: SimulatedMarket
) -> None:
    """It is an hour ahead of this process, whose own clock would refuse the first trade and wait for the second."""
    hour, second = timedelta(hours=1), timedelta(seconds=1)
    async with feeder(now=lambda: utc_now() + hour) as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        later = utc_now() + hour
        await trade(market, "AAPL", "201", t=later.isoformat())
        await fed.price_becomes("AAPL", "201.0000")
        await trade(market, "AAPL", "999", t=(later + hour).isoformat())
        await trade(market, "AAPL", "202", t=(later + second).isoformat())
        await fed.price_becomes("AAPL", "202.0000")


async def test_odd_lots_and_the_like_set_no_price(feeder: Feeder, market: SimulatedMarket) -> None:
    async with feeder() as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await trade(market, "AAPL", "999", c=["@", "I"])
        await trade(market, "AAPL", "998", c=["@", "W"])
        await trade(market, "MSFT", "401")
        await fed.price_becomes("MSFT", "401.0000")
        await fed.price_becomes("AAPL", "200.0000")
        await fed.feed.refresh(["AAPL"])
        await fed.price_becomes("AAPL", "200.0000")  # polling agrees


async def test_subscriptions_follow_what_is_held_without_a_new_connection(
    feeder: Feeder, market: SimulatedMarket, database: Database, held: int
) -> None:
    await pin(market, TSLA="300")
    async with feeder(interval=OFTEN) as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        before = await opened(market)
        await set_position(database, held, "TSLA", "1")
        await set_position(database, held, "AAPL", "0")
        await fed.streams("TSLA", "MSFT", "BTC/USD")
        await trade(market, "TSLA", "301")
        await fed.price_becomes("TSLA", "301.0000")
        assert await opened(market) == before


async def test_most_widely_held_symbols_are_streamed_and_the_rest_polled(
    feeder: Feeder, market: SimulatedMarket, database: Database
) -> None:
    await pin(market, TSLA="300")
    for name in ("alice", "bob"):
        await create_user(database, name, positions={"MSFT": ("1", "1"), "TSLA": ("1", "1")})
    async with feeder(interval=OFTEN, symbols_max=2) as fed:
        await fed.streams("MSFT", "TSLA", "BTC/USD")
        await fed.says("live")
        assert (fed.statuses[-1].streamed, fed.statuses[-1].polled) == (3, 1)
        await trade(market, "AAPL", "202")
        await fed.price_becomes("AAPL", "202.0000")  # by polling


async def test_limit_of_the_plan_is_found_and_used(database: Database, bus: Bus, nats_url: str) -> None:
    symbols = [f"S{number:02}" for number in range(12)]
    async with simulated_market(rate_limit=100_000, stream_symbols_max=7) as market:
        await pin(market, **dict.fromkeys(symbols, "10"))
        await database.fetch("DELETE FROM positions")
        await create_user(database, "many", positions=dict.fromkeys(symbols, ("1", "1")))
        async with feeding(database, bus, nats_url, market.url) as fed:
            await fed.streams(*symbols[:7])
            await fed.says("live")

            async def both_are_said() -> bool:
                return (fed.statuses[-1].streamed, fed.statuses[-1].polled) == (7, 5)

            await eventually(both_are_said)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("drop", {}),
        ("drop", {"code": 1011}),
        ("garbage", {}),
        ("half_frame", {}),
        ("error", {"code": 500, "close": True}),
        ("error", {"code": 407, "close": True}),
        ("error", {"code": 404}),
    ],
)
async def test_stream_that_breaks_is_made_again_and_the_gap_is_filled(
    feeder: Feeder, market: SimulatedMarket, kind: str, parameters: dict[str, Any]
) -> None:
    async with feeder() as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        if kind != "garbage":
            await fault(market, "refuse_handshake", times=4)
        await fault(market, kind, **parameters)
        await pin(market, AAPL="203")  # nothing is sent of it
        if kind == "garbage":
            await trade(market, "MSFT", "402")
            await fed.price_becomes("MSFT", "402.0000")
            return
        await fed.price_becomes("AAPL", "203.0000")
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await trade(market, "AAPL", "204")
        await fed.price_becomes("AAPL", "204.0000")


@pytest.mark.parametrize("code", [401, 402, 409])
async def test_refused_key_is_loud_and_slow_and_polling_goes_on(
    feeder: Feeder, market: SimulatedMarket, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    await fault(market, "refuse_auth", code=code, seconds=600)
    async with feeder(interval=OFTEN) as fed:

        async def are_refused() -> bool:
            return all(state.startswith("refused") for state in fed.streaming.states.values())

        await eventually(are_refused)
        await fed.says("polling")
        await trade(market, "AAPL", "205")
        await fed.price_becomes("AAPL", "205.0000")
    assert capsys.readouterr().out.count("market_stream_refused") == 2  # one for each stream


async def test_second_connection_waits_for_the_place(feeder: Feeder, market: SimulatedMarket) -> None:
    await fault(market, "refuse_auth", code=406, seconds=1)
    async with feeder(interval=OFTEN) as fed:
        await trade(market, "AAPL", "206")
        await fed.price_becomes("AAPL", "206.0000")
        await fed.streams("AAPL", "MSFT", "BTC/USD")


async def test_frozen_stream_is_made_again(
    feeder: Feeder, market: SimulatedMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither frames nor pongs come; polling is the floor meanwhile."""
    monkeypatch.setitem(streams.WEBSOCKET, "ping_interval", 0.3)
    monkeypatch.setitem(streams.WEBSOCKET, "ping_timeout", 0.3)
    async with feeder(interval=OFTEN) as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        before = await opened(market)
        await fault(market, "freeze", seconds=2)
        await trade(market, "AAPL", "207")
        await fed.price_becomes("AAPL", "207.0000", timeout=2)

        async def is_made_again() -> bool:
            return not before & await opened(market)

        await eventually(is_made_again)
        await fed.streams("AAPL", "MSFT", "BTC/USD")


async def test_mute_stream_is_found_out_by_polling(feeder: Feeder, market: SimulatedMarket) -> None:
    """Its pongs come, its trades do not; the rounds are far shorter than what a stream may lag behind."""
    async with feeder(interval=OFTEN) as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        before = await opened(market)
        await fault(market, "mute", seconds=600)
        for number in range(100):
            await trade(market, "AAPL", f"{210 + number}")
            await fed.price_becomes("AAPL", f"{210 + number}.0000")
            if before - await opened(market):
                break
        else:
            raise AssertionError("the stream stayed though polling brought every trade")


async def test_stream_that_lags_makes_no_price_older(feeder: Feeder, market: SimulatedMarket) -> None:
    async with feeder(interval=OFTEN) as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await fault(market, "lag", lag_seconds=2, seconds=3)
        await trade(market, "AAPL", "220")
        await fed.price_becomes("AAPL", "220.0000", timeout=1.5)
        await trade(market, "AAPL", "221")
        await fed.price_becomes("AAPL", "221.0000", timeout=1.5)
        await market.control("DELETE", "stream/faults")
        await trade(market, "MSFT", "420")
        await fed.price_becomes("MSFT", "420.0000")
        prices = [tick.price for tick in fed.ticks if tick.symbol == "AAPL"]
        assert prices == sorted(prices)


async def test_place_of_a_connection_that_is_reaped_late_is_waited_for(
    feeder: Feeder, market: SimulatedMarket
) -> None:
    async with feeder(interval=OFTEN) as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await fault(market, "held_connection", held_seconds=1, seconds=3)
        await fault(market, "drop")
        await trade(market, "AAPL", "222")
        await fed.price_becomes("AAPL", "222.0000", timeout=1.5)
        await fed.streams("AAPL", "MSFT", "BTC/USD")


async def test_malformed_message_costs_itself_alone(feeder: Feeder, market: SimulatedMarket) -> None:
    async with feeder() as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await send(
            market,
            {"T": "t", "S": "AAPL", "p": "208"},
            {"raw": {"T": "t", "S": "MSFT", "p": "four hundred", "t": "2026-03-02T15:00:00Z"}},
            {"raw": [1, 2]},
            {"T": "t", "S": "MSFT", "p": "403"},
        )
        await fed.price_becomes("AAPL", "208.0000")
        await fed.price_becomes("MSFT", "403.0000")
        await fed.streams("AAPL", "MSFT", "BTC/USD")


async def test_corrected_and_cancelled_trades_are_replaced_by_what_counts_instead(
    feeder: Feeder, market: SimulatedMarket, database: Database
) -> None:
    async with feeder() as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        wrong = await trade(market, "AAPL", "2090")
        await fed.price_becomes("AAPL", "2090.0000")
        await send(market, {"T": "c", "S": "AAPL", "oi": wrong["i"], "cp": "209"})
        await fed.price_becomes("AAPL", "209.0000")
        await trade(market, "MSFT", "410")
        await fed.price_becomes("MSFT", "410.0000")
        slip = await trade(market, "MSFT", "4")
        await fed.price_becomes("MSFT", "4.0000")
        await send(market, {"T": "x", "S": "MSFT", "i": slip["i"]})
        await fed.price_becomes("MSFT", "410.0000")  # older than what it replaces
        cached = await cached_price(database, "MSFT")
        assert cached
        assert cached.tick.sequence == 4


async def test_halts_and_resumptions_are_logged(
    feeder: Feeder, market: SimulatedMarket, capsys: pytest.CaptureFixture[str]
) -> None:
    async with feeder() as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await send(market, {"T": "s", "S": "AAPL"}, {"T": "t", "S": "AAPL", "p": "211"})
        await fed.price_becomes("AAPL", "211.0000")
    assert "trading_status" in capsys.readouterr().out


async def test_out_of_order_and_months_old_trades_change_nothing(
    feeder: Feeder, market: SimulatedMarket
) -> None:
    old = (utc_now() - timedelta(days=90)).isoformat()
    async with feeder() as fed:
        await fed.streams("AAPL", "MSFT", "BTC/USD")
        await trade(market, "AAPL", "212")
        await fed.price_becomes("AAPL", "212.0000")
        await send(market, {"T": "t", "S": "AAPL", "p": "100", "t": old}, {"T": "t", "S": "MSFT", "p": "404"})
        await fed.price_becomes("MSFT", "404.0000")
        await fed.price_becomes("AAPL", "212.0000")
