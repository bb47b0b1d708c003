"""Services and their servers start in any order, and a service stops at any moment: as processes, with real servers."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from local.settings import free_port
from services.market_simulator.server import serving
from services.market_simulator.settings import Settings as SimulatorSettings
from services.market_simulator.simulator import build
from shared.clock import utc_now
from shared.database import Database
from shared.lifecycle import STOP_GRACE_SECONDS
from tests.factories import create_user
from tests.integration.feeder_process import price_feeder
from tests.integration.service_process import SECRET, Process, service
from tests.integration.simulated_market import SimulatedMarket, simulated_market
from tests.integration.wire import Wire
from tests.waiting import eventually

MOMENTS = int(os.environ.get("STOP_MOMENTS", "1"))
"""Per service and trouble. The seed is fixed, so that a moment that failed comes again."""
WORK = {"price_feeder": {"prices_updated", "standby"}, "snapshotter": {"snapshots_taken"}}
"""What a service logs when it is at work, or ready to be; of several feeders one leads."""
EVERY_SECOND = str(1 / 60)
"""Minutes between two slots."""


@pytest.fixture
async def market(database: Database) -> AsyncIterator[SimulatedMarket]:
    await create_user(database, cash="5", positions={"AAPL": ("1", "1"), "BTC/USD": ("1", "1")})
    async with simulated_market(rate_limit=100_000) as running:
        yield running


def streaming(market_url: str) -> dict[str, str]:
    return {
        "PRICE_STREAM_ENABLED": "true",
        "ALPACA_STREAM_URL": market_url.replace("http", "ws", 1),
        "ALPACA_REQUESTS_PER_MINUTE": "100000",
    }


@asynccontextmanager
async def running(name: str, database_url: str, nats_url: str, market_url: str) -> AsyncIterator[Process]:
    """Run a service on servers that may be away."""
    port = free_port()
    if name == "price_feeder":
        async with price_feeder(database_url, nats_url, market_url, port, **streaming(market_url)) as process:
            yield process
        return
    settings = {
        "DATABASE_URL": database_url,
        "NATS_URL": nats_url,
        "SNAPSHOT_INTERVAL_MINUTES": EVERY_SECOND,
        "JWT_SECRET": f"{SECRET} and long enough to sign a token",
        "GATEWAY_PORT": str(free_port()),
    }
    async with service(name, port, settings) as process:
        yield process


# ---- start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("postgres", "nats", "market"), ("market", "nats", "postgres")])
async def test_services_start_before_their_servers_in_any_order_and_heal_by_themselves(
    database: Database, database_url: str, nats_url: str, order: tuple[str, ...]
) -> None:
    await create_user(database, cash="5", positions={"AAPL": ("1", "1")})
    market_url = f"http://127.0.0.1:{free_port()}"
    async with AsyncExitStack() as stack:
        postgres = await stack.enter_async_context(Wire(database_url))
        nats = await stack.enter_async_context(Wire(nats_url))
        processes = [
            await stack.enter_async_context(running(name, postgres.url, nats.url, market_url))
            for name in ("price_feeder", "snapshotter", "api_gateway")
        ]
        feeder, snapshotter, gateway = processes

        async def without_anything_none_is_ready() -> bool:
            said = [await process.ready() for process in processes]
            return [each and each["status"] for each in said] == ["not ready"] * 3

        await eventually(without_anything_none_is_ready, timeout=40, every=0.2)
        for server in order:
            if server == "market":
                simulator = build(SimulatorSettings(simulator_rate_limit=100_000))
                port = urlsplit(market_url).port or 0
                await stack.enter_async_context(serving(simulator, "127.0.0.1", port))
            else:
                await (postgres if server == "postgres" else nats).connect()

        async def all_are_well() -> bool:
            for process in processes:
                said = await process.ready()
                assert said
                wrong = {name: result for name, result in said["checks"].items() if result != "ok"}
                # What was due while a server was away is gone, or late: that is told for a minute, and is no fault now.
                if not wrong.get("snapshots", "").startswith("a slot waits"):
                    wrong.pop("snapshots", None)
                assert not wrong, wrong
            return True

        await eventually(all_are_well, timeout=30, every=0.2)

        async def work_is_done() -> bool:
            return bool(
                await database.fetch_value("SELECT count(*) FROM asset_prices")
                and await database.fetch_value("SELECT count(*) FROM portfolio_snapshots")
            )

        await eventually(work_is_done, timeout=20)
        for process in processes:
            assert (await process.terminate())[0] == 0
            assert process.errors == []
        assert feeder.logged("check_failed")
        assert {line["check"] for line in snapshotter.logged("check_recovered")} >= {"postgres", "nats"}
        assert gateway.logged("stopped")


# ---- stop ----------------------------------------------------------------------------------------


def has_taken_over_sigterm(pid: int) -> bool:
    """Tell whether the process has a handler of its own: before that it is Python that starts, 20 ms or so."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


