"""One slot of all users: the seed's loop, ours, and the limit (ready rows into the same tables)."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from bench.data import POSITIONS, SLOT, portfolios_of_ours, portfolios_of_seed
from bench.figures import Figure, Measured, middle
from bench.progress import say
from bench.seed_like.sessions import engine, sessions
from bench.seed_like.snapshot_service import SnapshotService
from bench.server import Databases, connected, migrations_text
from bench.sizes import Size
from local.settings import ROOT
from services.snapshotter import queries
from shared import database as databases
from shared.clock import last_boundary, utc_now

REPLICAS = 2
WORKER_SECONDS_MAX = 300.0
CONSTANT_MEMORY_TIMES_MAX = 1.05
"""The same memory, but for an allocator's and a driver's noise."""

# Less the timestamp, which is another one each time.
_PORTFOLIO_COLUMNS = "user_id, unpriced_positions, simulated, total_value, cash_balance, investment_value"
_POSITION_COLUMNS = "user_id, ticker, shares, cost_basis, current_value, price_per_share"
_MAKE_READY_ROWS = f"""
CREATE UNLOGGED TABLE ready_portfolios AS
    SELECT {_PORTFOLIO_COLUMNS} FROM portfolio_snapshots WHERE timestamp = '{{slot}}' ORDER BY user_id;
CREATE UNLOGGED TABLE ready_positions AS
    SELECT {_POSITION_COLUMNS} FROM position_snapshots WHERE timestamp = '{{slot}}' ORDER BY user_id;
VACUUM (ANALYZE) ready_portfolios;
VACUUM (ANALYZE) ready_positions
"""
_INSERT_READY_ROWS = (
    f"""
    INSERT INTO portfolio_snapshots (timestamp, {_PORTFOLIO_COLUMNS})
    SELECT $1, {_PORTFOLIO_COLUMNS} FROM ready_portfolios WHERE $3 = 1 OR user_id % $3 = $2
    """,
    f"""
    INSERT INTO position_snapshots (timestamp, {_POSITION_COLUMNS})
    SELECT $1, {_POSITION_COLUMNS} FROM ready_positions WHERE $3 = 1 OR user_id % $3 = $2
    """,
)


async def measure(server: Databases, size: Size) -> Measured:
    figures: list[Figure] = []
    series: dict[str, list[tuple[float, float]]] = {"ours": [], "limit": [], "seed": []}
    per_looped_user = await _looped_seconds(server, size)
    memory: dict[int, float] = {}
    for users in size.populations:
        replicas = REPLICAS if users == size.many_users else 1
        say(f"  {users:,} users, {replicas} replica{'s' if replicas > 1 else ''}")
        ours, limit, memory[users] = await _set_based(server, size, users, replicas)
        series["ours"].append((users, ours))
        series["limit"].append((users, limit))
        series["seed"].append((users, per_looped_user * users))
        if users == size.users:
            figures.append(
                Figure(
                    f"snapshot of {users:,} users x {POSITIONS} (loop: {size.looped_users} users, scaled)",
                    "s",
                    ours,
                    per_looped_user * users,
                    limit,
                    times_min=100,
                    share_min=0.6,
                )
            )
        elif users == size.many_users:
            figures.append(
                Figure(
                    f"snapshot of {users:,} x {POSITIONS}, {replicas} replicas",
                    "s",
                    ours,
                    per_looped_user * users,
                    limit,
                    at_most=6,
                )
            )
    few = min(size.populations, key=lambda users: abs(users - 1_000))
    figures.append(
        Figure(
            f"a snapshotter's memory at {size.many_users:,} users (limit: at {few:,})",
            "MB",
            memory[size.many_users],
            limit=memory[few],
            limit_times_max=CONSTANT_MEMORY_TIMES_MAX,
        )
    )
    return Measured(figures, series)


# ---- ours, and the limit -------------------------------------------------------------------------


async def _set_based(server: Databases, size: Size, users: int, replicas: int) -> tuple[float, float, float]:
    """Return the median seconds of ours and of the limit, in turn, and the most memory of a replica, in MB."""
    name = f"portfolios_{users}"
    await kept_portfolios(server, users, seed_like=False)
    async with server.copy(name) as url, AsyncExitStack() as stack:
        slots = first_slots(2 * size.runs + 2)
        workers = [
            await stack.enter_async_context(_worker(url, shard, replicas)) for shard in range(replicas)
        ]
        connections = [await stack.enter_async_context(connected(url)) for _ in range(replicas)]
        await connections[0].execute("SELECT make_history_partitions($1, $2)", slots[0], slots[-1])
        # The first slot gives the limit its rows, the second warms it up.
        await _take(workers, slots[0], users)
        for statement in _MAKE_READY_ROWS.format(slot=slots[0].isoformat()).split(";"):
            await connections[0].execute(statement)
        await _insert_ready_rows(connections, slots[1])
        ours, limit = [], []
        for run in range(size.runs):
            ours.append(await _take(workers, slots[2 + 2 * run], users))
            limit.append(await _insert_ready_rows(connections, slots[3 + 2 * run]))
        memory = [await _ask(worker, {"memory": True}) for worker in workers]
    return middle(ours), middle(limit), max(answer["memory_mb"] for answer in memory)


async def _take(workers: list[asyncio.subprocess.Process], slot: datetime, users: int) -> float:
    """Let each replica take its shard; return the seconds until all have."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(_ask(worker, {"slot": slot.isoformat()}) for worker in workers))
    seconds = time.perf_counter() - began
    assert sum(answer["added"] for answer in answers) == users
    return seconds


