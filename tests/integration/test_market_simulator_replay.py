"""A replay tells what was recorded, when it was known; the closes are read off the recorded file by eye."""

import asyncio
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alpaca.data.requests import StockBarsRequest, StockLatestTradeRequest
from alpaca.data.timeframe import TimeFrame, TimeFrameUnit

from tests.conftest import ROOT
from tests.integration.simulated_market import alpaca_clients, replayed_week, simulated_market
from tests.waiting import eventually

WEEK = ["AIG", "BAC", "IBM", "SPY"]
TRADES = "/v2/stocks/trades/latest?symbols=AIG,BAC,IBM,SPY"
LAST_MINUTE_BEFORE = {"AIG": 49.98, "BAC": 14.18, "IBM": 186.07, "SPY": 170.17}  # the closes of 19:58
LAST_MINUTE = {"AIG": 50, "BAC": 14.19, "IBM": 186.16, "SPY": 170.3}  # the closes of 19:59


async def test_a_minute_is_told_when_it_has_ended_and_not_before(shared_folder: Path) -> None:
    async with replayed_week(shared_folder, "2013-10-11T19:59:59.999Z") as market:
        before = (await market.get(TRADES))["trades"]
        await market.control("PUT", "clock", {"at": "2013-10-11T20:00:00Z"})
        after = (await market.get(TRADES))["trades"]
    assert {symbol: trade["p"] for symbol, trade in before.items()} == LAST_MINUTE_BEFORE
    assert {symbol: trade["p"] for symbol, trade in after.items()} == LAST_MINUTE
    assert {trade["t"] for trade in before.values()} == {"2013-10-11T19:58:59.999999999Z"}
    assert {trade["t"] for trade in after.values()} == {"2013-10-11T19:59:59.999999999Z"}


async def test_alpaca_py_reads_the_recorded_closes(shared_folder: Path) -> None:
    async with replayed_week(shared_folder, "2013-10-11T20:00:00Z") as market:
        with alpaca_clients(market.url) as alpaca:
            request = StockLatestTradeRequest(symbol_or_symbols=[*WEEK, "AAPL"])
            trades = await asyncio.to_thread(alpaca.stocks.get_stock_latest_trade, request)
            clock = await asyncio.to_thread(alpaca.trading.get_clock)
    assert {symbol: trade.price for symbol, trade in trades.items()} == LAST_MINUTE
    assert clock.timestamp == datetime(2013, 10, 11, 20, 0, tzinfo=UTC)
    assert clock.is_open is False  # 16:00 in New York, a Friday
    assert clock.next_open == datetime(2013, 10, 14, 13, 30, tzinfo=UTC)


async def test_bars_are_the_recorded_ones_up_to_now(shared_folder: Path) -> None:
    async with replayed_week(shared_folder, "2013-10-11T19:53:30Z") as market:
        path = "/v2/stocks/bars?symbols=IBM&timeframe=1Min&start=2013-10-11T19:51:00Z"
        bars = (await market.get(path))["bars"]["IBM"]
    assert [(bar["t"], bar["o"], bar["h"], bar["l"], bar["c"], bar["v"]) for bar in bars] == [
        ("2013-10-11T19:51:00Z", 185.7, 185.73, 185.69, 185.7, 9771),
        ("2013-10-11T19:52:00Z", 185.71, 185.79, 185.68, 185.78, 13565),
    ]


async def test_larger_bars_are_made_of_the_recorded_minutes(shared_folder: Path) -> None:
    async with replayed_week(shared_folder, "2013-10-11T20:00:00Z") as market:
        path = "/v2/stocks/bars?symbols=AIG&timeframe=5Min&start=2013-10-11T19:55:00Z"
        bars = (await market.get(path))["bars"]["AIG"]
    assert [(bar["t"], bar["o"], bar["h"], bar["l"], bar["c"], bar["v"], bar["n"]) for bar in bars] == [
        # 34463 + 28962 + 34536 + 64926 + 461732 shares in five minutes
        ("2013-10-11T19:55:00Z", 49.87, 50, 49.87, 50, 624619, 5)
    ]


async def test_alpaca_py_reads_a_bar_for_each_recorded_day(shared_folder: Path) -> None:
    async with replayed_week(shared_folder, "2013-10-12T00:00:00Z") as market:
        with alpaca_clients(market.url) as alpaca:
            request = StockBarsRequest(
                symbol_or_symbols=["SPY"],
                timeframe=TimeFrame(1, TimeFrameUnit.Day),
                start=datetime(2013, 10, 1, tzinfo=UTC),
            )
            bars = (await asyncio.to_thread(alpaca.stocks.get_stock_bars, request)).data["SPY"]
    days = [4, 7, 8, 9, 10, 11]
    assert [bar.timestamp for bar in bars] == [datetime(2013, 10, day, 4, tzinfo=UTC) for day in days]
    assert bars[-1].close == 170.41


async def test_a_replay_runs_at_its_speed_and_stays_at_its_end(shared_folder: Path) -> None:
    async with replayed_week(shared_folder, "2013-10-11T19:59:59Z") as market:
        await market.control("PUT", "clock", {"speed": 1_000_000})

        async def ended() -> bool:
            return bool((await market.control("GET", "status"))["now"] == "2013-10-12T00:00:00Z")

        await eventually(ended)
        assert await ended()
        trades = (await market.get(TRADES))["trades"]
        assert trades["SPY"]["p"] == 170.41
        assert trades["SPY"]["t"] == "2013-10-11T23:59:59.999999999Z"


async def test_a_replay_without_a_start_begins_with_the_first_bar(shared_folder: Path) -> None:
    file = shared_folder / "market-data" / "minute-bars-aapl-split-2014-06.csv.gz"
    async with simulated_market(replay_file=file, replay_speed=0) as market:
        status = await market.control("GET", "status")
        assert status["now"] == "2014-06-05T08:15:00Z"
        assert status["symbols"] == ["AAPL"]
        assert await market.get("/v2/stocks/trades/latest?symbols=AAPL") == {"trades": {}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"SIMULATOR_REPLAY_FILE": "missing.csv"}, "missing.csv cannot be read: No such file or directory"),
        ({"SIMULATOR_REPLAY_FILE": "bad.csv"}, "bad.csv, line 3: close 'x' is not a number"),
        ({"SIMULATOR_PORT": "70000"}, "SIMULATOR_PORT must be less than or equal to 65535 (it is '70000')"),
    ],
)
def test_a_start_that_cannot_be_is_one_clear_error(
    tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    (tmp_path / "bad.csv").write_text(
        "timestamp,symbol,open,high,low,close,volume\n"
        "2013-10-11T19:59:00Z,SPY,170.17,170.3,170.15,170.3,2579730\n"
        "2013-10-11T20:00:00Z,SPY,170.17,170.3,170.15,x,2579730\n"
    )
    assert words in start_refused(tmp_path, settings)


def test_a_taken_port_is_one_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refusal = start_refused(tmp_path, {"SIMULATOR_PORT": str(port)})
    assert f"SIMULATOR_PORT {port} on 127.0.0.1 cannot be used: Address already in use" in refusal


def start_refused(folder: Path, settings: dict[str, str]) -> str:
    """Start the simulator, which must refuse, and return its words."""
    ended = subprocess.run(
        [sys.executable, "-m", "services.market_simulator"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "SIMULATOR_PORT": "0"} | settings,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert "market_simulator cannot start, its settings are wrong:" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    return ended.stderr
