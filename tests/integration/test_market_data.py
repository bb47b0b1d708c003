"""Alpaca's real client against a server that speaks its protocol by hand, well and badly."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from services.price_feeder.failures import MarketDataUnavailable, RateLimited, Unauthorized
from services.price_feeder.market_data import REPAIRS_MAX, THREADS, LastTrades, MarketData
from services.price_feeder.trades import LastTrade, Rejection
from tests.integration.fake_alpaca import (
    CRYPTO,
    STOCKS,
    FakeAlpaca,
    Fault,
    answers,
    drips,
    hangs,
    resets,
    running_fake,
    sends,
    trade,
)
from tests.waiting import eventually

NOW = datetime(2026, 3, 2, 15, 0, 10, tzinfo=UTC)
REQUEST_SECONDS_MAX = 0.6


@pytest.fixture
async def alpaca() -> AsyncIterator[FakeAlpaca]:
    async with running_fake() as fake:
        yield fake


def market_data(url: str, *, requests_per_minute: int = 200, feed: str = "iex") -> MarketData:
    return MarketData(
        api_key="key",
        secret_key="secret",
        url=url,
        feed=feed,
        requests_per_minute=requests_per_minute,
        request_seconds_max=REQUEST_SECONDS_MAX,
    )


@pytest.fixture
async def market(alpaca: FakeAlpaca) -> AsyncIterator[MarketData]:
    async with market_data(alpaca.url) as client:
        yield client


async def ask(market: MarketData, *symbols: str, seconds_max: float = 5.0) -> LastTrades:
    return await market.latest_trades(symbols, now=NOW, seconds_max=seconds_max, stop=asyncio.Event())


def prices(found: LastTrades) -> dict[str, str]:
    return {trade.symbol: str(trade.price) for trade in found.trades}


# ---- the good days -------------------------------------------------------------------------------


async def test_equities_and_crypto_are_asked_for_apart_and_understood(
    alpaca: FakeAlpaca, market: MarketData
) -> None:
    alpaca.trades = {
        "BRK.B": trade("412.3", "2026-03-02T14:59:59.999999999Z"),
        "BTC/USD": trade("29791", "2026-03-02T09:00:00-05:00"),
    }
    found = await ask(market, "BRK.B", "BTC/USD")
    assert sorted(found.trades, key=lambda trade: trade.symbol) == [
        LastTrade("BRK.B", Decimal("412.3000"), datetime(2026, 3, 2, 14, 59, 59, 999999, tzinfo=UTC), "iex"),
        LastTrade("BTC/USD", Decimal("29791.0000"), datetime(2026, 3, 2, 14, tzinfo=UTC), "us"),
    ]
    assert (found.rejected, found.problems) == ({}, [])
    asked = {request.path: (request.symbols, request.feed) for request in alpaca.asked}
    assert asked == {STOCKS: (("BRK.B",), "iex"), CRYPTO: (("BTC/USD",), None)}
    assert alpaca.asked[0].headers["APCA-API-KEY-ID"] == "key"


async def test_prices_of_a_simulator_are_labelled_so_whatever_the_settings_say(alpaca: FakeAlpaca) -> None:
    alpaca.headers = {"X-Market-Simulated": "true"}
    alpaca.trades = {"AAPL": trade("200.5"), "ETH/USD": trade("2027.6")}
    async with market_data(alpaca.url, feed="sip") as market:
        found = await ask(market, "AAPL", "ETH/USD")
    assert {trade.feed for trade in found.trades} == {"simulated"}
    assert len(found.trades) == 2


async def test_250_symbols_take_3_calls_and_one_connection_each_at_most(
    alpaca: FakeAlpaca, market: MarketData
) -> None:
    symbols = [f"S{number}" for number in range(250)]
    alpaca.trades = {symbol: trade("10.25") for symbol in symbols}
    found = await ask(market, *symbols)
    assert len(found.trades) == 250
    assert sorted(len(request.symbols) for request in alpaca.asked) == [50, 100, 100]
    for _ in range(3):
        await ask(market, "S1")
    assert len(alpaca.asked) == 6
    assert alpaca.connections <= 3  # kept open and used again


async def test_recorded_example_answers_are_understood(
    alpaca: FakeAlpaca, market: MarketData, shared_folder: Path
) -> None:
    paths = json.loads((shared_folder / "alpaca" / "market-data-api.json").read_text())["paths"]

    def example(path: str) -> str:
        media = paths[path]["get"]["responses"]["200"]["content"]["application/json"]
        return json.dumps(media["examples"]["trades"]["value"])

    alpaca.faults_by_path = {
        STOCKS: answers("200 OK", example("/v2/stocks/trades/latest")),
        CRYPTO: answers("200 OK", example("/v1beta3/crypto/{loc}/latest/trades")),
    }
    found = await ask(market, "AAPL", "BTC/USD", "ETH/USD")
    assert prices(found) == {"AAPL": "172.7800", "BTC/USD": "29791.0000", "ETH/USD": "2027.6000"}
    times = {trade.symbol: trade.traded_at for trade in found.trades}
    assert times["AAPL"] == datetime(2022, 8, 17, 9, 50, 43, 361102, tzinfo=UTC)
    assert times["ETH/USD"] == datetime(2022, 5, 18, 12, 1, 0, 363547, tzinfo=UTC)


# ---- one bad symbol ------------------------------------------------------------------------------


async def test_bad_prices_are_rejected_one_by_one_and_the_rest_is_kept(
    alpaca: FakeAlpaca, market: MarketData
) -> None:
    alpaca.trades = {
        "GOOD": trade("1.00005"),
        "NAN": trade("NaN"),
        "HUGE": trade("1e400"),
        "LARGE": trade("100000000000"),
        "NEGATIVE": trade("-1"),
        "ZERO": trade("0"),
        "TINY": trade("0.00004"),
        "NULL": "null",
        "NULLPRICE": trade("null"),
        "TEXT": trade('"12.5"'),
        "TRUE": trade("true"),
        "LIST": "[1, 2]",
        "FUTURE": trade("5", "2026-03-02T15:05:11Z"),
        "SOON": trade("5", "2026-03-02T15:05:10Z"),
        "NOTIME": '{"p": 5}',
        "NOZONE": trade("5", "2026-03-02T15:00:00"),
        "UNSET": trade("5", "0001-01-01T00:00:00Z"),
        "CANCELED": '{"p": 5, "t": "2026-03-02T15:00:00Z", "u": "canceled"}',
    }
    found = await ask(market, *alpaca.trades, "ABSENT", "lower", "A,B", "ETH/BTC")
    assert prices(found) == {"GOOD": "1.0001", "SOON": "5.0000"}
    assert found.rejected == {
        "NAN": "malformed",
        "HUGE": "too_large",
        "LARGE": "too_large",
        "NEGATIVE": "not_positive",
        "ZERO": "not_positive",
        "TINY": "too_small",
        "NULL": "null",
        "NULLPRICE": "null",
        "TEXT": "malformed",
        "TRUE": "malformed",
        "LIST": "malformed",
        "FUTURE": "from_the_future",
        "NOTIME": "malformed",
        "NOZONE": "malformed",
        "UNSET": "malformed",
        "CANCELED": "withdrawn",
        "ABSENT": "missing",
        "lower": "not_a_symbol",
        "A,B": "not_a_symbol",
        "ETH/BTC": "not_in_dollars",
    }
    assert alpaca.symbols_asked.isdisjoint({"lower", "A", "B", "ETH/BTC"})


@pytest.mark.parametrize(("named", "calls"), [(True, 2), (False, 13)])
async def test_invalid_symbol_does_not_lose_its_batch_and_is_not_asked_for_again(
    alpaca: FakeAlpaca, market: MarketData, named: bool, calls: int
) -> None:
    symbols = [f"S{number}" for number in range(64)]
    alpaca.trades = {symbol: trade("10.25") for symbol in symbols}
    alpaca.invalid = {"S63"}
    alpaca.names_the_invalid = named
    found = await ask(market, *symbols)
    assert len(found.trades) == 63
    assert found.rejected == {"S63": "refused"}
    assert len(alpaca.asked) == calls  # unnamed: 64, then both halves of each of 64, 32, 16, 8, 4 and 2
    found = await ask(market, *symbols)
    assert len(found.trades) == 63
    assert found.rejected == {"S63": "refused"}
    assert len(alpaca.asked) == calls + 1


async def test_search_for_invalid_symbols_is_bounded(alpaca: FakeAlpaca, market: MarketData) -> None:
    symbols = [f"S{number}" for number in range(100)]
    alpaca.invalid = set(symbols)
    alpaca.names_the_invalid = False
    found = await ask(market, *symbols)
    assert found.trades == []
    assert any(isinstance(problem, MarketDataUnavailable) for problem in found.problems)
    assert len(alpaca.asked) <= 2 * REPAIRS_MAX + 1


async def test_refusal_of_everything_is_not_held_against_the_symbols(
    alpaca: FakeAlpaca, market: MarketData
) -> None:
    alpaca.trades = {"AAPL": trade("200.5")}
    alpaca.fault = answers("400 Bad Request", '{"message": "invalid feed"}')
    assert (await ask(market, "AAPL")).rejected == {"AAPL": Rejection.REFUSED}
    alpaca.fault = None
    assert prices(await ask(market, "AAPL")) == {"AAPL": "200.5000"}


# ---- the bad days --------------------------------------------------------------------------------

FAULTS: dict[str, Fault] = {
    "500": answers("500 Internal Server Error", '{"message": "internal error"}'),
    "502 with HTML": answers("502 Bad Gateway", "<html><title>502 Bad Gateway</title></html>"),
    "504": answers("504 Gateway Timeout", ""),
    "302": answers("302 Found", "", Location="http://127.0.0.1:9/"),
    "304": answers("304 Not Modified", ""),
    "204": answers("204 No Content", ""),
    "empty body": answers("200 OK", ""),
    "HTML with 200": answers("200 OK", "<html></html>"),
    "a list": answers("200 OK", "[]"),
    "a number": answers("200 OK", "17"),
    "null": answers("200 OK", "null"),
    "no trades": answers("200 OK", "{}"),
    "trades are null": answers("200 OK", '{"trades": null}'),
    "trades are a list": answers("200 OK", '{"trades": [1]}'),
    "two keys": answers("200 OK", '{"trades": {}, "quotes": {}}'),
    "pages for ever": answers("200 OK", '{"trades": {}, "next_page_token": "more"}'),
    "truncated JSON": answers("200 OK", '{"trades": {"AAPL": {"p": 17'),
    "cut off body": sends(b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"trades": '),
    "deep nesting": answers("200 OK", '{"trades": ' + "[" * 100_000),
    "not text": sends(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xfe\xfd\xfc"),
    "not gzip": sends(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"),
    "not HTTP": sends(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "nothing at all": sends(b""),
    "reset": resets,
    "too long": sends(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (17 * 1024 * 1024)),
    "hang": hangs,
    "drip in the status line": drips(b"HTTP/1.1 200 O", b"K"),
    "drip in the headers": drips(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "drip in the body": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"),
    "drip of chunks": drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "drip without a length": drips(b"HTTP/1.0 200 OK\r\n\r\n"),
    "100 Continue for ever": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_fault_costs_one_answer_in_bounded_time_and_no_thread(
    alpaca: FakeAlpaca, market: MarketData, name: str
) -> None:
    alpaca.trades = {"AAPL": trade("200.5"), "BTC/USD": trade("29791")}
    await ask(market, "AAPL", "BTC/USD")
    threads = set(threading.enumerate())
    alpaca.faults_by_path = {STOCKS: FAULTS[name]}
    for _ in range(3):
        started = time.monotonic()
        found = await ask(market, "AAPL", "BTC/USD")
        assert prices(found) == {"BTC/USD": "29791.0000"}
        assert [type(problem) for problem in found.problems] == [MarketDataUnavailable]
        assert str(found.problems[0])
        assert time.monotonic() - started < REQUEST_SECONDS_MAX + 0.7
    # No thread has come; one of an earlier test may just have gone.
    assert set(threading.enumerate()) <= threads
    assert sum(thread.name.startswith("alpaca-") for thread in threading.enumerate()) >= THREADS
    alpaca.faults_by_path = {}
    assert prices(await ask(market, "AAPL")) == {"AAPL": "200.5000"}


async def test_gzip_bomb_is_not_unpacked(alpaca: FakeAlpaca, market: MarketData) -> None:
    import gzip

    bomb = gzip.compress(b" " * (64 * 1024 * 1024))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    alpaca.fault = sends(head.encode() + bomb)
    found = await ask(market, "AAPL")
    assert [str(problem) for problem in found.problems] == ["the answer is longer than 16,777,216 bytes"]


async def test_nobody_listening_is_said_in_words() -> None:
    async with market_data("http://127.0.0.1:9") as market:
        found = await ask(market, "AAPL")
    assert [str(problem) for problem in found.problems] == ["Connection refused"]


async def test_answers_that_come_in_time_are_kept_when_others_do_not(
    alpaca: FakeAlpaca, market: MarketData
) -> None:
    alpaca.trades = {"BTC/USD": trade("29791")}
    alpaca.faults_by_path = {STOCKS: hangs}
    started = time.monotonic()
    found = await ask(market, "AAPL", "BTC/USD", seconds_max=0.3)
    assert time.monotonic() - started < 0.5
    assert prices(found) == {"BTC/USD": "29791.0000"}
    assert [str(problem) for problem in found.problems] == ["not all answered within 0.3 s"]


async def test_stop_ends_the_wait_at_once(alpaca: FakeAlpaca, market: MarketData) -> None:
    alpaca.fault = hangs
    stop = asyncio.Event()
    asking = asyncio.create_task(market.latest_trades(["AAPL"], now=NOW, seconds_max=60, stop=stop))

    async def is_asked() -> bool:
        return bool(alpaca.asked)

    await eventually(is_asked)
    started = time.monotonic()
    stop.set()
    assert (await asking).trades == []
    assert time.monotonic() - started < 0.2


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_nothing_is_asked_for_until_retry_after_has_passed(
    alpaca: FakeAlpaca, market: MarketData, status: str
) -> None:
    alpaca.trades = {"AAPL": trade("200.5")}
    alpaca.fault = answers(status, '{"message": "too many requests."}', Retry_After="1")
    found = await ask(market, "AAPL")
    (limited,) = found.problems
    assert isinstance(limited, RateLimited)
    limited_at = alpaca.asked[-1].at
    alpaca.fault = None
    found = await ask(market, "AAPL", "BTC/USD")  # the pause is for all that the key does
    assert found.problems == [limited, limited]
    assert found.waiting == 2
    assert len(alpaca.asked) == 1

    async def is_priced() -> bool:
        return bool((await ask(market, "AAPL")).trades)

    await eventually(is_priced)
    assert 1.0 <= alpaca.asked[-1].at - limited_at < 2.0


async def test_longest_pause_is_an_hour(alpaca: FakeAlpaca, market: MarketData) -> None:
    alpaca.fault = answers("429 Too Many Requests", "", Retry_After="86400")
    started = datetime.now(UTC)
    (limited,) = (await ask(market, "AAPL")).problems
    assert isinstance(limited, RateLimited)
    assert timedelta(seconds=3599) < limited.retry_at - started < timedelta(seconds=3602)


async def test_refused_key_is_not_tried_again_for_a_minute(alpaca: FakeAlpaca, market: MarketData) -> None:
    alpaca.fault = answers("401 Unauthorized", '{"message": "unauthorized."}')
    (problem,) = (await ask(market, "AAPL")).problems
    assert isinstance(problem, Unauthorized)
    assert str(problem) == "Alpaca answered 401: unauthorized: check ALPACA_API_KEY and ALPACA_SECRET_KEY"
    for _ in range(3):
        assert (await ask(market, "AAPL", "BTC/USD")).waiting == 2
    assert len(alpaca.asked) == 1


async def test_feed_outside_the_plan_does_not_cost_the_other_asset_class(
    alpaca: FakeAlpaca, market: MarketData
) -> None:
    message = "subscription does not permit querying recent SIP data"
    alpaca.trades = {"BTC/USD": trade("29791")}
    alpaca.faults_by_path = {STOCKS: answers("403 Forbidden", f'{{"message": "{message}"}}')}
    for _ in range(3):
        found = await ask(market, "AAPL", "BTC/USD")
        assert prices(found) == {"BTC/USD": "29791.0000"}
        (problem,) = found.problems
        assert str(problem) == (
            f"Alpaca answered 403: {message}: check ALPACA_API_KEY and ALPACA_SECRET_KEY, "
            "and that the plan has the feed ALPACA_FEED"
        )
    assert [request.path for request in alpaca.asked].count(STOCKS) == 1


async def test_spent_budget_goes_round_among_the_symbols(alpaca: FakeAlpaca) -> None:
    symbols = [f"S{number:03}" for number in range(400)]
    alpaca.trades = {symbol: trade("10.25") for symbol in symbols[:300]}  # the last 100 never have a price
    async with market_data(alpaca.url, requests_per_minute=3) as market:
        never_confirmed_first = symbols[300:] + symbols[:300]
        assert (await ask(market, *never_confirmed_first)).waiting == 100
        assert (await ask(market, *never_confirmed_first)).waiting == 400
        assert len(alpaca.asked) == 3
        # With room again, those that waited are the first to be asked for.
        waited = set(symbols) - alpaca.symbols_asked
        assert set(market._batches(never_confirmed_first, LastTrades())[0]) == waited
