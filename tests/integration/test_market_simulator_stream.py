"""The simulator's streams: alpaca-py's classes work against them unchanged, and say what REST says."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has no types of its own
import pytest
from aiohttp import WSServerHandshakeError
from alpaca.data.enums import DataFeed
from alpaca.data.live import CryptoDataStream, StockDataStream
from alpaca.data.models import Bar, Quote, Trade, TradeCancel, TradeCorrection, TradingStatus

from services.market_simulator.instants import MINUTE_NS, ns_of_text, rfc3339
from tests.integration.simulated_market import SimulatedMarket, replayed_week, simulated_market
from tests.integration.simulated_stream import (
    AUTHENTICATED,
    alpaca_stream,
    authenticated,
    raw_stream,
    running,
)
from tests.waiting import eventually

PIN = "2026-11-20T15:00:00.123456789Z"


@pytest.fixture
async def market() -> AsyncIterator[SimulatedMarket]:
    async with simulated_market(seed=1) as served:
        yield served


async def latest(market: SimulatedMarket, symbol: str) -> dict[str, Any]:
    """Return the latest trade over HTTP."""
    path = (
        f"/v1beta3/crypto/us/latest/trades?symbols={symbol}"
        if "/" in symbol
        else f"/v2/stocks/trades/latest?symbols={symbol}"
    )
    trade = (await market.get(path))["trades"][symbol]
    assert isinstance(trade, dict)
    return trade


async def send(market: SimulatedMarket, *messages: object, **options: object) -> list[Any]:
    """Order messages and return them as they were sent."""
    answer = await market.control("POST", "stream/messages", {"messages": messages, **options})
    assert isinstance(answer["messages"], list)
    return answer["messages"]


# ---- alpaca-py -----------------------------------------------------------------------------------


async def test_alpaca_py_hears_the_trades_and_quotes_of_stocks(market: SimulatedMarket) -> None:
    async with alpaca_stream(market, StockDataStream, "/v2/iex") as heard:
        heard.stream.subscribe_trades(heard.handler, "AAPL", "BRK.B")
        heard.stream.subscribe_quotes(heard.handler, "AAPL")
        async with running(heard):

            async def all_traded() -> bool:
                trades = {trade.symbol for trade in heard.of(Trade)}
                return trades == {"AAPL", "BRK.B"} and len(heard.of(Quote)) > 0

            await eventually(all_traded)
            trade = next(one for one in heard.of(Trade) if one.symbol == "AAPL")
            quote = heard.of(Quote)[0]
    assert (trade.exchange, trade.tape, trade.conditions[0]) == ("V", "C", "@")
    assert abs((datetime.now(UTC) - trade.timestamp).total_seconds()) < 10
    assert quote.symbol == "AAPL"
    assert quote.bid_price < trade.price < quote.ask_price


async def test_alpaca_py_hears_raw_trades_of_crypto_to_the_nanosecond(market: SimulatedMarket) -> None:
    async with alpaca_stream(market, CryptoDataStream, "/v1beta3/crypto/us", raw_data=True) as heard:
        heard.stream.subscribe_trades(heard.handler, "BTC/USD")
        async with running(heard):

            async def is_subscribed() -> bool:
                streams = (await market.control("GET", "status"))["streams"]
                return bool(streams and streams[0]["subscriptions"]["trades"] == ["BTC/USD"])

            await eventually(is_subscribed)
            await market.control("PUT", "prices", {"BTC/USD": {"price": "98765.43", "at": PIN}})

            async def is_heard() -> bool:
                return any(message["p"] == 98765.43 for message in heard.messages)

            await eventually(is_heard)
    pinned = next(message for message in heard.messages if message["p"] == 98765.43)
    assert set(pinned) == {"T", "S", "p", "s", "i", "tks", "t"}
    assert (pinned["T"], pinned["S"]) == ("t", "BTC/USD")
    assert isinstance(pinned["t"], msgpack.Timestamp)
    assert pinned["t"].to_unix_nano() == ns_of_text(PIN)


async def test_alpaca_py_parses_corrections_cancels_and_statuses(market: SimulatedMarket) -> None:
    async with alpaca_stream(market, StockDataStream, "/v2/sip", feed=DataFeed.SIP) as heard:
        heard.stream.subscribe_trades(heard.handler, "NEWCO")
        heard.stream.subscribe_trading_statuses(heard.handler, "*")
        heard.stream.register_trade_corrections(heard.handler)
        heard.stream.register_trade_cancels(heard.handler)
        heard.stream._handlers["corrections"]["*"] = heard.handler
        heard.stream._handlers["cancelErrors"]["*"] = heard.handler
        async with running(heard):

            async def is_subscribed() -> bool:
                streams = (await market.control("GET", "status"))["streams"]
                return bool(streams and streams[0]["subscriptions"]["cancelErrors"] == ["NEWCO"])

            await eventually(is_subscribed)
            await send(
                market,
                {"T": "t", "S": "NEWCO", "p": 10, "i": 1, "c": ["@", "F"], "x": "Q"},
                {"T": "t", "S": "NEWCO", "p": 11, "i": 2},
                {"T": "c", "S": "NEWCO", "oi": 1, "ci": 3, "cp": "10.50"},
                {"T": "x", "S": "NEWCO", "i": 2, "a": "E"},
                {"T": "s", "S": "NEWCO"},
            )

            async def all_are_heard() -> bool:
                return len(heard.messages) == 5

            await eventually(all_are_heard)
    first, second = heard.of(Trade)
    assert (first.price, first.exchange, first.conditions, second.price) == (10, "Q", ["@", "F"], 11)
    (correction,) = heard.of(TradeCorrection)
    assert (correction.original_id, correction.original_price, correction.original_conditions) == (
        1,
        10,
        ["@", "F"],
    )
    assert (correction.corrected_id, correction.corrected_price, correction.tape) == (3, 10.5, "A")
    (cancel,) = heard.of(TradeCancel)
    assert (cancel.id, cancel.price, cancel.action) == (2, 11, "E")
    (status,) = heard.of(TradingStatus)
    assert (status.symbol, status.status_code, status.reason_code) == ("NEWCO", "H", "T12")


async def test_alpaca_py_subscribes_to_thousands_of_symbols_in_fragments() -> None:
    symbols = [f"L{number:011d}" for number in range(4000)]  # more than one 32 KiB fragment
    async with (
        simulated_market(stream_symbols_max=10_000) as market,
        alpaca_stream(market, StockDataStream, "/v2/iex") as heard,
    ):
        heard.stream.subscribe_trades(heard.handler, *symbols)
        async with running(heard):

            async def is_subscribed() -> bool:
                streams = (await market.control("GET", "status"))["streams"]
                return bool(streams and streams[0]["subscriptions"]["trades"] == symbols)

            await eventually(is_subscribed)


# ---- the stream and the latest trade over HTTP ---------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "path"), [("AAPL", "/v2/iex"), ("AAPL", "/v2/sip"), ("BTC/USD", "/v1beta3/crypto/us")]
)
async def test_what_http_answers_is_the_last_trade_that_was_streamed(
    market: SimulatedMarket, symbol: str, path: str
) -> None:
    feed = "?feed=sip&" if path == "/v2/sip" else "?"
    url = f"/v1beta3/crypto/us/latest/trades{feed}" if "/" in symbol else f"/v2/stocks/trades/latest{feed}"
    async with authenticated(market, path) as stream:
        await stream.subscribe(trades=[symbol])
        heard = await stream.frame()  # from here on every trade has been streamed before it is answered
        answered = (await market.get(f"{url}symbols={symbol}"))["trades"][symbol]
        await send(market, {"raw": "the answer is here"})
        while heard[-1] != "the answer is here":
            heard += await stream.frame()
        not_newer = [one for one in heard[:-1] if ns_of_text(one["t"]) <= ns_of_text(answered["t"])]
        assert not_newer[-1] == {"T": "t", "S": symbol} | answered


async def test_the_same_trades_are_streamed_in_every_run(market: SimulatedMarket) -> None:
    async with authenticated(market, "/v2/sip") as stream:
        await stream.subscribe(trades=["*"])
        for trade in await stream.messages(20):
            at_ns = ns_of_text(trade["t"])
            expected = market.simulator.market.latest_trade(trade["S"], at_ns)
            assert expected is not None
            assert (expected.at_ns, float(expected.price), expected.id) == (at_ns, trade["p"], trade["i"])


async def test_a_pinned_symbol_is_streamed_at_once_and_then_silent(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["AAPL"])
        await market.control("PUT", "prices", {"AAPL": {"price": "123.4567", "at": PIN}})
        heard = await stream.frame()
        while heard[-1]["p"] != 123.4567:
            heard += await stream.frame()
        assert heard[-1] == {"T": "t", "S": "AAPL"} | await latest(market, "AAPL")
        assert heard[-1]["t"] == PIN
        await market.control("PUT", "prices", {"AAPL": {"price": 100}})
        (again,) = await stream.frame()  # nothing of the market's own came between
        assert again["p"] == 100
        await market.control("DELETE", "prices")
        (resumed,) = await stream.frame()
        assert resumed == {"T": "t", "S": "AAPL"} | await latest(market, "AAPL")
        assert resumed["p"] > 100


async def test_an_odd_lot_is_streamed_but_is_not_the_latest_trade(market: SimulatedMarket) -> None:
    await market.control("PUT", "prices", {"AAPL": {"price": 100}})
    before = await latest(market, "AAPL")
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["AAPL"])
        sent = await send(market, {"T": "t", "S": "AAPL", "p": 90, "s": 3, "c": ["@", "I"]})
        assert await stream.frame() == sent
        assert (sent[0]["p"], sent[0]["s"], sent[0]["c"]) == (90, 3, ["@", "I"])
    assert await latest(market, "AAPL") == before


async def test_amended_trades_change_what_is_the_latest(market: SimulatedMarket) -> None:
    await market.control("PUT", "prices", {"AAPL": {"price": 100, "at": "2026-11-20T15:00:00Z"}})
    at = "2026-11-20T15:00:01.000000001Z"
    await send(market, {"T": "t", "S": "AAPL", "p": 101, "i": 7, "t": at})
    assert ((await latest(market, "AAPL"))["p"], (await latest(market, "AAPL"))["t"]) == (101, at)
    await send(market, {"T": "c", "S": "AAPL", "oi": 7, "ci": 8, "cp": "101.25"})
    corrected = await latest(market, "AAPL")
    assert (corrected["p"], corrected["i"], corrected["t"]) == (101.25, 8, at)
    await send(market, {"T": "x", "S": "AAPL", "i": 8})
    assert (await latest(market, "AAPL"))["p"] == 100


async def test_a_cancelled_trade_of_the_market_gives_way_to_the_one_before(market: SimulatedMarket) -> None:
    first = await latest(market, "SPY")

    async def follows() -> dict[str, Any] | None:
        now = await latest(market, "SPY")
        return now if now["i"] == first["i"] + 1 else None

    assert await eventually(follows, every=0.1)  # 200 requests a minute are allowed
    await send(market, {"T": "x", "S": "SPY", "i": first["i"] + 1})
    assert await latest(market, "SPY") == first


async def test_an_amendment_of_nothing_is_refused_in_words(market: SimulatedMarket) -> None:
    body = {"messages": [{"T": "t", "S": "AAPL", "p": 1}, {"T": "x", "S": "NEWCO", "i": 5}]}
    answer = await market.control("POST", "stream/messages", body, status=422)
    assert answer["message"] == "no trade 5 of NEWCO is known; the 1 messages before it are sent"


async def test_ordered_messages_come_in_one_frame_as_they_were_given(market: SimulatedMarket) -> None:
    trade = {"T": "t", "S": "NEWCO", "p": 10, "i": 1, "t": "2026-11-20T15:00:00Z"}
    older = {"T": "t", "S": "NEWCO", "p": 9, "i": 2, "t": "2026-11-20T14:59:00Z"}
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["NEWCO"], lulds=["NEWCO"])
        await send(
            market,
            trade,
            trade,
            older,
            {"raw": "not a message"},
            {"T": "l", "S": "NEWCO", "u": 12, "d": "8.5"},
        )
        first, twice, late, malformed, bands = await stream.frame()
        assert first == twice
        assert (late["p"], late["t"]) == (9, "2026-11-20T14:59:00Z")
        assert malformed == "not a message"
        assert {name: bands[name] for name in ("T", "S", "u", "d", "i", "z")} == {
            "T": "l", "S": "NEWCO", "u": 12, "d": 8.5, "i": "B", "z": "A",
        }  # fmt: skip
        await send(market, trade, older, frames="each")
        assert [len(await stream.frame()) for _ in range(2)] == [1, 1]
    assert (await latest(market, "NEWCO"))["i"] == 1


async def test_minute_and_day_bars_are_sent_when_a_minute_ends(shared_folder: Path) -> None:
    async with (
        replayed_week(shared_folder, "2013-10-11T19:58:30Z") as market,
        authenticated(market) as stream,
    ):
        await stream.subscribe(bars=["SPY"], dailyBars=["SPY"], trades=["SPY"])
        await market.control("PUT", "clock", {"speed": 120})
        trade, minute, day = await stream.messages(3)
        wanted = await market.get(
            "/v2/stocks/bars?symbols=SPY&timeframe=1Min&start=2013-10-11T19:58:00Z&end=2013-10-11T19:58:00Z"
        )
        assert minute == {"T": "b", "S": "SPY"} | wanted["bars"]["SPY"][0]
        assert (day["T"], day["t"], day["c"]) == ("d", "2013-10-11T04:00:00Z", minute["c"])
        assert ns_of_text(trade["t"]) == ns_of_text(minute["t"]) + MINUTE_NS - 1
        assert trade["p"] == minute["c"]


async def test_a_replay_whose_clock_is_set_streams_the_latest_there(shared_folder: Path) -> None:
    async with (
        replayed_week(shared_folder, "2013-10-10T15:00:00Z") as market,
        authenticated(market) as stream,
    ):
        await stream.subscribe(trades=["SPY"])
        for at in ("2013-10-11T20:00:00Z", "2013-10-09T15:00:00Z"):
            await market.control("PUT", "clock", {"at": at})
            assert await stream.frame() == [{"T": "t", "S": "SPY"} | await latest(market, "SPY")]


async def test_parsed_bars_of_alpaca_py(market: SimulatedMarket) -> None:
    bar = {"T": "b", "S": "AAPL", "o": 1, "h": 3, "l": 1, "c": 2, "v": 10, "n": 2, "vw": 1.5, "t": PIN}
    async with alpaca_stream(market, StockDataStream, "/v2/iex") as heard:
        heard.stream.subscribe_bars(heard.handler, "AAPL")
        async with running(heard):

            async def is_heard() -> bool:
                await send(market, {"raw": bar})
                return len(heard.of(Bar)) > 0

            await eventually(is_heard)
    assert heard.of(Bar)[0].close == 2
    assert heard.of(Bar)[0].timestamp == datetime(2026, 11, 20, 15, 0, 0, 123456, tzinfo=UTC)


# ---- formats, authentication, subscriptions ------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
async def test_both_formats_carry_the_same(market: SimulatedMarket, packed: bool) -> None:
    async with raw_stream(market, packed=packed, key=None) as stream:
        await stream.say(action="auth", key="key", secret="secret")
        assert await stream.frame() == AUTHENTICATED
        acknowledged = await stream.subscribe(trades=["AAPL"], quotes=["AMD", "CLDR"], bars=["*"])
        assert acknowledged == {
            "T": "subscription",
            "trades": ["AAPL"],
            "quotes": ["AMD", "CLDR"],
            "bars": ["*"],
            "updatedBars": [],
            "dailyBars": [],
            "statuses": [],
            "lulds": [],
            "corrections": ["AAPL"],
            "cancelErrors": ["AAPL"],
        }
        await market.control(
            "PUT", "prices", {"AAPL": {"price": "123.4567", "at": PIN}, "AMD": {"price": 50}}
        )
        heard: list[Any] = []
        while not any(message["S"] == "AAPL" and message.get("p") == 123.4567 for message in heard):
            heard = await stream.frame()
    trade = next(message for message in heard if message["T"] == "t")
    quote = next(message for message in heard if message["T"] == "q")
    at = rfc3339(trade["t"].to_unix_nano()) if packed else trade["t"]
    assert at == PIN
    assert {name: trade[name] for name in ("S", "x", "p", "s", "c", "z")} == {
        "S": "AAPL", "x": "V", "p": 123.4567, "s": 100, "c": ["@"], "z": "C",
    }  # fmt: skip
    assert set(quote) == {"T", "S", "ax", "ap", "as", "bx", "bp", "bs", "c", "t", "z"}
    assert (quote["S"], quote["bp"], quote["ap"]) == ("AMD", 49.99, 50.01)


@pytest.mark.parametrize("packed", [False, True])
async def test_errors_have_alpacas_codes_and_words(market: SimulatedMarket, packed: bool) -> None:
    def error(code: int, words: str) -> list[dict[str, object]]:
        return [{"T": "error", "code": code, "msg": words}]

    async with raw_stream(market, packed=packed, key=None) as stream:
        await stream.say(action="subscribe", trades=["AAPL"])
        assert await stream.frame() == error(401, "not authenticated")
        await stream.say(action="dance")
        assert await stream.frame() == error(400, "invalid syntax")
        await stream.socket.send_bytes(b"\xc1")
        assert await stream.frame() == error(400, "invalid syntax")
        await stream.say(action="auth", key="key", secret=7)
        assert await stream.frame() == error(400, "invalid syntax")
        await stream.say(action="auth", key="key", secret="secret")
        assert await stream.frame() == AUTHENTICATED
        await stream.say(action="auth", key="key", secret="secret")
        assert await stream.frame() == error(403, "already authenticated")
        await stream.say(action="subscribe", trades=["lower case"])
        assert await stream.frame() == error(400, "invalid syntax")
        await stream.say(action="subscribe", news=["*"])
        assert await stream.frame() == error(410, "invalid subscribe action for this feed")
        await stream.say(action="subscribe", trades=[f"S{number}" for number in range(31)])
        assert await stream.frame() == error(405, "symbol limit exceeded")
        acknowledged = await stream.subscribe(trades=[f"S{number}" for number in range(30)])
        assert len(acknowledged["trades"]) == 30
        await stream.say(action="subscribe", quotes=["ONE"])
        assert await stream.frame() == error(405, "symbol limit exceeded")
        async with raw_stream(market, packed=packed) as second:
            assert await second.frame() == error(406, "connection limit exceeded")
            assert await second.closed() == 1000
        acknowledged = await stream.subscribe(bars=["AAPL"])  # the first one goes on
        assert len(acknowledged["trades"]) == 30


async def test_wrong_keys_are_refused_in_headers_and_messages() -> None:
    async with simulated_market(api_key="right", secret_key="secret") as market:
        async with raw_stream(market, key="wrong") as stream:
            assert await stream.frame() == [{"T": "error", "code": 402, "msg": "auth failed"}]
            assert await stream.closed() == 1000
        async with raw_stream(market, key=None) as stream:
            await stream.say(action="auth", key="right", secret="wrong")
            assert await stream.frame() == [{"T": "error", "code": 402, "msg": "auth failed"}]
            assert await stream.closed() == 1000
        async with authenticated(market, key="right"):
            pass


async def test_who_does_not_authenticate_is_sent_away(market: SimulatedMarket) -> None:
    assert market.simulator.streams.auth_seconds == 10
    market.simulator.streams.auth_seconds = 0.2
    async with raw_stream(market, key=None) as stream:
        assert await stream.frame() == [{"T": "error", "code": 404, "msg": "auth timeout"}]
        assert await stream.closed() == 1000


async def test_each_endpoint_and_each_account_has_a_connection_of_its_own(market: SimulatedMarket) -> None:
    async with (
        authenticated(market, "/v2/iex"),
        authenticated(market, "/v2/sip"),
        authenticated(market, "/v2/test"),
        authenticated(market, "/v1beta1/overnight"),
        authenticated(market, "/v1beta3/crypto/us"),
        authenticated(market, "/v2/iex", key="other"),
    ):
        assert len((await market.control("GET", "status"))["streams"]) == 6

    async def nobody_is_left() -> bool:
        return not (await market.control("GET", "status"))["streams"]

    await eventually(nobody_is_left)
    async with authenticated(market, "/v2/iex"):  # the place is free again
        pass


async def test_the_limit_is_of_the_free_feed_alone(market: SimulatedMarket) -> None:
    async with authenticated(market, "/v2/sip") as stream:
        acknowledged = await stream.subscribe(trades=["*"], quotes=[f"S{number}" for number in range(100)])
        assert acknowledged["trades"] == ["*"]
        assert len(acknowledged["quotes"]) == 100


async def test_crypto_has_its_own_channels_and_symbols(market: SimulatedMarket) -> None:
    async with authenticated(market, "/v1beta3/crypto/us") as stream:
        assert await stream.subscribe(trades=["BTC/USD"], orderbooks=["*"]) == {
            "T": "subscription",
            "trades": ["BTC/USD"],
            "quotes": [],
            "orderbooks": ["*"],
            "bars": [],
            "updatedBars": [],
            "dailyBars": [],
        }
        await stream.say(action="subscribe", trades=["AAPL"])
        assert (await stream.frame())[0]["code"] == 400
        await stream.say(action="subscribe", statuses=["BTC/USD"])
        assert (await stream.frame())[0]["code"] == 410


async def test_what_is_unsubscribed_is_not_sent_any_more(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["NEWCO", "OTHER"])
        await stream.say(action="unsubscribe", trades=["NEWCO"])
        (acknowledged,) = await stream.frame()
        assert (acknowledged["trades"], acknowledged["corrections"]) == (["OTHER"], ["OTHER"])
        await send(market, {"T": "t", "S": "NEWCO", "p": 1}, {"T": "t", "S": "OTHER", "p": 2})
        assert [message["S"] for message in await stream.frame()] == ["OTHER"]


async def test_an_unknown_feed_and_a_plain_request_are_refused(market: SimulatedMarket) -> None:
    for path in ("/v2/gold", "/v1beta3/crypto/moon"):
        with pytest.raises(WSServerHandshakeError) as refused:
            await market.http.ws_connect(market.url + path)
        assert refused.value.status == 404
    assert "message" in await market.get("/v2/iex", status=400)


# ---- load ----------------------------------------------------------------------------------------


async def test_load_is_even_and_is_what_http_answers(market: SimulatedMarket) -> None:
    symbols = [f"L{number}" for number in range(20)]
    async with authenticated(market, "/v2/sip", packed=True) as stream:
        await stream.subscribe(trades=symbols)
        await market.control("PUT", "stream/load", {"symbols": symbols, "ticks_per_second": 2000})
        trades = await stream.messages(1000)
        counts = [sum(trade["S"] == symbol for trade in trades) for symbol in symbols]
        assert max(counts) - min(counts) <= 1
        instants = [trade["t"].to_unix_nano() for trade in trades]
        assert instants == sorted(set(instants))
        assert all(80 <= trade["p"] <= 120.01 for trade in trades)
        await market.control("DELETE", "stream/load")
        answered = (await market.get(f"/v2/stocks/trades/latest?symbols={','.join(symbols)}"))["trades"]
        assert answered == {}  # nobody else trades these


async def test_load_and_http_agree_while_it_runs(market: SimulatedMarket) -> None:
    async with authenticated(market) as stream:
        await stream.subscribe(trades=["AAPL", "L1"])
        await market.control("PUT", "stream/load", {"symbols": ["AAPL", "L1"], "ticks_per_second": 100})
        heard = await stream.messages(20)
        answered = await latest(market, "L1")
        while heard[-1]["t"] < answered["t"]:
            heard += await stream.frame()
        assert {"T": "t", "S": "L1"} | answered in heard
        status = await market.control("GET", "status")
        assert status["load"]["symbols"] == 2
        assert status["streams"][0]["messages_sent"] >= 20
        assert all(
            message["i"] < 10_000 for message in heard if message["t"] > heard[1]["t"]
        )  # the load's alone


async def test_wrong_load_and_messages_are_refused_in_words(market: SimulatedMarket) -> None:
    wrong = {"symbols": [], "ticks_per_second": 50_000}
    answer = await market.control("PUT", "stream/load", wrong, status=422)
    assert "symbols: Tuple should have at least 1 item" in answer["message"]
    assert "ticks_per_second: Input should be less than or equal to 20000" in answer["message"]
    answer = await market.control("POST", "stream/messages", {"messages": [{"T": "?"}]}, status=422)
    assert "does not match any of the expected tags" in answer["message"]


async def test_streams_do_not_keep_the_server_from_stopping() -> None:
    async with simulated_market() as market:
        stream = await market.http.ws_connect(market.url + "/v2/iex")
        async with asyncio.timeout(5):
            await stream.receive()
    assert market.simulator.streams.open == {}
