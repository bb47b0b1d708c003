"""The price feeder's client against this project's own market simulator, each knowing only Alpaca's protocol."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest

from services.price_feeder.market_data import MarketData
from shared.clock import utc_now
from tests.conftest import ROOT
from tests.waiting import eventually


@pytest.fixture
async def simulator_url(unused_tcp_port: int) -> AsyncIterator[str]:
    environment = {"PATH": os.environ["PATH"], "SIMULATOR_PORT": str(unused_tcp_port)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.market_simulator",
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )

    async def accepts() -> bool:
        assert process.returncode is None
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(accepts, timeout=20)
        yield f"http://127.0.0.1:{unused_tcp_port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_simulators_prices_are_understood_and_known_to_be_simulated(simulator_url: str) -> None:
    async with MarketData(
        api_key="key", secret_key="secret", url=simulator_url, feed="iex", requests_per_minute=200
    ) as market:
        symbols = ["AAPL", "BRK.B", "BTC/USD", "NOSUCH"]
        found = await market.latest_trades(symbols, now=utc_now(), seconds_max=9, stop=asyncio.Event())
    assert {trade.symbol for trade in found.trades} == {"AAPL", "BRK.B", "BTC/USD"}
    assert {trade.feed for trade in found.trades} == {"simulated"}
    assert all(trade.price > Decimal(1) for trade in found.trades)
    assert (found.rejected, found.problems) == ({"NOSUCH": "missing"}, [])
