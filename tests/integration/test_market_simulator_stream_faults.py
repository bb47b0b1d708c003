"""Every fault of the streams as a client sees it on the wire."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest
from aiohttp import WSMsgType, WSServerHandshakeError
from alpaca.data.live import StockDataStream

from tests.integration.simulated_market import KEYS, SimulatedMarket, simulated_market
from tests.integration.simulated_stream import (
    CONNECTED,
    RawStream,
    alpaca_stream,
    authenticated,
    raw_stream,
    running,
)
from tests.waiting import eventually

TRADE = {"T": "t", "S": "NEWCO", "p": 10}


@pytest.fixture
async def market() -> AsyncIterator[SimulatedMarket]:
    async with simulated_market(seed=1) as served:
        yield served


async def order(market: SimulatedMarket, kind: str, **parameters: object) -> None:
    await market.control("POST", "stream/faults", {"kind": kind, **parameters}, status=201)


async def trade(market: SimulatedMarket, *messages: object) -> None:
    await market.control("POST", "stream/messages", {"messages": messages or [TRADE]})


def error(code: int, words: str) -> list[dict[str, object]]:
    return [{"T": "error", "code": code, "msg": words}]


async def pinged(stream: RawStream) -> bool:
    """Ping and tell whether a pong comes within a moment; no other frame may."""
    await stream.socket.ping(b"?")
    try:
        heard = await stream.socket.receive(timeout=0.3)
    except TimeoutError:
        return False
    assert (heard.type, heard.data) == (WSMsgType.PONG, b"?")
    return True


# ---- refusals ------------------------------------------------------------------------------------


async def test_handshakes_are_refused_as_often_as_ordered(market: SimulatedMarket) -> None:
    await order(market, "refuse_handshake", status=429, times=2, path="/v2/iex")
    async with authenticated(market, "/v2/sip"):
        pass
    for _ in range(2):
        with pytest.raises(WSServerHandshakeError) as refused:
            await market.http.ws_connect(market.url + "/v2/iex", headers=KEYS)
        assert refused.value.status == 429
    async with authenticated(market, "/v2/iex"):
        pass
    attempts = (await market.control("GET", "status"))["stream_attempts"]
    assert [attempt["path"] for attempt in attempts] == ["/v2/sip", *["/v2/iex"] * 3]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (402, "auth failed"),
        (406, "connection limit exceeded"),
        (408, "v2 not enabled"),
        (409, "insufficient subscription"),
        (500, "internal error"),
    ],
)
async def test_authentication_is_refused_with_any_code(
    market: SimulatedMarket, code: int, words: str
) -> None:
    await order(market, "refuse_auth", code=code)
    async with raw_stream(market, packed=True) as stream:
        assert await stream.frame() == error(code, words)
        assert await stream.closed() == 1000
    async with authenticated(market, packed=True):
        pass


async def test_alpaca_py_stops_when_its_subscription_is_insufficient(market: SimulatedMarket) -> None:
    await order(market, "refuse_auth", code=409)
    async with alpaca_stream(market, StockDataStream, "/v2/iex") as heard:
        heard.stream.subscribe_trades(heard.handler, "AAPL")
        await asyncio.wait_for(heard.stream._run_forever(), 10)  # returns by itself


async def test_a_subscription_is_refused_and_stays_what_it_was(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "refuse_subscribe", code=410)
        assert [await stream.subscribe(trades=["OTHER"])] == error(
            410, "invalid subscribe action for this feed"
        )
        assert (await stream.subscribe(bars=["OTHER"]))["trades"] == ["NEWCO"]


async def test_the_limit_of_symbols_can_be_lowered(market: SimulatedMarket) -> None:
    await order(market, "symbol_limit", symbols_max=1)
    async with authenticated(market, "/v2/sip") as stream:
        assert [await stream.subscribe(trades=["ONE", "TWO"])] == error(405, "symbol limit exceeded")
        assert (await stream.subscribe(trades=["ONE"]))["trades"] == ["ONE"]
        await market.control("DELETE", "stream/faults")
        assert (await stream.subscribe(trades=["TWO"]))["trades"] == ["ONE", "TWO"]


async def test_a_place_is_held_after_its_stream_has_ended(market: SimulatedMarket) -> None:
    await order(market, "held_connection", held_seconds=0.5)
    async with authenticated(market):
        pass

    async def has_left() -> bool:
        return not (await market.control("GET", "status"))["streams"]

    await eventually(has_left)
    async with raw_stream(market) as stream:
        assert await stream.frame() == error(406, "connection limit exceeded")

    async def is_free() -> bool:
        async with raw_stream(market) as stream:
            return bool((await stream.frame())[0]["T"] == "success")

    assert await eventually(is_free)


# ---- errors and ends -----------------------------------------------------------------------------


async def test_an_error_comes_while_the_stream_runs(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await order(market, "error", code=500)
        assert await stream.frame() == error(500, "internal error")
        await order(market, "error", code=407, close=True)
        assert await stream.frame() == error(407, "slow client")
        assert await stream.closed() == 1000


@pytest.mark.parametrize(("code", "seen"), [(1012, 1012), (4000, 4000), (None, 1006)])
async def test_all_streams_are_dropped(market: SimulatedMarket, code: int | None, seen: int) -> None:
    async with authenticated(market) as stocks, authenticated(market, "/v1beta3/crypto/us") as crypto:
        await order(market, "drop", **({} if code is None else {"code": code}))
        assert [await stocks.closed(), await crypto.closed()] == [seen, seen]


async def test_streams_of_one_endpoint_are_dropped_later(market: SimulatedMarket) -> None:
    async with (
        authenticated(market) as stocks,
        authenticated(market, "/v1beta3/crypto/us", autoping=False) as crypto,
    ):
        ordered_at = monotonic()
        await order(market, "drop", path="/v2", after_seconds=0.3)
        assert await stocks.closed() == 1006
        assert monotonic() - ordered_at >= 0.3
        assert await pinged(crypto)


async def test_every_stream_lives_for_some_time_only(market: SimulatedMarket) -> None:
    async with authenticated(market) as before:
        await order(market, "drop_after", after_seconds=0.2, code=1001)
        assert await before.closed() == 1001
    async with authenticated(market) as after:
        assert await after.closed() == 1001


async def test_alpaca_py_comes_back_after_a_drop(market: SimulatedMarket) -> None:
    async with alpaca_stream(market, StockDataStream, "/v2/iex", raw_data=True) as heard:
        heard.stream._reconnect_min_backoff = 0.05
        heard.stream.subscribe_trades(heard.handler, "NEWCO")

        async def hears_trades() -> bool:
            await trade(market)
            return len(heard.messages) > 0

        async with running(heard):
            await eventually(hears_trades)
            await order(market, "drop")
            heard.messages.clear()
            await eventually(hears_trades)


# ---- silence and delay ---------------------------------------------------------------------------


async def test_a_mute_stream_answers_pings_and_loses_its_trades(market: SimulatedMarket) -> None:
    async with authenticated(market, autoping=False) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "mute")
        await trade(market)
        assert await pinged(stream)
        assert (await stream.subscribe(trades=["OTHER"]))["trades"] == ["NEWCO", "OTHER"]
        await market.control("DELETE", "stream/faults")
        await trade(market, TRADE | {"p": 11})
        assert [message["p"] for message in await stream.frame()] == [11]
        (listed,) = (await market.control("GET", "status"))["streams"]
        assert listed["messages_lost"] == 1


async def test_a_frozen_stream_does_nothing_until_it_thaws(market: SimulatedMarket) -> None:
    async with authenticated(market, autoping=False) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "freeze")
        await trade(market)
        await stream.say(action="subscribe", trades=["OTHER"])
        assert not await pinged(stream)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(market.http.ws_connect(market.url + "/v2/sip"), 0.3)
        await market.control("DELETE", "stream/faults")
        heard = [await stream.socket.receive(timeout=10) for _ in range(2)]
        assert {one.type for one in heard} == {WSMsgType.TEXT, WSMsgType.PONG}  # the answers of that time


async def test_a_fault_ends_by_its_time(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "mute", seconds=0.3)
        status = await market.control("GET", "status")
        assert status["stream_faults"][0]["kind"] == "mute"
        assert 0 < status["stream_faults"][0]["seconds"] <= 0.3

        async def is_over() -> bool:
            return not (await market.control("GET", "status"))["stream_faults"]

        await eventually(is_over)
        await trade(market)
        assert (await stream.frame())[0]["S"] == "NEWCO"


async def test_a_lagging_stream_is_late_and_in_order(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "lag", lag_seconds=0.4)
        sent_at = monotonic()
        await trade(market, TRADE | {"p": 1})
        await market.control("DELETE", "stream/faults")
        await trade(market, TRADE | {"p": 2})
        assert (await stream.frame())[0]["p"] == 1
        assert monotonic() - sent_at >= 0.4
        assert (await stream.frame())[0]["p"] == 2


@pytest.mark.parametrize("packed", [False, True])
async def test_a_dripping_frame_is_whole_in_the_end(market: SimulatedMarket, packed: bool) -> None:
    async with authenticated(market, packed=packed) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "slow_drip", piece_bytes=4, interval_seconds=0.005)
        sent_at = monotonic()
        await trade(market)
        assert (await stream.frame())[0]["p"] == 10
        assert monotonic() - sent_at > 0.05  # some 100 bytes in pieces of 4, 5 ms after each


# ---- bad frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
async def test_garbage_is_a_frame_that_nobody_can_read(market: SimulatedMarket, packed: bool) -> None:
    async with authenticated(market, packed=packed) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "garbage")
        with pytest.raises(ValueError):  # noqa: PT011 - json's and msgpack's errors have no more in common
            await stream.frame()
        await trade(market)
        assert (await stream.frame())[0]["p"] == 10  # the stream goes on


async def test_a_malformed_message_is_among_good_ones(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["NEWCO"])
        await order(market, "malformed")
        await order(market, "malformed", message={"T": "t"})
        for expected in ("not a message", {"T": "t"}):
            await trade(market, TRADE, TRADE | {"p": 11})
            first, malformed, second = await stream.frame()
            assert (first["p"], malformed, second["p"]) == (10, expected, 11)
        await trade(market)
        assert len(await stream.frame()) == 1


async def test_half_a_frame_is_the_last_that_is_heard(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await order(market, "half_frame")
        assert await stream.closed() == 1006


async def test_a_slow_client_is_sent_away(market: SimulatedMarket) -> None:
    streams = market.simulator.streams
    streams.queued_bytes_max = 2_000_000
    async with authenticated(market, compress=0) as stream:
        assert stream.socket._response.connection is not None
        transport = stream.socket._response.connection.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()

        async def is_gone() -> bool:
            await trade(market, {"raw": "x" * 900_000})
            return not streams.open

        await eventually(is_gone)
        assert (await market.control("GET", "status"))["streams"] == []


# ---- what is wrong with an order -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "gremlins"}, "does not match any of the expected tags"),
        ({"kind": "refuse_auth", "code": 418}, "must be one of 400, 401"),
        ({"kind": "refuse_auth", "times": 1, "seconds": 1}, "give times or seconds, not both"),
        ({"kind": "mute", "times": 1}, "Extra inputs are not permitted"),
        ({"kind": "drop", "path": "simulator"}, "must begin with /v"),
        ({"kind": "lag"}, "lag_seconds: Field required"),
    ],
)
async def test_a_wrong_fault_is_refused_in_words(
    market: SimulatedMarket, body: dict[str, Any], words: str
) -> None:
    answer = await market.control("POST", "stream/faults", body, status=422)
    assert words in answer["message"]


async def test_the_number_of_faults_is_bounded(market: SimulatedMarket) -> None:
    for _ in range(100):
        await order(market, "mute")
    answer = await market.control("POST", "stream/faults", {"kind": "mute"}, status=422)
    assert answer == {"message": "100 faults of streams stand; delete them first"}


async def test_a_stream_that_is_refused_says_hello_first(market: SimulatedMarket) -> None:
    await order(market, "refuse_auth", seconds=60)
    for _ in range(2):
        socket = await market.http.ws_connect(market.url + "/v2/iex", headers=KEYS)
        assert [await socket.receive_json(), await socket.receive_json()] == [
            CONNECTED,
            error(402, "auth failed"),
        ]
        await socket.close()