async def assert_ends_well(process: Process) -> None:
    code, seconds = await process.terminate()
    assert code == 0, process.lines[-3:] + process.errors
    assert seconds < STOP_GRACE_SECONDS, process.lines[-3:]
    assert process.errors == []
    assert not process.logged("service_failed")


@pytest.mark.parametrize(
    ("name", "import_seconds"),
    [("price_feeder", 5.0), ("snapshotter", 1.5), ("api_gateway", 1.5), ("market_simulator", 1.5)],
)
async def test_signal_at_any_moment_of_the_start_ends_it_with_exit_code_0(
    database_url: str, nats_url: str, name: str, import_seconds: float
) -> None:
    moments = random.Random(name)

    async def start_and_stop(after_seconds: float) -> None:
        async with running(name, database_url, nats_url, "http://127.0.0.1:9") as process:

            async def can_be_asked() -> bool:
                return has_taken_over_sigterm(process.process.pid)

            await eventually(can_be_asked, every=0.001)
            await asyncio.sleep(after_seconds)
            await assert_ends_well(process)

    first = start_and_stop(0)
    await asyncio.gather(first, *(start_and_stop(moments.uniform(0, import_seconds)) for _ in range(MOMENTS)))


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        ("price_feeder", ""),
        ("price_feeder", "postgres, nats"),
        ("snapshotter", "postgres"),
        ("snapshotter", "nats"),
    ],
)
async def test_signal_at_any_moment_of_the_work_ends_it_within_the_grace(
    database_url: str, nats_url: str, market: SimulatedMarket, name: str, trouble: str
) -> None:
    moments = random.Random(f"{name} {trouble}")

    async def work_and_stop(after_seconds: float) -> None:
        async with (
            Wire(database_url) as postgres,
            Wire(nats_url) as nats,
            running(name, postgres.url, nats.url, market.url) as process,
        ):
            await postgres.connect()
            await nats.connect()

            async def is_at_work() -> bool:
                assert process.process.returncode is None, process.lines[-3:] + process.errors
                return any(process.logged(event) for event in WORK[name])

            await eventually(is_at_work, timeout=40)
            for server, wire in (("postgres", postgres), ("nats", nats)):
                if server in trouble:
                    wire.freeze()
            await asyncio.sleep(after_seconds)
            await assert_ends_well(process)

    await asyncio.gather(*(work_and_stop(moments.uniform(0, 3)) for _ in range(MOMENTS)))


# ---- one replica at a time -----------------------------------------------------------------------


async def test_rolling_restart_of_feeders_and_snapshotters_loses_no_slot_and_prices_go_on(
    database: Database, database_url: str, nats_url: str, market: SimulatedMarket
) -> None:
    async def slots() -> list[datetime]:
        """Return every slot that is stored; a second row of one would be refused by its key."""
        rows = await database.fetch("SELECT timestamp FROM portfolio_snapshots ORDER BY timestamp")
        return [row["timestamp"] for row in rows]

    async def traded_at() -> datetime:
        oldest: datetime = await database.fetch_value("SELECT min(traded_at) FROM asset_prices")
        return oldest

    @asynccontextmanager
    async def replica(name: str) -> AsyncIterator[Process]:
        async with running(name, database_url, nats_url, market.url) as process:

            async def is_ready() -> bool:
                said = await process.ready()
                return said is not None and said["status"] == "ready"

            await eventually(is_ready, timeout=40, every=0.1)
            yield process

    async with AsyncExitStack() as stack:
        names = ("price_feeder", "snapshotter")
        old = {(name, 0): await stack.enter_async_context(replica(name)) for name in names}
        old |= {(name, 1): await stack.enter_async_context(replica(name)) for name in names}
        await market.control("PUT", "stream/load", {"symbols": ["AAPL", "BTC/USD"], "ticks_per_second": 20})
        began_at = utc_now()
        restarted = []
        for (name, _), process in old.items():
            await assert_ends_well(process)
            restarted.append(await stack.enter_async_context(replica(name)))
        ended_at = utc_now()

        async def is_up_to_date() -> bool:
            taken = await slots()
            return taken[-1] > ended_at and await traded_at() > ended_at

        await eventually(is_up_to_date)
        taken = [slot for slot in await slots() if slot > began_at]
        assert {later - earlier for earlier, later in pairwise(taken)} == {timedelta(seconds=1)}
        assert taken[0] - began_at < timedelta(seconds=1)
        processes = [*old.values(), *restarted]
        gone, *takeovers = sorted(
            (line["timestamp"], event)
            for process in processes
            for event in ("lease_acquired", "lease_released")
            for line in process.logged(event)
        )
        assert gone[1] == "lease_acquired"
        for (released_at, released), (acquired_at, acquired) in zip(
            takeovers[::2], takeovers[1::2], strict=True
        ):
            assert (released, acquired) == ("lease_released", "lease_acquired")
            took = datetime.fromisoformat(acquired_at) - datetime.fromisoformat(released_at)
            assert took < timedelta(seconds=5)
