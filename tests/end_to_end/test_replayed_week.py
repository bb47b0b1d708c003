"""The whole path on recorded prices: the week of October 2013 is replayed and read through the API.

100 SPY, 200 IBM, 1,000 BAC and 300 AIG. The expected values are sums read off the recorded file by other means, and
typed here.
"""

import asyncio
import csv
import gzip
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js.api import DeliverPolicy

from local.settings import ROOT, service_environment
from tests.end_to_end.running import System, system
from tests.waiting import eventually

RECORDED = Path("market-data") / "minute-bars-2013-10-04-to-11.csv.gz"
POSITIONS = "ticker,shares,cost_basis\nSPY,100,16500\nIBM,200,37000\nBAC,1000,14000.00\nAIG,300,14800.50\n"
CASH = "1000.25"

# Day, market value at 16:00 New York: e.g. the last: 100 * 170.30 + 200 * 186.16 + 1,000 * 14.19 + 300 * 50.00.
CLOSES = (
    ("2013-10-04", "82618.00"),
    ("2013-10-07", "81573.00"),
    ("2013-10-08", "80292.00"),
    ("2013-10-09", "80980.00"),
    ("2013-10-10", "82982.00"),
    ("2013-10-11", "83452.00"),
)


@pytest.fixture
async def replay(
    database_url: str, nats_url: str, tmp_path: Path, shared_folder: Path
) -> AsyncIterator[System]:
    """The whole system on the recorded week, standing still before its first minute, with one portfolio."""
    async with system(database_url, nats_url, tmp_path) as running:
        environment = service_environment({"DATABASE_URL": database_url})
        portfolio = tmp_path / "portfolio.csv"
        portfolio.write_text(POSITIONS)
        await asyncio.to_thread(administer, environment, "create-user", "demo", "--cash", CASH)
        await asyncio.to_thread(administer, environment, "import-positions", "demo", str(portfolio))
        await running.start(
            "market_simulator",
            SIMULATOR_REPLAY_FILE=str(shared_folder / RECORDED),
            SIMULATOR_REPLAY_SPEED="0",
            SIMULATOR_RATE_LIMIT="100000",
        )
        running.settings["ALPACA_REQUESTS_PER_MINUTE"] = "10000"
        for name in ("price_feeder", "snapshotter", "api_gateway"):
            await running.start(name)
        yield running


def administer(environment: dict[str, str], *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "services.admin", *arguments], cwd=ROOT, env=environment, check=True
    )


def recorded_closes(shared_folder: Path) -> dict[tuple[str, str], Decimal]:
    """Read the close of each symbol's every minute off the file."""
    with gzip.open(shared_folder / RECORDED, "rt") as file:
        return {(row["symbol"], row["timestamp"][:16]): Decimal(row["close"]) for row in csv.DictReader(file)}


async def test_closing_values_equal_the_sums_read_off_the_file(replay: System) -> None:
    for day, market_value in CLOSES:
        await replay.set_replay(at=f"{day}T20:00:00Z", speed=0)

        async def shows_the_close(day: str = day) -> Any:
            current = await replay.get("/api/portfolio/current")
            as_of = [position["price_as_of"] for position in current["positions"]]
            return len(as_of) == 4 and all(text.startswith(f"{day}T19:5") for text in as_of) and current

        current = await eventually(shows_the_close, timeout=20)
        assert current["investment_value"] == Decimal(market_value)
        assert current["total_value"] == Decimal(market_value) + Decimal(CASH)
        assert current["simulated"] is True
        assert {position["price_feed"] for position in current["positions"]} == {"simulated"}

    # 83,452.00 + 1,000.25
    async def chart_shows_the_last_close() -> Any:
        chart = await replay.get("/api/portfolio/performance?timeframe=1D")
        return chart["data_points"] and chart["data_points"][-1]["value"] == Decimal("84452.25") and chart

    chart = await eventually(chart_shows_the_last_close, timeout=20)
    assert chart["current_value"] == Decimal("84452.25")
    assert chart["data_available"] is True
    assert chart["profit_loss"] == Decimal("84452.25") - chart["start_value"]

    client = await nats.connect(replay.nats_url)
    subscription = await client.jetstream().subscribe(
        "prices.v1.>", ordered_consumer=True, deliver_policy=DeliverPolicy.LAST_PER_SUBJECT
    )
    ticks = [json.loads((await subscription.next_msg(timeout=5)).data) for _ in range(4)]
    await client.close()
    assert {tick["symbol"]: Decimal(tick["price"]) for tick in ticks} == {
        "SPY": Decimal("170.30"),
        "IBM": Decimal("186.16"),
        "BAC": Decimal("14.19"),
        "AIG": Decimal("50.00"),
    }


async def test_every_value_on_the_way_is_made_of_recorded_prices(replay: System, shared_folder: Path) -> None:
    closes = recorded_closes(shared_folder)
    await replay.set_replay(at="2013-10-10T13:00:00Z", speed=5000)
    seen = []

    async def is_over() -> bool:
        current = await replay.get("/api/portfolio/current")
        seen.append(current)
        as_of = {position["price_as_of"][:13] for position in current["positions"]}
        return bool(as_of) and min(as_of) >= "2013-10-11T19"

    await eventually(is_over, timeout=60, every=0.2)
    latest: dict[str, datetime] = {}
    for current in seen:
        for position in current["positions"]:
            ticker, at = position["ticker"], datetime.fromisoformat(position["price_as_of"])
            minute = f"{at:%Y-%m-%dT%H:%M}"
            assert position["price_per_share"] == closes[ticker, minute]
            assert at >= latest.get(ticker, at)
            latest[ticker] = at
        assert current["investment_value"] == sum(
            position["current_value"] for position in current["positions"]
        )
    assert len({current["total_value"] for current in seen}) > 10


async def test_services_end_with_zero_and_leave_their_history(replay: System) -> None:
    await replay.set_replay(at="2013-10-11T20:00:00Z", speed=0)

    async def has_history() -> Any:
        return (await replay.get("/api/portfolio/performance"))["data_available"]

    await eventually(has_history, timeout=20)
    for name, child in replay.children.items():
        await child.stop()
        assert "exit code 0" in await child.ended(), name
    await replay.start("api_gateway")
    assert (await replay.get("/api/portfolio/performance"))["data_available"] is True
