"""Take the snapshots that are due: store, commit, publish, acknowledge, in that order.

A shard is the unit of work: the stream gives each to one replica, and gives it to another should that one die.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from prometheus_client import Counter, Gauge, Histogram
from pydantic import ValidationError

from services.snapshotter import queries
from shared import clock, lifecycle, logs
from shared.bus import Bus, BusUnavailable, Delivery, Outgoing
from shared.clock import Now
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.market_calendar import Calendar
from shared.market_hours import MarketHours
from shared.messages import SNAPSHOTS_TAKEN, TIMER, SnapshotDue, SnapshotsTaken

CONSUMER = "snapshotter"
AT_ONCE_MAX = 2
"""Shards that one replica works on at a time, so that a slow one does not hold up the others."""
ACK_WAIT_SECONDS = 15.0
KEEP_ALIVE_SECONDS = 5.0
RETRY_SECONDS = 2.0
STOP_SECONDS_MAX = 3.0
"""What a shard may still take when the service is to stop; cut off, nothing of it is stored and it comes again."""
TAKE_SECONDS_MIN, TAKE_SECONDS_MAX = 10.0, 120.0
CLOCK_SKEW_MAX = timedelta(seconds=5)  # between two replicas that both go by the database's clock

shards_handled = Counter("snapshot_shards", "Shards handled, by outcome", ["outcome"])
portfolios_stored = Counter("snapshot_portfolios", "Portfolio snapshots stored")
shard_seconds = Histogram(
    "snapshot_shard_seconds",
    "Time to value and store a shard",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
shards_overran = Counter("snapshot_shards_overran", "Shards stored only after the next slot was due")
last_slot = Gauge("snapshot_last_slot_timestamp_seconds", "The latest slot that was stored")

log = logs.get_logger()


async def run(
    database: Database,
    bus: Bus,
    interval: timedelta,
    stop: asyncio.Event,
    *,
    late_max: timedelta | None = None,
    calendar: Calendar | None = None,
    ack_wait_seconds: float = ACK_WAIT_SECONDS,
    now: Now = clock.utc_now,
) -> None:
    """Handle due shards as the stream delivers them, a few at a time, until `stop` is set.

    A shard whose replica is silent for `ack_wait_seconds` is given to another. One that is older than `late_max`, one
    interval unless given, is skipped, and so is one that is not due yet by `now`, which all replicas should have alike.
    With `calendar`, slots outside its sessions are skipped, whoever announced them.
    """
    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE_MAX):
            tasks.create_task(
                _handle_each(
                    database,
                    bus,
                    interval,
                    stop,
                    late_max=late_max,
                    calendar=calendar,
                    ack_wait_seconds=ack_wait_seconds,
                    now=now,
                )
            )


async def _handle_each(
    database: Database,
    bus: Bus,
    interval: timedelta,
    stop: asyncio.Event,
    *,
    late_max: timedelta | None,
    calendar: Calendar | None,
    ack_wait_seconds: float,
    now: Now,
) -> None:
    async for delivery in bus.consume(TIMER, durable=CONSUMER, ack_wait_seconds=ack_wait_seconds, stop=stop):
        await lifecycle.finish(
            handle(database, bus, delivery, interval, calendar, late_max=late_max, now=now),
            stop,
            stop_seconds_max=STOP_SECONDS_MAX,
        )


async def handle(
    database: Database,
    bus: Bus,
    delivery: Delivery,
    interval: timedelta,
    calendar: Calendar | None = None,
    *,
    late_max: timedelta | None = None,
    now: Now = clock.utc_now,
) -> None:
    """Take the snapshots that one message asks for, and answer the message."""
    try:
        due = SnapshotDue.model_validate_json(delivery.payload)
    except ValidationError as error:
        shards_handled.labels("malformed").inc()
        log.error(
            "snapshot_message_malformed", reason=str(error.errors()[0]["msg"]), size=len(delivery.payload)
        )
        await delivery.discard()
        return
    hours = calendar.hours if calendar else None
    reason = not_takeable(due.scheduled_at, now(), late_max or interval, hours)
    if reason:
        shards_handled.labels("skipped").inc()
        log.warning("snapshot_skipped", **_slot(due), reason=reason, deliveries=delivery.deliveries)
        await delivery.acknowledge()
        return
    try:
        async with _kept_alive(delivery):
            taken = await take(database, bus, due, interval, delivery.deliveries, now=now)
    except (DatabaseUnavailable, SchemaMissing, BusUnavailable) as error:
        shards_handled.labels("postponed").inc()
        log.warning("snapshot_postponed", **_slot(due), reason=str(error), retry_seconds=RETRY_SECONDS)
        await delivery.postpone(RETRY_SECONDS)
        return
    shards_handled.labels("taken" if taken.added else "duplicate").inc()
    await delivery.acknowledge()
    late = now() - due.scheduled_at
    if late > interval:
        shards_overran.inc()
        log.warning(
            "slot_overran",
            **_slot(due),
            seconds=round(late.total_seconds(), 1),
            interval_seconds=interval.total_seconds(),
            advice="more SNAPSHOT_SHARDS and replicas, or a longer SNAPSHOT_INTERVAL_MINUTES",
        )


async def take(
    database: Database, bus: Bus, due: SnapshotDue, interval: timedelta, deliveries: int, *, now: Now
) -> queries.ShardTaken:
    """Store the shard's snapshots, then publish that they are there."""
    began = time.monotonic()
    remaining = (due.scheduled_at + interval - now()).total_seconds()
    taken = await queries.take_snapshots(
        database,
        due.scheduled_at,
        due.shard,
        due.shards,
        again=deliveries > 1,
        timeout=min(max(remaining, TAKE_SECONDS_MIN), TAKE_SECONDS_MAX),
    )
    seconds = time.monotonic() - began
    shard_seconds.observe(seconds)
    portfolios_stored.inc(taken.added)
    last_slot.set(due.scheduled_at.timestamp())
    message = SnapshotsTaken(
        scheduled_at=due.scheduled_at,
        shard=due.shard,
        shards=due.shards,
        portfolios=taken.portfolios,
        positions=taken.positions,
        unpriced=taken.unpriced,
    )
    message_id = f"{due.scheduled_at.isoformat()}/{due.shard}/{due.shards}"
    await bus.publish(Outgoing(SNAPSHOTS_TAKEN, message, message_id))
    log.info(
        "snapshots_taken",
        **_slot(due),
        portfolios=taken.portfolios,
        positions=taken.positions,
        unpriced=taken.unpriced,
        added=taken.added,
        deliveries=deliveries,
        duration_ms=round(seconds * 1000),
    )
    return taken


def not_takeable(
    scheduled_at: datetime, now: datetime, late_max: timedelta, hours: MarketHours | None = None
) -> str | None:
    """Say why a slot must not be stored at `now`: its prices are gone, or not there yet. None when it may.

    With `hours`, neither may one outside their sessions.
    """
    if now - scheduled_at >= late_max:
        return f"older than {late_max.total_seconds():g} s: prices are no longer that slot's"
    if scheduled_at - now > CLOCK_SKEW_MAX:
        return "in the future"
    if hours is not None and not hours.is_in_session(scheduled_at):
        return "outside the session, and SNAPSHOT_MARKET_HOURS_ONLY is true"
    return None


@asynccontextmanager
async def _kept_alive(delivery: Delivery) -> AsyncIterator[None]:
    keeping = asyncio.create_task(delivery.keep_alive(KEEP_ALIVE_SECONDS))
    try:  # not a TaskGroup: the block's own error must come out as it is
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


def _slot(due: SnapshotDue) -> dict[str, object]:
    return {"scheduled_at": due.scheduled_at.isoformat(), "shard": due.shard, "shards": due.shards}
