"""Charts, as the database and its reader answer them: the seed's way, ours, and the bare statement."""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from bench.data import HISTORY_END, MARKET_TIMEZONE, YEAR, history_of_ours, history_of_seed, lengths
from bench.figures import Figure, Measured, middle
from bench.progress import progress, say
from bench.seed_like.performance_service import data_points
from bench.seed_like.sessions import engine, sessions
from bench.server import Databases, connected
from bench.sizes import Size
from services.api_gateway import performance, queries
from services.api_gateway.performance import Timeframe
from shared import database as databases
from shared.database import Database

MANY_POINTS = 721
MS_MAX, MANY_POINTS_MS_MAX = 3, 10
SEED_TIMES_MIN = {
    (Timeframe.THREE_MONTHS, False): 20.0,
    (Timeframe.THREE_MONTHS, True): 20.0,
    (Timeframe.ALL, True): 200.0,
}
"""By timeframe, and whether it is the longest history."""
SEED_USERS_MAX = 4
"""Of the sampled users, those whose charts are read the seed's way as well: it takes seconds."""
POINT_COST_TIMES_MAX = 1.5
_ZONE = ZoneInfo(MARKET_TIMEZONE)

Read = Callable[[int, Timeframe], Awaitable[int]]


async def measure(server: Databases, size: Size) -> Measured:
    parameters = f"{size.chart_users} {size.chart_days} {size.years} {HISTORY_END}"
    ours_url = await server.kept(
        "history",
        f"history 1 {parameters} {await server.history_schema()}",
        lambda url: history_of_ours(url, size),
        template=await server.migrated(),
    )
    seed_url = await server.kept(
        "seed_history", f"seed-like history 1 {parameters}", lambda url: history_of_seed(url, size)
    )
    async with (
        databases.connect(
            ours_url,
            application_name="api_gateway",
            connections_max=1,
            server_settings=queries.SERVER_SETTINGS,
            reads_only=True,
        ) as database,
        connected(ours_url) as bare,
        _seed_sessions(seed_url) as seed_sessions,
    ):
        await bare.execute("SET plan_cache_mode = force_generic_plan")

        async def read_ours(user_id: int, timeframe: Timeframe) -> int:
            return await ours(database, user_id, timeframe, HISTORY_END)

        async def read_seed(user_id: int, timeframe: Timeframe, *, columns_only: bool = False) -> int:
            async with seed_sessions() as session:
                return len(
                    await data_points(
                        session, user_id, timeframe.value, HISTORY_END, columns_only=columns_only
                    )
                )

        async with seed_sessions() as session:
            seed_pid = await session.scalar(select(func.pg_backend_pid()))
        assert seed_pid is not None
        ways = _Ways(
            ours=_Way(read_ours, await database.fetch_value("SELECT pg_backend_pid()")),
            seed=_Way(read_seed, seed_pid),
            seed_columns=_Way(partial(read_seed, columns_only=True), seed_pid),
            server_ms=lambda users, timeframe: _server_ms(bare, database, users, timeframe),
        )
        return await _compared(ways, size)


@asynccontextmanager
async def _seed_sessions(url: str) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    own = engine(url)
    try:
        yield sessions(own)
    finally:
        await own.dispose()


# ---- comparing -----------------------------------------------------------------------------------


async def _compared(ways: "_Ways", size: Size) -> Measured:
    many = Random(1).sample(range(1, size.chart_users + 1), size.sampled_users)  # noqa: S311
    lives = lengths(size)
    oldest = max(lives, key=lambda user_id: lives[user_id])
    years = size.years[-1]
    cases = [
        (f"{size.chart_users:,} users x {size.chart_days} days", many, timeframe) for timeframe in Timeframe
    ]
    cases += [(f"{years:g} years", [oldest], timeframe) for timeframe in Timeframe]
    figures: list[Figure] = []
    us_per_point = {}
    for what, users, timeframe in progress("charts", cases, total=len(cases), unit="charts"):
        is_oldest = users == [oldest]
        runs = 5 * size.runs if is_oldest else size.runs
        seed_of = users[:SEED_USERS_MAX]
        ms, points = await ways.ours.median_ms(users, timeframe, runs)
        seed_ms, seed_points = await ways.seed.median_ms(seed_of, timeframe, size.runs)
        # The seed's window is cut at its start, which leaves a part of one more bucket.
        assert seed_points - points in (0, 1), f"{timeframe}: {points} points, seed-like {seed_points}"
        us_per_point[timeframe] = ms / points * 1000
        goal = SEED_TIMES_MIN.get((timeframe, is_oldest))
        figures.append(
            Figure(
                f"{timeframe}, {what}, {points:,} points",
                "ms CPU",
                ms,
                seed_ms,
                await ways.server_ms(users, timeframe),
                at_most=MS_MAX if points <= MANY_POINTS else MANY_POINTS_MS_MAX,
                times_min=goal,
            )
        )
        if (timeframe, is_oldest) in ((Timeframe.THREE_MONTHS, False), (Timeframe.ALL, True)):
            columns_ms, _ = await ways.seed_columns.median_ms(seed_of, timeframe, size.runs)
            figures.append(Figure("  if the seed's way read columns only", "ms CPU", ms, columns_ms))
    figures.append(
        Figure(
            f"a point of ALL at {years:g} years (limit: of 1D)",
            "us CPU",
            us_per_point[Timeframe.ALL],
            limit=us_per_point[Timeframe.ONE_DAY],
            limit_times_max=POINT_COST_TIMES_MAX,
        )
    )
    # The last case was ALL of the longest history.
    series = {"ours": [(years, ms)], "seed": [(years, seed_ms)]}
    say("  ALL over years of history")
    for user_id, length in lives.items():
        if size.chart_users < user_id < oldest:
            for name, way in (("ours", ways.ours), ("seed", ways.seed)):
                one_ms, _ = await way.median_ms([user_id], Timeframe.ALL, size.runs)
                series[name].append((length / YEAR, one_ms))
    return Measured(figures, {name: sorted(points_) for name, points_ in series.items()})


async def ours(database: Database, user_id: int, timeframe: Timeframe, now: datetime) -> int:
    """Read a chart as the gateway reads it; return its number of points."""
    window = performance.buckets(timeframe, now, _ZONE)
    found = await queries.chart(database, f"user{user_id}", window, MARKET_TIMEZONE)
    assert found is not None
    return found[1].points.count('"timestamp"')


@dataclass(frozen=True)
class _Way:
    """A way to read a chart, and the PostgreSQL process that serves it."""

    read: Read
    server_pid: int

    async def median_ms(self, users: list[int], timeframe: Timeframe, runs: int) -> tuple[float, int]:
        """Return the median CPU milliseconds of a warm read, in PostgreSQL and here, and the number of points.

        One waits for the other and nothing waits for a disk, so that on an idle machine this is the elapsed time.
        """
        milliseconds = []
        points = 0
        for user_id in users:
            points = await self.read(user_id, timeframe)  # warms up
            for _ in range(runs):
                before = self._cpu_ns()
                await self.read(user_id, timeframe)
                milliseconds.append((self._cpu_ns() - before) / 1e6)
        return middle(milliseconds), points

    def _cpu_ns(self) -> int:
        served = Path(f"/proc/{self.server_pid}/schedstat").read_text().split()[0]
        return time.process_time_ns() + int(served)


@dataclass(frozen=True)
class _Ways:
    ours: _Way
    seed: _Way
    seed_columns: _Way
    server_ms: Callable[[list[int], Timeframe], Awaitable[float]]
    """The median of the server's own time for the gateway's statement."""


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
