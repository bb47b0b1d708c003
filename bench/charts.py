"""Charts, as the database and its reader answer them: the seed's way, ours, and the bare statement."""

import json
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg

from bench.data import HISTORY_END, MARKET_TIMEZONE, YEAR, history_of_ours, history_of_seed, lengths
from bench.figures import Figure, Measured, middle
from bench.progress import progress, say
from bench.seed_like.performance_service import data_points
from bench.seed_like.sessions import engine, sessions
from bench.server import Databases, connected
from bench.sizes import Size
from services.api_gateway import performance, queries
from services.api_gateway.performance import MarketDays, Timeframe
from shared import database as databases
from shared.database import Database

MANY_POINTS = 721
MS_MAX, MANY_POINTS_MS_MAX = 3, 10
SEED_TIMES_MIN = {Timeframe.THREE_MONTHS: 20.0}
LONGEST_TIMES_MIN = 200
POINT_COST_TIMES_MAX = 1.5
_SEED_ROWS_MANY = 100_000
"""A chart that reads more rows is asked for fewer times: it takes seconds."""
_ZONE = ZoneInfo(MARKET_TIMEZONE)

Read = Callable[[int, Timeframe], Awaitable[int]]


async def measure(server: Databases, size: Size) -> Measured:
    parameters = f"{size.chart_users} {size.chart_days} {size.years} {HISTORY_END}"
    ours_url = await server.kept(
        "history",
        f"history 1 {parameters} {await server.history_schema()}",
        lambda url: history_of_ours(url, size),
    )
    seed_url = await server.kept(
        "seed_history", f"seed-like history 1 {parameters}", lambda url: history_of_seed(url, size)
    )
    figures: list[Figure] = []
    series: dict[str, list[tuple[float, float]]] = {"ours": [], "seed": []}
    seed_engine = engine(seed_url)
    seed_sessions = sessions(seed_engine)

    async def read_seed(user_id: int, timeframe: Timeframe) -> int:
        async with seed_sessions() as session:
            return len(await data_points(session, user_id, timeframe.value, HISTORY_END))

    async with (
        databases.connect(
            ours_url,
            application_name="api_gateway",
            connections_max=2,
            server_settings=queries.SERVER_SETTINGS,
            reads_only=True,
        ) as database,
        connected(ours_url) as bare,
    ):
        await bare.execute("SET plan_cache_mode = force_generic_plan")
        await bare.execute("SET jit = off")

        async def read_ours(user_id: int, timeframe: Timeframe) -> int:
            return await ours(database, user_id, timeframe, HISTORY_END)

        users = Random(1).sample(range(1, size.chart_users + 1), size.sampled_users)  # noqa: S311
        oldest = max(lengths(size))
        years = size.years[-1]
        days = f"{size.chart_users:,} users x {size.chart_days} days"
        per_point: dict[tuple[int, Timeframe], float] = {}
        cases = [(days, users, timeframe) for timeframe in Timeframe]
        cases += [(f"{years:g} years", [oldest], timeframe) for timeframe in Timeframe]
        for what, of_users, timeframe in progress("charts", cases, total=len(cases), unit="charts"):
            is_oldest = of_users == [oldest]
            runs = size.runs if not is_oldest else 5 * size.runs
            our_ms, points = await _median_ms(read_ours, of_users, timeframe, runs)
            is_slow = is_oldest and timeframe in (Timeframe.YEAR_TO_DATE, Timeframe.ALL)
            seed_runs = size.runs if is_slow else runs
            seed_of = of_users if is_slow else of_users[:10]
            seed_ms, seed_points = await _median_ms(read_seed, seed_of, timeframe, seed_runs)
            # The seed's window is cut at its start, which leaves a part of one more bucket.
            assert seed_points - points in (0, 1), f"{timeframe}: {points} points, seed-like {seed_points}"
            server_ms = await _server_ms(bare, database, of_users, timeframe)
            per_point[is_oldest, timeframe] = our_ms / points
            figures.append(
                Figure(
                    f"{timeframe}, {what}, {points:,} points",
                    "ms",
                    our_ms,
                    seed_ms,
                    server_ms,
                    at_most=MS_MAX if points <= MANY_POINTS else MANY_POINTS_MS_MAX,
                    times_min=LONGEST_TIMES_MIN
                    if is_oldest and timeframe is Timeframe.ALL
                    else SEED_TIMES_MIN.get(timeframe),
                )
            )
        figures.append(
            Figure(
                f"a point of ALL at {years:g} years (limit: of 1D)",
                "us",
                per_point[True, Timeframe.ALL] * 1000,
                limit=per_point[True, Timeframe.ONE_DAY] * 1000,
                limit_times_max=POINT_COST_TIMES_MAX,
            )
        )
        say("  ALL over years of history")
        for user_id, length in lengths(size).items():
            if user_id <= size.chart_users:
                continue
            for name, read in (("ours", read_ours), ("seed", read_seed)):
                ms, _ = await _median_ms(read, [user_id], Timeframe.ALL, size.runs)
                series[name].append((length / YEAR, ms))
    await seed_engine.dispose()
    return Measured(figures, series)


async def ours(database: Database, user_id: int, timeframe: Timeframe, now: datetime) -> int:
    """Read a chart as the gateway reads it; return its number of points."""
    match performance.buckets(timeframe, now, _ZONE):
        case MarketDays(first, last):
            series = await queries.daily_series(database, user_id, first, last, MARKET_TIMEZONE)
        case buckets:
            series = await queries.series(database, user_id, buckets.first, buckets.last, buckets.width)
    return series.points.count('"timestamp"')


async def _median_ms(read: Read, users: list[int], timeframe: Timeframe, runs: int) -> tuple[float, int]:
    """Return the median milliseconds of a warm read, and the number of points."""
    milliseconds = []
    points = 0
    for user_id in users:
        points = await read(user_id, timeframe)  # warms up
        for _ in range(runs):
            began = time.perf_counter()
            await read(user_id, timeframe)
            milliseconds.append((time.perf_counter() - began) * 1000)
    return middle(milliseconds), points


class _Recorder:
    """Passes statements on to a database, and remembers the last one."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.asked: tuple[str, tuple[object, ...]] = ("", ())

    async def fetch_row(self, statement: str, *args: object, **options: Any) -> asyncpg.Record | None:
        self.asked = (statement, args)
        return await self._database.fetch_row(statement, *args, **options)


async def _server_ms(
    bare: "asyncpg.Connection[asyncpg.Record]", database: Database, users: list[int], timeframe: Timeframe
) -> float:
    """Return the median of the server's own time for the gateway's statement: no driver, no way to it and back."""
    recorder = _Recorder(database)
    milliseconds = []
    for user_id in users:
        await ours(recorder, user_id, timeframe, HISTORY_END)  # type: ignore[arg-type]  # stands for a Database
        statement, args = recorder.asked
        for _ in range(3):
            explained = await bare.fetchval(
                f"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY, FORMAT JSON) {statement}", *args
            )
            milliseconds.append(json.loads(explained)[0]["Execution Time"])
    return middle(milliseconds)
