"""Upkeep of the history: partitions made ahead of need, rollups of what is due, the end of what is expired."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from prometheus_client import Counter, Gauge

from services.snapshotter import history, queries
from services.snapshotter.history import ROLLUPS, Rollup
from services.snapshotter.troubles import Troubles
from shared import clock, lifecycle, logs
from shared.clock import Now
from shared.database import Database, DatabaseUnavailable, SchemaMissing

INTERVAL = timedelta(minutes=5)
AHEAD = timedelta(days=7)
"""How far ahead there is room; should a slot be beyond it all the same, taking it makes the room."""
SETTLED_AFTER = timedelta(minutes=10)
"""Slots are mostly stored before one interval has passed, plus this, which is more than a statement may take. A later
one, as SNAPSHOT_LATE_SECONDS_MAX may allow, reopens the history, and its day is rolled up again."""
STEADY_FOR = timedelta(days=1)
"""How long the clock must have been steady before anything is dropped."""
DROP_ATTEMPTS_MAX, DROP_RETRY_SECONDS = 20, 0.5
STOP_SECONDS_MAX = 3.0

rows_rolled_up = Counter("history_rolled_up_rows", "Rows written to rollups, by tier", ["tier"])
rollup_lag = Gauge(
    "history_rollup_lag_seconds",
    "How far a rollup is behind what is due, by tier; 0 when nothing is",
    ["tier"],
)
upkeep_failing = Gauge("history_upkeep_failing", "Whether the last round of upkeep could not be done, 1 or 0")
partitions_made = Counter("history_partitions_made", "Partitions made")
partitions_dropped = Counter("history_partitions_dropped", "Expired partitions dropped, by tier", ["tier"])
partitions_expired = Gauge("history_partitions_expired", "Expired partitions still there, by tier", ["tier"])

log = logs.get_logger()


@dataclass(frozen=True)
class Upkeep:
    """What is to be kept, and how time is divided."""

    interval: timedelta
    """Between two slots."""
    market_timezone: str
    snapshots_for: timedelta
    positions_for: timedelta
    rollups_for: timedelta

    @property
    def kept_for(self) -> dict[str, timedelta]:
        """How long each tier is kept; what is not named stays for ever. Positions go before their snapshots."""
        return {
            "details": self.positions_for,
            "raw": self.snapshots_for,
            "30m": self.snapshots_for,
            "1h": self.rollups_for,
            "3h": self.rollups_for,
        }


@dataclass(frozen=True)
class Done:
    """What one round did."""

    made: int = 0
    rolled_up: int = 0
    dropped: int = 0
    held: bool = False
    """Something is expired, and stays until the clock has been steady for long enough (metrics say how much)."""


async def run(
    database: Database,
    upkeep: Upkeep,
    stop: asyncio.Event,
    troubles: Troubles | None = None,
    *,
    now: Now = clock.utc_now,
) -> None:
    """Keep the history in order, beginning now and then every five minutes, until `stop` is set.

    What is due and expired is judged by `now`, which all replicas should have alike.
    """
    was_held = False

    async def round_() -> None:
        nonlocal was_held
        done = await _round(database, upkeep, now(), stop)
        upkeep_failing.set(done is None)
        if troubles and done is None:
            troubles.begin("history", "the history is not kept up: see history_postponed in the log")
        elif troubles:
            troubles.end("history")
        if done is not None and done.held != was_held:
            was_held = done.held
            log.info("retention_held" if was_held else "retention_resumed", steady_for=str(STEADY_FOR))

    async for _ in clock.aligned_ticks(INTERVAL, stop, now=now):
        await lifecycle.finish(round_(), stop, stop_seconds_max=STOP_SECONDS_MAX)


async def _round(database: Database, upkeep: Upkeep, now: datetime, stop: asyncio.Event) -> Done | None:
    """Return what was done; None when it could not be."""
    began = time.monotonic()
    try:
        done = await keep(database, upkeep, now, stop)
    except (DatabaseUnavailable, SchemaMissing) as error:
        log.warning(
            "history_postponed",
            advice="it is tried again in five minutes; see PostgreSQL if it lasts",
            reason=str(error),
        )
        return None
    if (done.made, done.rolled_up, done.dropped) != (0, 0, 0):
        log.info(
            "history_kept",
            partitions_made=done.made,
            rows_rolled_up=done.rolled_up,
            partitions_dropped=done.dropped,
            duration_ms=round((time.monotonic() - began) * 1000),
        )
    return done


async def keep(database: Database, upkeep: Upkeep, now: datetime, stop: asyncio.Event) -> Done:
    """Do all that is due at `now`, in steps, ending early between two of them once `stop` is set.

    A part that cannot be done stops no other. Raises DatabaseUnavailable at the end, naming such parts, or
    SchemaMissing at once; the steps that went well stay done.
    """
    failed: dict[str, DatabaseUnavailable] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        try:
            yield
        except DatabaseUnavailable as error:
            failed[name] = error

    made, rolled_up, dropped, held, is_steady = 0, 0, 0, False, False
    with part("partitions"):
        made = await queries.make_partitions(database, now, now + AHEAD)
        partitions_made.inc(made)
    with part("indexes of positions"):
        await history.index_details(database, now)
    due_until = now - upkeep.interval - SETTLED_AFTER
    for rollup in ROLLUPS:
        with part(f"rollup {rollup.tier}"):
            rolled_up += await _roll_up(database, rollup, due_until, upkeep.market_timezone, stop)
        # However the rollup went, and before the next one, which may have much to catch up with.
        with part("lag of rollups"):
            await _measure_lag(database, due_until)
    with part("clock"):
        is_steady = now - await history.steady_since(database, now) >= STEADY_FOR
    for tier, kept_for in upkeep.kept_for.items():
        with part(f"retention of {tier}"):
            expired = await history.expired_partitions(database, tier, now - kept_for)
            held |= bool(expired) and not is_steady
            partitions_expired.labels(tier).set(len(expired))
            if is_steady:
                dropped += await _drop_expired(database, tier, expired, now - kept_for, stop)
    if failed:
        raise DatabaseUnavailable("; ".join(f"{name}: {error}" for name, error in failed.items()))
    return Done(made, rolled_up, dropped, held)


async def _roll_up(
    database: Database, rollup: Rollup, due_until: datetime, market_timezone: str, stop: asyncio.Event
) -> int:
    rows = 0
    while not stop.is_set():
        step = await history.roll_up(database, rollup, due_until, market_timezone)
        if step is None:
            break
        rows += step.rows
        rows_rolled_up.labels(rollup.tier).inc(step.rows)
    return rows


async def _measure_lag(database: Database, due_until: datetime) -> None:
    for tier, since in (await history.lacking_since(database)).items():
        # A day is due when it has ended: until then it is not behind.
        behind = due_until - since - timedelta(days=1)
        rollup_lag.labels(tier).set(max(behind.total_seconds(), 0))


async def _drop_expired(
    database: Database, tier: str, expired: list[str], keep_from: datetime, stop: asyncio.Event
) -> int:
    """Drop the partitions in their order until one stays; return how many went."""
    dropped = 0
    for name in expired:
        if stop.is_set() or not await _drop(database, tier, name, keep_from, stop):
            break
        dropped += 1
        partitions_dropped.labels(tier).inc()
        partitions_expired.labels(tier).dec()
    return dropped


async def _drop(database: Database, tier: str, name: str, keep_from: datetime, stop: asyncio.Event) -> bool:
    """Drop the partition in a moment without readers; tell whether there was one."""
    reason = ""
    for _ in range(DROP_ATTEMPTS_MAX):
        try:
            if not await history.drop_partition(database, tier, name, keep_from):
                return False  # another replica was faster, or history was reopened
        except DatabaseUnavailable as error:
            reason = str(error)
        else:
            log.info("partition_dropped", tier=tier, name=name)
            return True
        if await clock.wait_for_stop(stop, DROP_RETRY_SECONDS):
            break
    log.warning(
        "partition_not_dropped",
        advice="it is tried again; see pg_stat_activity for who reads it all the time",
        tier=tier,
        name=name,
        reason=reason,
    )
    return False
