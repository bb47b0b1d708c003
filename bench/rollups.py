"""The rollup of a day for all users, and what readers of charts notice of it."""

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from statistics import quantiles

from bench.charts import ours as chart_of_ours
from bench.data import MARKET_TIMEZONE, recent_history
from bench.figures import Figure, Measured
from bench.progress import say
from bench.server import Databases
from bench.sizes import Size
from bench.snapshots import kept_portfolios
from services.api_gateway import queries as gateway_queries
from services.api_gateway.performance import Timeframe
from services.snapshotter import history
from services.snapshotter import queries as snapshotter_queries
from shared import database as databases
from shared.clock import last_boundary, utc_now
from shared.database import Database

DAY_SECONDS_MAX = 10
CHART_MS_MAX = 3
_DAY = timedelta(days=1)
_READ_PAUSE_SECONDS = 0.01
_QUIET_READS = 200


@dataclass(frozen=True)
class _Reads:
    median_ms: float
    p99_ms: float


async def measure(server: Databases, size: Size) -> Measured:
    midnight = last_boundary(utc_now(), _DAY)
    name = await kept_portfolios(server, size.users, seed_like=False)
    async with (
        server.copy(name) as url,
        databases.connect(
            url,
            application_name="snapshotter",
            connections_max=4,
            statement_timeout_seconds=150.0,
            server_settings=snapshotter_queries.SERVER_SETTINGS,
        ) as database,
        databases.connect(
            url,
            application_name="api_gateway",
            connections_max=4,
            server_settings=gateway_queries.SERVER_SETTINGS,
            reads_only=True,
        ) as reading,
    ):
        # A whole day of UTC and a whole market date, and a tail for the reads.
        since, until = midnight - 2 * _DAY, midnight
        await recent_history(url, size.users, since, until, seed_like=False)
        say(f"  rolling up {size.users:,} users")
        await roll_up_all(database, since + _DAY)  # the market date before the first has only some hours
        stop = asyncio.Event()
        stop.set()
        quiet = await _reads(reading, size, until, stop)
        stop.clear()
        readers = asyncio.create_task(_reads(reading, size, until, stop))
        began = time.perf_counter()
        rows = await roll_up_all(database, until)
        seconds = time.perf_counter() - began
        stop.set()
        busy = await readers
    return Measured(
        [
            Figure(
                f"rollup of a day, {size.users:,} users, all tiers ({rows:,} rows)",
                "s",
                seconds,
                at_most=DAY_SECONDS_MAX,
            ),
            Figure(
                "  a chart meanwhile, median (limit: when it is quiet)",
                "ms",
                busy.median_ms,
                limit=quiet.median_ms,
                at_most=CHART_MS_MAX,
            ),
            Figure(
                "  a chart meanwhile, p99 (limit: when it is quiet)", "ms", busy.p99_ms, limit=quiet.p99_ms
            ),
        ],
        {},
    )


async def roll_up_all(database: Database, due_until: datetime) -> int:
    """Do every step that is due, as the snapshotter's upkeep does; return the rows written."""
    rows = 0
    for rollup in history.ROLLUPS:
        while step := await history.roll_up(database, rollup, due_until, MARKET_TIMEZONE):
            rows += step.rows
    return rows


async def _reads(database: Database, size: Size, now: datetime, stop: asyncio.Event) -> _Reads:
    """Read charts of random users one after the other, 1D and 1W in turn, until `stop` and at least some."""
    random = Random(3)  # noqa: S311  # the same users in every run
    milliseconds: list[float] = []
    while not stop.is_set() or len(milliseconds) < _QUIET_READS:
        timeframe = (Timeframe.ONE_DAY, Timeframe.ONE_WEEK)[len(milliseconds) % 2]
        began = time.perf_counter()
        await chart_of_ours(database, random.randint(1, size.users), timeframe, now - timedelta(minutes=5))
        milliseconds.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(_READ_PAUSE_SECONDS)
    percentiles = quantiles(milliseconds, n=100, method="inclusive")
    return _Reads(percentiles[49], percentiles[98])
