"""Every fault kind as a client sees it on the wire, and the controls that order faults and pin prices."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import datetime, timedelta
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import pytest

from shared.clock import utc_now
from tests.integration.simulated_market import KEYS, SimulatedMarket, simulated_market
from tests.waiting import eventually

TRADES = "/v2/stocks/trades/latest?symbols=AAPL,MSFT,SPY"


@pytest.fixture
async def market() -> AsyncIterator[SimulatedMarket]:
    async with simulated_market(seed=1) as served:
        yield served


async def raw(market: SimulatedMarket, path: str = TRADES) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body without following or interpreting anything."""
    async with market.http.get(market.url + path, headers=KEYS, allow_redirects=False) as response:
        return response.status, dict(response.headers), await response.read()


async def prices(market: SimulatedMarket, path: str = TRADES) -> dict[str, Any]:
    """Return the price of each symbol, as Python's own JSON reads it."""
    _, _, body = await raw(market, path)
    return {
        symbol: None if trade is None else trade["p"] for symbol, trade in json.loads(body)["trades"].items()
    }


async def connection(market: SimulatedMarket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send the question over a plain socket."""
    address = urlsplit(market.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    keys = "".join(f"{name}: {value}\r\n" for name, value in KEYS.items())
    writer.write(f"GET {TRADES} HTTP/1.1\r\nHost: {address.netloc}\r\n{keys}\r\n".encode())
    await writer.drain()
    return reader, writer


# ---- faults that replace the answer --------------------------------------------------------------


async def test_rate_limited_says_when_to_come_back(market: SimulatedMarket) -> None:
    await market.order("rate_limited", retry_after_seconds=17)
    status, headers, body = await raw(market)
    assert (status, json.loads(body)) == (429, {"message": "too many requests."})
    assert headers["Retry-After"] == "17"
    assert headers["X-RateLimit-Remaining"] == "0"
    assert 15 <= int(headers["X-RateLimit-Reset"]) - utc_now().timestamp() <= 18


async def test_server_error_is_json_with_the_status_ordered(market: SimulatedMarket) -> None:
    await market.order("server_error")
    await market.order("server_error", status=503)
    assert [(await raw(market))[0] for _ in range(3)] == [500, 503, 200]


@pytest.mark.parametrize(
    ("kind", "status", "body", "content_type"),
    [
        ("bad_gateway", 502, b"<title>502 Bad Gateway</title>", "text/html"),
        ("unauthorized", 401, b'{"message":"unauthorized."}', "application/json"),
        ("forbidden", 403, b'{"message":"forbidden."}', "application/json"),
        ("empty_body", 200, b"", "application/json"),
        ("redirect", 302, b"", ""),
    ],
)
async def test_answer_is_replaced(
    market: SimulatedMarket, kind: str, status: int, body: bytes, content_type: str
) -> None:
    await market.order(kind)
    answered, headers, content = await raw(market)
    assert answered == status
    assert body in content
    assert bool(content) == bool(body)
    assert headers.get("Content-Type", "").startswith(content_type)
    assert headers["X-Market-Simulated"] == "true"
    assert ("Location" in headers) == (status == 302)


async def test_hang_says_nothing_and_then_hangs_up(market: SimulatedMarket) -> None:
    await market.order("hang", hang_seconds=0.4)
    asked_at = monotonic()
    reader, writer = await connection(market)
    with closing(writer):
        assert await reader.read() == b""
    assert monotonic() - asked_at >= 0.4


async def test_hang_ends_when_the_client_leaves(market: SimulatedMarket) -> None:
    def connections() -> int:
        return sum("RequestHandler.start" in repr(task) for task in asyncio.all_tasks())

    async def hangs() -> bool:
        return bool((await market.control("GET", "status"))["requests"] == 1)

    await market.order("hang", hang_seconds=600)
    before = connections()
    _, writer = await connection(market)
    await eventually(hangs)
    assert connections() == before + 1
    writer.close()

    async def is_over() -> bool:
        return connections() == before

    await eventually(is_over)


async def test_hang_does_not_keep_the_server_from_stopping() -> None:
    async with simulated_market() as market:
        await market.order("hang", hang_seconds=600)
        _, writer = await connection(market)
        stopping_at = monotonic()
    assert monotonic() - stopping_at < 5
    writer.close()


async def test_byte_drip_sends_a_right_answer_byte_by_byte(market: SimulatedMarket) -> None:
    await market.order("byte_drip", interval_seconds=0.001)
    reader, writer = await connection(market)
    pieces = []
    with closing(writer):
        while piece := await reader.read(65_536):
            pieces.append(piece)
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"X-Market-Simulated: true" in head
    assert sorted(json.loads(body)["trades"]) == ["AAPL", "MSFT", "SPY"]
    assert len(pieces) > 20  # the head is in pieces too
    assert len(pieces[0]) < 20


async def test_reset_breaks_the_connection(market: SimulatedMarket) -> None:
    await market.order("reset")
    reader, writer = await connection(market)
    with closing(writer), pytest.raises(ConnectionResetError):
        await reader.read()


# ---- faults that spoil the body ------------------------------------------------------------------


async def test_truncated_json_is_cut_in_the_middle(market: SimulatedMarket) -> None:
    await market.order("truncated_json")
    status, headers, body = await raw(market)
    assert status == 200
    assert int(headers["Content-Length"]) == len(body) > 50
    with pytest.raises(json.JSONDecodeError):
        json.loads(body)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"as": "string"}, str),
        ({"as": "text"}, str),
        ({"as": "object"}, dict),
        ({"as": "bool"}, bool),
        ({"as": "array"}, list),
        ({"as": "null"}, type(None)),
        ({}, str),
    ],
)
async def test_wrong_types_spoil_the_prices_of_the_named_symbols(
    market: SimulatedMarket, parameters: dict[str, str], expected: type
) -> None:
    await market.order("wrong_types", symbols=["MSFT"], **parameters)
    found = await prices(market)
    assert type(found["MSFT"]) is expected
    assert found["AAPL"] > 1
    assert found["SPY"] > 1


async def test_absurd_prices_are_sent_as_such(market: SimulatedMarket) -> None:
    await market.order("nan", symbols=["AAPL"])
    await market.order("negative_price", symbols=["MSFT"])
    await market.order("zero_price", symbols=["SPY"])
    found = await prices(market)  # spoilers add up in one answer
    assert math.isnan(found["AAPL"])
    assert found["MSFT"] < 0
    assert found["SPY"] == 0
    await market.order("huge_price", symbols=["AAPL"])
    _, _, body = await raw(market)
    assert body.count(b'"p":1e400') == 1


async def test_missing_null_and_unknown_symbols(market: SimulatedMarket) -> None:
    await market.order("missing_symbols", symbols=["AAPL"])
    await market.order("null_symbols", symbols=["MSFT"])
    await market.order("unknown_symbols", symbols=["ZZZZ", "YYYY"])
    found = await prices(market)
    assert sorted(found) == ["MSFT", "SPY", "YYYY", "ZZZZ"]
    assert found["MSFT"] is None
    await market.order("missing_symbols")
    assert await prices(market) == {}


async def test_snapshots_and_crypto_are_spoiled_too(market: SimulatedMarket) -> None:
    await market.order("zero_price", symbols=["AAPL"])
    snapshots = await market.get("/v2/stocks/snapshots?symbols=AAPL,SPY")
    assert snapshots["AAPL"]["latestTrade"]["p"] == 0
    assert snapshots["AAPL"]["dailyBar"]["c"] == 0
    assert snapshots["SPY"]["latestTrade"]["p"] > 0
    await market.order("null_symbols", symbols=["BTC/USD"])
    coins = await market.get("/v1beta3/crypto/us/latest/trades?symbols=BTC/USD,ETH/USD")
    assert coins["trades"]["BTC/USD"] is None
    assert coins["trades"]["ETH/USD"]["p"] > 0


async def test_stale_trades_are_months_old(market: SimulatedMarket) -> None:
    await market.order("stale_trades")
    answer = await market.get(TRADES)
    for trade in answer["trades"].values():
        age = utc_now() - datetime.fromisoformat(trade["t"])
        assert timedelta(days=90) <= age < timedelta(days=90, seconds=10)


async def test_out_of_order_trades_are_older_than_the_last_sent(market: SimulatedMarket) -> None:
    await market.control("PUT", "prices", {"AAPL": {"price": 200, "at": "2026-11-20T15:00:00.123456789Z"}})
    sent = (await market.get(TRADES))["trades"]["AAPL"]
    assert (sent["p"], sent["t"]) == (200, "2026-11-20T15:00:00.123456789Z")
    await market.control("PUT", "prices", {"AAPL": {"price": 201, "at": "2026-11-20T15:10:00Z"}})
    await market.order("out_of_order", age_seconds=5, price=199.5, symbols=["AAPL"])
    late = (await market.get(TRADES))["trades"]["AAPL"]
    assert (late["p"], late["t"]) == (199.5, "2026-11-20T14:59:55.123456789Z")


# ---- which requests a fault concerns -------------------------------------------------------------


async def test_fault_happens_once_when_nothing_else_is_said(market: SimulatedMarket) -> None:
    await market.order("server_error")
    assert [(await raw(market))[0] for _ in range(2)] == [500, 200]


async def test_fault_waits_for_its_symbols_and_its_path(market: SimulatedMarket) -> None:
    await market.order("server_error", symbols=["TSLA"])
    await market.order("bad_gateway", path="/v2/clock")
    assert (await raw(market))[0] == 200
    assert (await raw(market, "/v2/stocks/trades/latest?symbols=TSLA"))[0] == 500
    assert (await raw(market, "/v2/clock"))[0] == 502


async def test_the_clock_is_spared_unless_it_is_named(market: SimulatedMarket) -> None:
    await market.order("server_error", seconds=60)
    assert (await raw(market, "/v2/clock"))[0] == 200
    assert [(await raw(market))[0] for _ in range(3)] == [500, 500, 500]
    await market.control("DELETE", "faults")
    assert (await raw(market))[0] == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "gremlins"}, "does not match any of the expected tags"),
        (
            {"kind": "hang", "hang_seconds": 6000},
            "hang.hang_seconds: Input should be less than or equal to 600",
        ),
        (
            {"kind": "reset", "retry_after_seconds": 1},
            "reset.retry_after_seconds: Extra inputs are not permitted",
        ),
        ({"kind": "nan", "times": 2, "seconds": 1}, "give times or seconds, not both"),
        ({"kind": "nan", "path": "simulator"}, "must begin with /v"),
        ([], "body: "),
    ],
)
async def test_a_wrong_fault_is_refused_in_words(market: SimulatedMarket, body: object, words: str) -> None:
    answer = await market.control("POST", "faults", body, status=422)
    assert words in answer["message"]


async def test_the_number_of_faults_is_bounded(market: SimulatedMarket) -> None:
    for _ in range(100):
        await market.order("server_error")
    answer = await market.control("POST", "faults", {"kind": "server_error"}, status=422)
    assert answer == {"message": "100 faults are waiting; delete them first"}


# ---- the other controls --------------------------------------------------------------------------


async def test_a_pinned_price_is_the_latest_trade_until_it_is_unpinned(market: SimulatedMarket) -> None:
    pin = {"price": "123.4567", "at": "2026-11-20T15:00:00Z"}
    await market.control("PUT", "prices", {"AAPL": pin, "BTC/USD": {"price": 98765.43}, "NEWCO": pin})
    found = (await market.get("/v2/stocks/trades/latest?symbols=AAPL,NEWCO,SPY"))["trades"]
    assert (found["AAPL"]["p"], found["AAPL"]["t"]) == (123.4567, "2026-11-20T15:00:00Z")
    assert found["NEWCO"]["p"] == 123.4567
    assert found["SPY"]["p"] != 123.4567
    coins = (await market.get("/v1beta3/crypto/us/snapshots?symbols=BTC/USD"))["snapshots"]
    assert coins["BTC/USD"]["latestTrade"]["p"] == 98765.43
    async with market.http.delete(f"{market.url}/simulator/prices?symbols=NEWCO"):
        assert sorted((await market.control("GET", "status"))["pinned"]) == ["AAPL", "BTC/USD"]
    await market.control("DELETE", "prices")
    found = (await market.get("/v2/stocks/trades/latest?symbols=AAPL,NEWCO"))["trades"]
    assert list(found) == ["AAPL"]
    assert found["AAPL"]["p"] != 123.4567


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("prices", {"AAPL": {"price": -1}}, 422, "AAPL.price: Input should be greater than 0"),
        ("prices", {"AAPL": {"price": 1, "at": "noon"}}, 422, "'noon' is not an RFC 3339 instant"),
        ("prices", {"a b": {"price": 1}}, 422, "is not a symbol"),
        ("prices", {"AAPL": 175}, 422, "AAPL: Input should be an object"),
        ("clock", {"speed": -1}, 422, "speed: Input should be greater than or equal to 0"),
        ("clock", {"speed": 1}, 409, "only a replay has a clock that can be set"),
    ],
)
async def test_a_wrong_control_is_refused_in_words(
    market: SimulatedMarket, path: str, body: object, status: int, words: str
) -> None:
    answer = await market.control("PUT", path, body, status=status)
    assert words in answer["message"]


async def test_the_status_tells_source_and_faults(market: SimulatedMarket) -> None:
    await market.order("server_error", times=3, symbols=["AAPL"])
    await raw(market)
    status = await market.control("GET", "status")
    assert status["simulated"] is True
    assert status["source"] == "synthetic"
    assert status["requests"] == 1
    assert status["data_requests_of_busiest_minute"] == 1
    assert status["faults"] == [{"kind": "server_error", "symbols": ["AAPL"], "status": 500, "times": 2}]
    assert {"AAPL", "BRK.B", "BTC/USD"} <= set(status["symbols"])
