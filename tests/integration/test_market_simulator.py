"""The simulator over HTTP: alpaca-py's clients need only its URL, and its answers fit Alpaca's schemas."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from alpaca.common.enums import Sort
from alpaca.common.exceptions import APIError
from alpaca.data.enums import DataFeed
from alpaca.data.requests import (
    CryptoBarsRequest,
    CryptoLatestBarRequest,
    CryptoLatestQuoteRequest,
    CryptoLatestTradeRequest,
    CryptoSnapshotRequest,
    StockBarsRequest,
    StockLatestBarRequest,
    StockLatestQuoteRequest,
    StockLatestTradeRequest,
    StockSnapshotRequest,
)
from alpaca.data.timeframe import TimeFrame, TimeFrameUnit
from alpaca.trading.requests import GetCalendarRequest

from shared.clock import utc_now
from tests.integration.simulated_market import (
    KEYS,
    AlpacaClients,
    SimulatedMarket,
    alpaca_clients,
    replayed_week,
    simulated_market,
    validate,
)

STOCKS = ["AAPL", "BRK.B", "SPY"]
COINS = ["BTC/USD", "ETH/USD"]
DAY = timedelta(days=1)


@pytest.fixture
async def market() -> AsyncIterator[SimulatedMarket]:
    async with simulated_market(seed=1) as served:
        yield served


@pytest.fixture
async def alpaca(market: SimulatedMarket) -> AsyncIterator[AlpacaClients]:
    with alpaca_clients(market.url) as clients:
        yield clients


# ---- alpaca-py -----------------------------------------------------------------------------------


async def test_alpaca_py_reads_the_latest_trades_of_stocks(alpaca: AlpacaClients) -> None:
    request = StockLatestTradeRequest(symbol_or_symbols=[*STOCKS, "NOSUCH"], feed=DataFeed.IEX)
    trades = await asyncio.to_thread(alpaca.stocks.get_stock_latest_trade, request)
    assert sorted(trades) == STOCKS  # an unknown symbol is simply absent
    for trade in trades.values():
        assert trade.price > 1
        assert trade.size >= 100
        assert trade.exchange == "V"
        assert timedelta(0) <= utc_now() - trade.timestamp < timedelta(seconds=10)


async def test_alpaca_py_reads_snapshots_of_stocks(alpaca: AlpacaClients) -> None:
    request = StockSnapshotRequest(symbol_or_symbols=["BRK.B"])
    found = (await asyncio.to_thread(alpaca.stocks.get_stock_snapshot, request))["BRK.B"]
    assert found.latest_quote.bid_price < found.latest_trade.price < found.latest_quote.ask_price
    assert found.daily_bar.low <= found.minute_bar.close <= found.daily_bar.high
    assert found.previous_daily_bar.timestamp < found.daily_bar.timestamp <= found.minute_bar.timestamp


async def test_alpaca_py_reads_quotes_and_bars_of_stocks(alpaca: AlpacaClients) -> None:
    quotes = await asyncio.to_thread(
        alpaca.stocks.get_stock_latest_quote, StockLatestQuoteRequest(symbol_or_symbols="SPY")
    )
    bars = await asyncio.to_thread(
        alpaca.stocks.get_stock_latest_bar, StockLatestBarRequest(symbol_or_symbols="SPY")
    )
    assert quotes["SPY"].bid_price < quotes["SPY"].ask_price
    assert bars["SPY"].low <= bars["SPY"].close <= bars["SPY"].high
    assert timedelta(minutes=1) <= utc_now() - bars["SPY"].timestamp < timedelta(minutes=3)


async def test_alpaca_py_reads_crypto_without_a_key(alpaca: AlpacaClients) -> None:
    trades = await asyncio.to_thread(
        alpaca.crypto.get_crypto_latest_trade, CryptoLatestTradeRequest(symbol_or_symbols=[*COINS, "NO/USD"])
    )
    quotes = await asyncio.to_thread(
        alpaca.crypto.get_crypto_latest_quote, CryptoLatestQuoteRequest(symbol_or_symbols=COINS)
    )
    bars = await asyncio.to_thread(
        alpaca.crypto.get_crypto_latest_bar, CryptoLatestBarRequest(symbol_or_symbols=COINS)
    )
    snapshots = await asyncio.to_thread(
        alpaca.crypto.get_crypto_snapshot, CryptoSnapshotRequest(symbol_or_symbols=COINS)
    )
    for answer in (trades, quotes, bars, snapshots):
        assert sorted(answer) == COINS
    assert trades["BTC/USD"].price > trades["ETH/USD"].price > 100
    assert snapshots["BTC/USD"].previous_daily_bar is not None


@pytest.mark.parametrize(
    ("timeframe", "starts"),
    [
        (TimeFrame(1, TimeFrameUnit.Minute), ["2026-03-02T14:30:00", "2026-03-02T14:31:00"]),
        (TimeFrame(5, TimeFrameUnit.Minute), ["2026-03-02T14:30:00", "2026-03-02T14:35:00"]),
        (TimeFrame(15, TimeFrameUnit.Minute), ["2026-03-02T14:30:00", "2026-03-02T14:45:00"]),
        (TimeFrame(30, TimeFrameUnit.Minute), ["2026-03-02T14:30:00", "2026-03-02T15:00:00"]),
        (TimeFrame(1, TimeFrameUnit.Hour), ["2026-03-02T15:00:00", "2026-03-02T16:00:00"]),
        (TimeFrame(1, TimeFrameUnit.Day), ["2026-03-03T05:00:00", "2026-03-04T05:00:00"]),
        (TimeFrame(1, TimeFrameUnit.Week), ["2026-03-09T04:00:00", "2026-03-16T04:00:00"]),
        (TimeFrame(1, TimeFrameUnit.Month), ["2026-04-01T04:00:00", "2026-05-01T04:00:00"]),
        (TimeFrame(3, TimeFrameUnit.Month), ["2026-04-01T04:00:00", "2026-07-01T04:00:00"]),
    ],
    ids=lambda value: str(value) if isinstance(value, TimeFrame) else "",
)
async def test_alpaca_py_reads_bars_of_every_timeframe(
    alpaca: AlpacaClients, timeframe: TimeFrame, starts: list[str]
) -> None:
    request = StockBarsRequest(
        symbol_or_symbols="IBM", timeframe=timeframe, start=datetime(2026, 3, 2, 14, 30, tzinfo=UTC), limit=2
    )
    bars = (await asyncio.to_thread(alpaca.stocks.get_stock_bars, request)).data["IBM"]
    assert [bar.timestamp for bar in bars] == [datetime.fromisoformat(start + "+00:00") for start in starts]


async def test_alpaca_py_reads_bars_of_crypto(alpaca: AlpacaClients) -> None:
    start = datetime(2026, 3, 2, tzinfo=UTC)
    request = CryptoBarsRequest(
        symbol_or_symbols=COINS, timeframe=TimeFrame.Hour, start=start, end=start + DAY
    )
    bars = (await asyncio.to_thread(alpaca.crypto.get_crypto_bars, request)).data
    assert {symbol: len(found) for symbol, found in bars.items()} == {"BTC/USD": 25, "ETH/USD": 25}


@pytest.mark.parametrize("sort", [Sort.ASC, Sort.DESC])
async def test_paging_visits_every_bar_of_every_symbol_once(market: SimulatedMarket, sort: Sort) -> None:
    query = "symbols=SPY,AAPL,IBM&timeframe=1Min&start=2026-03-02T14:30:00Z&end=2026-03-02T14:59:00Z"
    seen: list[tuple[str, str]] = []
    token, pages = "", 0
    while True:
        page = await market.get(f"/v2/stocks/bars?{query}&sort={sort.value}&limit=7{token}")
        found = [(symbol, bar["t"]) for symbol, bars in page["bars"].items() for bar in bars]
        assert len(found) <= 7
        seen += found
        pages += 1
        if page["next_page_token"] is None:
            break
        token = "&page_token=" + page["next_page_token"]
    minutes = [f"2026-03-02T14:{minute}:00Z" for minute in range(30, 60)]
    ordered = minutes if sort is Sort.ASC else minutes[::-1]
    assert seen == [(symbol, minute) for symbol in ("AAPL", "IBM", "SPY") for minute in ordered]
    assert pages == 13  # 90 bars, 7 a page


async def test_alpaca_py_follows_the_pages(alpaca: AlpacaClients) -> None:
    start = datetime(2026, 3, 2, tzinfo=UTC)
    request = StockBarsRequest(
        symbol_or_symbols=["AAPL", "SPY"],
        timeframe=TimeFrame.Minute,
        start=start,
        end=start + timedelta(minutes=5_999),
    )
    bars = (await asyncio.to_thread(alpaca.stocks.get_stock_bars, request)).data
    assert {symbol: len(found) for symbol, found in bars.items()} == {"AAPL": 6_000, "SPY": 6_000}
    assert len({bar.timestamp for bar in bars["SPY"]}) == 6_000


async def test_alpaca_py_reads_the_clock(alpaca: AlpacaClients) -> None:
    clock = await asyncio.to_thread(alpaca.trading.get_clock)
    assert abs(utc_now() - clock.timestamp) < timedelta(seconds=10)
    assert clock.timestamp < clock.next_close
    assert clock.timestamp < clock.next_open
    assert clock.is_open == (clock.next_close < clock.next_open)


async def test_alpaca_py_reads_the_calendar_with_early_closes(alpaca: AlpacaClients) -> None:
    request = GetCalendarRequest(start=date(2026, 11, 25), end=date(2026, 11, 30))
    days = await asyncio.to_thread(alpaca.trading.get_calendar, request)
    assert [(day.open, day.close) for day in days] == [
        (datetime(2026, 11, 25, 9, 30), datetime(2026, 11, 25, 16, 0)),  # noqa: DTZ001 - alpaca-py's are naive
        (datetime(2026, 11, 27, 9, 30), datetime(2026, 11, 27, 13, 0)),  # noqa: DTZ001
        (datetime(2026, 11, 30, 9, 30), datetime(2026, 11, 30, 16, 0)),  # noqa: DTZ001
    ]


async def test_alpaca_py_sees_a_wrong_stock_symbol_as_an_error(alpaca: AlpacaClients) -> None:
    request = StockLatestTradeRequest(symbol_or_symbols=["AAPL", "BTC/USD"])
    with pytest.raises(APIError) as refusal:
        await asyncio.to_thread(alpaca.stocks.get_stock_latest_trade, request)
    assert refusal.value.status_code == 400
    assert refusal.value.message == "invalid symbol: BTC/USD"


# ---- Alpaca's schemas ----------------------------------------------------------------------------

BARS = "timeframe=1Day&start=2026-03-02&end=2026-03-20"
ENDPOINTS = [
    ("/v2/stocks/trades/latest?symbols=AAPL,BRK.B", "stock_latest_trades_resp"),
    ("/v2/stocks/quotes/latest?symbols=AAPL,BRK.B", "stock_latest_quotes_resp"),
    ("/v2/stocks/bars/latest?symbols=AAPL,BRK.B", "stock_latest_bars_resp"),
    ("/v2/stocks/snapshots?symbols=AAPL,BRK.B", "stock_snapshots_resp"),
    (f"/v2/stocks/bars?symbols=AAPL,BRK.B&limit=20&{BARS}", "stock_bars_resp"),
    (f"/v2/stocks/bars?symbols=NOSUCH&{BARS}", "stock_bars_resp"),
    ("/v2/stocks/BRK.B/trades/latest", "stock_latest_trades_resp_single"),
    ("/v2/stocks/BRK.B/quotes/latest", "stock_latest_quotes_resp_single"),
    ("/v2/stocks/BRK.B/bars/latest", "stock_latest_bars_resp_single"),
    ("/v2/stocks/BRK.B/snapshot", "stock_snapshots_resp_single"),
    (f"/v2/stocks/BRK.B/bars?{BARS}", "stock_bars_resp_single"),
    ("/v1beta3/crypto/us/latest/trades?symbols=BTC/USD,ETH/USD", "crypto_latest_trades_resp"),
    ("/v1beta3/crypto/us/latest/quotes?symbols=BTC/USD,ETH/USD", "crypto_latest_quotes_resp"),
    ("/v1beta3/crypto/us/latest/bars?symbols=BTC/USD,ETH/USD", "crypto_latest_bars_resp"),
    ("/v1beta3/crypto/us/snapshots?symbols=BTC/USD,ETH/USD", "crypto_snapshots_resp"),
    (f"/v1beta3/crypto/us/bars?symbols=BTC/USD,ETH/USD&{BARS}", "crypto_bars_resp"),
]


@pytest.mark.parametrize(("path", "schema"), ENDPOINTS)
async def test_market_data_fits_the_published_schema(
    market: SimulatedMarket, shared_folder: Path, path: str, schema: str
) -> None:
    validate(shared_folder, "market-data-api", schema, await market.get(path))


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/v2/stocks/trades/latest?symbols=AIG,SPY", "stock_latest_trades_resp"),
        ("/v2/stocks/snapshots?symbols=AIG,SPY", "stock_snapshots_resp"),
        ("/v2/stocks/bars?symbols=AIG,SPY&timeframe=1Hour&start=2013-10-10", "stock_bars_resp"),
        ("/v2/stocks/quotes/latest?symbols=AIG,SPY", "stock_latest_quotes_resp"),
    ],
)
async def test_a_replay_fits_the_published_schema(shared_folder: Path, path: str, schema: str) -> None:
    async with replayed_week(shared_folder, "2013-10-11T20:00:00Z") as market:
        validate(shared_folder, "market-data-api", schema, await market.get(path))


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/v2/clock", "legacy_clock"),
        ("/v2/calendar?start=2026-01-01&end=2026-12-31", "legacy_public_calendar_resp"),
    ],
)
async def test_the_trading_host_fits_the_published_schema(
    market: SimulatedMarket, shared_folder: Path, path: str, schema: str
) -> None:
    validate(shared_folder, "trading-api", schema, await market.get(path))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v2/stocks/trades/latest", "symbols is required"),
        ("/v2/stocks/trades/latest?symbols=", "symbols is required"),
        ("/v2/stocks/trades/latest?symbols=AAPL,some junk", "invalid symbol: some junk"),
        ("/v2/stocks/trades/latest?symbols=aapl", "invalid symbol: aapl"),
        ("/v2/stocks/trades/latest?symbols=AAPL,,SPY", "invalid symbol: "),
        ("/v2/stocks/trades/latest?symbols=AAPL&feed=cnn", "invalid feed: cnn"),
        ("/v2/stocks/snapshots?symbols=BTC/USD", "invalid symbol: BTC/USD"),
        ("/v2/stocks/bars?symbols=AAPL", "timeframe is required"),
        ("/v2/stocks/bars?symbols=AAPL&timeframe=61Min", "invalid timeframe: 61Min"),
        ("/v2/stocks/bars?symbols=AAPL&timeframe=5Month", "invalid timeframe: 5Month"),
        (
            "/v2/stocks/bars?symbols=AAPL&timeframe=1Day&limit=0",
            "invalid limit: 0, it must be from 1 to 10000",
        ),
        ("/v2/stocks/bars?symbols=AAPL&timeframe=1Day&page_token=QUJD", "invalid page_token"),
        ("/v2/stocks/bars?symbols=AAPL&timeframe=1Day&sort=up", "invalid sort: up"),
        (
            "/v2/stocks/bars?symbols=AAPL&timeframe=1Day&start=today",
            "invalid start: today is neither RFC 3339 nor YYYY-MM-DD",
        ),
        (
            "/v2/stocks/bars?symbols=AAPL&timeframe=1Day&start=2026-03-02&end=2026-03-01",
            "end should not be before start",
        ),
        ("/v1beta3/crypto/us/latest/trades?symbols=AAPL", "invalid symbol: AAPL"),
        ("/v1beta3/crypto/mars/latest/trades?symbols=BTC/USD", "invalid location: mars"),
        ("/v2/calendar?start=soon", "invalid start: soon is not a date"),
    ],
)
async def test_a_wrong_question_is_refused_in_words(market: SimulatedMarket, path: str, message: str) -> None:
    assert await market.get(path, status=400) == {"message": message}


async def test_an_unknown_stock_alone_and_an_unknown_path_are_not_found(market: SimulatedMarket) -> None:
    assert await market.get("/v2/stocks/NOSUCH/trades/latest", status=404) == {
        "message": "no trade found for NOSUCH"
    }
    assert await market.get("/v2/stonks", status=404) == {"message": "endpoint not found."}


async def test_stocks_and_the_trading_host_need_both_key_headers(market: SimulatedMarket) -> None:
    for path in ("/v2/stocks/trades/latest?symbols=AAPL", "/v2/clock"):
        for headers in ({}, {"APCA-API-KEY-ID": "key"}, {"APCA-API-SECRET-KEY": "secret"}):
            async with market.http.get(market.url + path, headers=headers) as response:
                assert response.status == 401
                assert await response.json() == {"message": "unauthorized."}


async def test_other_keys_are_forbidden_when_one_pair_is_set() -> None:
    async with simulated_market(api_key="key", secret_key="another") as market:
        path = "/v2/stocks/trades/latest?symbols=AAPL"
        assert await market.get(path, status=403) == {"message": "forbidden."}
        right = KEYS | {"APCA-API-SECRET-KEY": "another"}
        async with market.http.get(market.url + path, headers=right) as response:
            assert response.status == 200


async def test_requests_over_the_limit_are_told_when_to_come_back() -> None:
    async with simulated_market(rate_limit=2) as market:
        path = f"{market.url}/v2/stocks/trades/latest?symbols=AAPL"
        remaining = []
        for _ in range(2):
            async with market.http.get(path, headers=KEYS) as response:
                assert response.headers["X-RateLimit-Limit"] == "2"
                remaining.append(response.headers["X-RateLimit-Remaining"])
        assert remaining == ["1", "0"]
        async with market.http.get(path, headers=KEYS) as response:
            assert response.status == 429
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            reset_in = int(response.headers["X-RateLimit-Reset"]) - utc_now().timestamp()
            assert 0 < reset_in <= 61
        async with market.http.get(path, headers=KEYS | {"APCA-API-KEY-ID": "other"}) as response:
            assert response.status == 200  # each key has its own minute
        await market.get("/v2/clock")  # and so has the trading host


async def test_the_delayed_feed_is_a_quarter_of_an_hour_late(market: SimulatedMarket) -> None:
    answer = await market.get("/v2/stocks/trades/latest?symbols=AAPL&feed=delayed_sip")
    age = utc_now() - datetime.fromisoformat(answer["trades"]["AAPL"]["t"])
    assert timedelta(minutes=15) <= age < timedelta(minutes=15, seconds=10)


async def test_the_same_seed_gives_the_same_bars_in_another_instance() -> None:
    path = "/v2/stocks/bars?symbols=AAPL,BRK.B&timeframe=5Min&start=2026-03-02T14:30:00Z&limit=50"
    answers = []
    for seed in (7, 7, 8):
        async with simulated_market(seed=seed) as market:
            answers.append(await market.get(path))
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


async def test_health_needs_no_key(market: SimulatedMarket) -> None:
    for path in ("/healthz", "/readyz"):
        async with market.http.get(market.url + path) as response:
            assert response.status == 200
            assert (await response.json())["service"] == "market_simulator"