async def _insert_ready_rows(connections: list["asyncpg.Connection[Any]"], slot: datetime) -> float:
    began = time.perf_counter()
    await asyncio.gather(
        *(
            _insert_shard(connection, slot, shard, len(connections))
            for shard, connection in enumerate(connections)
        )
    )
    return time.perf_counter() - began


async def _insert_shard(
    connection: "asyncpg.Connection[Any]", slot: datetime, shard: int, shards: int
) -> None:
    async with connection.transaction():
        for statement in _INSERT_READY_ROWS:
            await connection.execute(statement, slot, shard, shards)


def first_slots(count: int) -> list[datetime]:
    """Return consecutive slots from midnight on, of a day that has not been."""
    tomorrow = last_boundary(utc_now(), timedelta(days=1)) + timedelta(days=1)
    return [tomorrow + n * SLOT for n in range(count)]


async def kept_portfolios(server: Databases, users: int, *, seed_like: bool) -> str:
    """Return the name of the kept database with so many portfolios and no history."""
    if seed_like:
        name = f"seed_portfolios_{users}"
        await server.kept(name, f"seed-like portfolios 1 {users}", lambda url: portfolios_of_seed(url, users))
    else:
        name = f"portfolios_{users}"
        description = f"portfolios 1 {users} {migrations_text()}"
        template = await server.migrated()
        await server.kept(name, description, lambda url: portfolios_of_ours(url, users), template=template)
    return name


# ---- the seed's loop -----------------------------------------------------------------------------


async def _looped_seconds(server: Databases, size: Size) -> float:
    """Return the median seconds per user of the seed's loop."""
    say(f"  the seed's loop over {size.looped_users} users")
    name = await kept_portfolios(server, size.users, seed_like=True)
    async with server.copy(name) as url:
        own = engine(url)
        try:
            service = SnapshotService(sessions(own))
            slots = first_slots(size.runs + 1)
            await service.create_snapshots_for_all_users(slots[0], users_max=size.looped_users // 10)
            seconds = []
            for slot in slots[1:]:
                began = time.perf_counter()
                stored = await service.create_snapshots_for_all_users(slot, users_max=size.looped_users)
                seconds.append((time.perf_counter() - began) / stored)
        finally:
            await own.dispose()
    return middle(seconds)


# ---- a replica as a process of its own -----------------------------------------------------------


@asynccontextmanager
async def _worker(url: str, shard: int, shards: int) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.replica", url, str(shard), str(shards)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        await _ask(process, {"memory": True})
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), WORKER_SECONDS_MAX)


async def _ask(worker: asyncio.subprocess.Process, question: dict[str, object]) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(question).encode() + b"\n")
    line = await asyncio.wait_for(worker.stdout.readline(), WORKER_SECONDS_MAX)
    assert line, "the replica has ended"
    answer: dict[str, Any] = json.loads(line)
    return answer


async def takes(url: str, slots: list[datetime]) -> None:
    """Take the snapshots of all users for each slot, in this process."""
    async with databases.connect(
        url, application_name="bench", connections_max=1, server_settings=queries.SERVER_SETTINGS
    ) as database:
        for slot in slots:
            await queries.take_snapshots(database, slot, 0, 1)
