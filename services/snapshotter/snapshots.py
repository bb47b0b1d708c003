"""Take the snapshots that are due: store, commit, publish, acknowledge, in that order.

A shard is the unit of work: the stream gives each to one replica, and gives it to another should that one die.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from prometheus_client import Counter, Gauge, Histogram
from pydantic import ValidationError

from services.snapshotter import queries
from services.snapshotter.troubles import Troubles
from shared import clock, lifecycle, logs
from shared.bus import DELIVERIES_MAX, Bus, BusUnavailable, Delivery, Outgoing
from shared.clock import Now
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.market_calendar import Calendar
from shared.market_hours import MarketHours
from shared.messages import PORTFOLIO, SNAPSHOTS_TAKEN, TIMER, SnapshotDue, SnapshotsTaken
from shared.streams import DUPLICATE_WINDOW

CONSUMER = "snapshotter"
AT_ONCE_MAX = 2
"""Shards that one replica works on at a time, so that a slow one does not hold up the others."""
ACK_WAIT_SECONDS = 15.0
KEEP_ALIVE_SECONDS = 5.0
RETRY_SECONDS = 1.0
STOP_SECONDS_MAX = 3.0
"""What a shard may still take when the service is to stop; cut off, nothing of it is stored and it comes again."""
TAKE_SECONDS_MIN, TAKE_SECONDS_MAX = 10.0, 120.0
CLOCK_SKEW_MAX = timedelta(seconds=5)  # between two replicas that both go by the database's clock
EARLY_MAX = DUPLICATE_WINDOW
"""Of a message so early the copy that comes when the slot is due is dropped as a duplicate: it is the only one."""

FOUND_FOR = timedelta(days=30)
"""For so long after it became too late a slot is looked for before it is said to be skipped; as dead letters stay."""
FAILED_IN_A_ROW_MAX = 5
"""Messages, however often each: more than may be poisonous at a time."""

_WHY: dict[type[Exception], str] = {
    DatabaseUnavailable: "PostgreSQL is away",
    SchemaMissing: "the schema is missing",
    BusUnavailable: "NATS does not store",
}
_ADVICE = {
    "PostgreSQL is away": "see /readyz and PostgreSQL; the slot waits for SNAPSHOT_LATE_SECONDS_MAX",
    "the schema is missing": "run `alembic upgrade head`; the slot waits for SNAPSHOT_LATE_SECONDS_MAX",
    "NATS does not store": "see /readyz and nats-server; the snapshots are stored, and are announced when it does",
}
_NOT_DUE = "the slot is not due yet"

shards_handled = Counter(
    "snapshot_shards",
    "Shards handled, by outcome: taken, duplicate, skipped (too late), malformed, failed (unexpectedly)",
    ["outcome"],
)
shards_postponed = Counter(
    "snapshot_shards_postponed", "Attempts at a shard that have to be made again, by why", ["why"]
)
shards_waiting = Gauge("snapshot_shards_waiting", "Shards that wait for PostgreSQL or NATS")
portfolios_stored = Counter("snapshot_portfolios", "Portfolio snapshots stored")
shard_seconds = Histogram(
    "snapshot_shard_seconds",
    "Time to value and store a shard",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
shards_overran = Counter("snapshot_shards_overran", "Shards stored only after the next slot was due")
last_slot = Gauge(
    "snapshot_last_slot_timestamp_seconds", "The latest slot that was stored, by whatever replica; 0 of none"
)

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
    troubles: Troubles | None = None,
    now: Now = clock.utc_now,
) -> None:
    """Handle due shards as the stream delivers them, a few at a time, until `stop` is set.

    A shard whose replica is silent for `ack_wait_seconds` is given to another. One that is older than `late_max`, one
    interval unless given, is skipped, and so is one that is early by more than EARLY_MAX, by `now`, which all replicas
    should have alike; one that is early by less waits until it is due.
    With `calendar`, slots outside its sessions are skipped, whoever announced them.
    Ends by an error when FAILED_IN_A_ROW_MAX different messages failed unexpectedly, and none was handled in between:
    it is then the process that is ill, and not one of them.
    """
    worker = Worker(
        database, bus, interval, late_max or interval, stop, calendar, troubles or Troubles(interval), now
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_find_newest_slot(worker))
        for _ in range(AT_ONCE_MAX):
            tasks.create_task(_handle_each(worker, ack_wait_seconds))


@dataclass
class Worker:
    """What handling a message needs, the same for all of them."""

    database: Database
    bus: Bus
    interval: timedelta
    late_max: timedelta
    """When a slot is so old, the prices are no longer its own."""
    stop: asyncio.Event
    calendar: Calendar | None
    troubles: Troubles
    now: Now
    failed_in_a_row: set[datetime] = field(default_factory=set)
    """When those messages were published that failed since one was handled."""
    newest_slot: datetime | None = None

    def note_stored(self, slot: datetime) -> None:
        """Remember the latest slot that is stored; one that comes late, or again, is none."""
        if self.newest_slot is None or slot > self.newest_slot:
            self.newest_slot = slot
            last_slot.set(slot.timestamp())


async def _find_newest_slot(worker: Worker) -> None:
    """Learn from the bus which slot was stored last, by whatever replica, before this one began."""
    while await worker.bus.wait_until_ready(worker.stop):
        try:
            payload = await worker.bus.last(PORTFOLIO, SNAPSHOTS_TAKEN)
            slot = SnapshotsTaken.model_validate_json(payload).scheduled_at if payload else None
            if slot is not None and slot <= worker.now():
                worker.note_stored(slot)
            return
        except BusUnavailable:
            await clock.wait_for_stop(worker.stop, RETRY_SECONDS)
        except ValidationError:  # by hand, and malformed: the next slot will tell
            return


async def _handle_each(worker: Worker, ack_wait_seconds: float) -> None:
    async for delivery in worker.bus.consume(
        TIMER,
        durable=CONSUMER,
        ack_wait_seconds=ack_wait_seconds,
        stop=worker.stop,
        postponed=_early_deliveries,
    ):
        work = _handle_or_give_back(worker, delivery)
        await lifecycle.finish(work, worker.stop, stop_seconds_max=STOP_SECONDS_MAX)
        if not delivery.is_answered:  # cut off: another replica goes on
            await delivery.postpone(0)


def _early_deliveries(delivery: Delivery) -> int:
    """Return how many deliveries there were before the slot was due: one, of a message that was published early."""
    try:
        due = SnapshotDue.model_validate_json(delivery.payload)
    except ValidationError:
        return 0
    return int(due.scheduled_at - delivery.published_at > CLOCK_SKEW_MAX)


async def _handle_or_give_back(worker: Worker, delivery: Delivery) -> None:
    """Handle a message. An unexpected error ends neither the process nor, for long, the message.

    The process does more than this one message, and which message it was is known: it comes again, a few times, and is
    then put aside.
    """
    try:
        await handle(worker, delivery)
    except Exception as error:
        worker.failed_in_a_row.add(delivery.published_at)
        shards_handled.labels("failed").inc()
        worker.troubles.happened("failed", f"a message was not handled: {type(error).__name__}")
        log.exception(
            "snapshot_failed",
            deliveries=delivery.deliveries,
            deliveries_max=DELIVERIES_MAX,
            advice="this is a bug: report it with the traceback; the message is tried again, then put aside",
        )
        if delivery.deliveries >= DELIVERIES_MAX:
            await delivery.put_aside(f"{type(error).__name__}: {error}", worker.stop)
        else:
            await delivery.postpone(RETRY_SECONDS)
        if len(worker.failed_in_a_row) >= FAILED_IN_A_ROW_MAX:
            raise
    else:
        worker.failed_in_a_row.clear()


async def handle(worker: Worker, delivery: Delivery) -> None:
    """Take the snapshots that one message asks for, and answer the message.

    While PostgreSQL or NATS is away the message waits here, and the server is told so: that is no failure of it.
    """
    try:
        due = SnapshotDue.model_validate_json(delivery.payload)
    except ValidationError as error:
        shards_handled.labels("malformed").inc()
        await delivery.put_aside(f"malformed: {error.errors()[0]['msg']}", worker.stop)
        return
    early = due.scheduled_at - worker.now()
    if CLOCK_SKEW_MAX < early <= EARLY_MAX:
        await _postpone_until_due(delivery, due, early)
        return
    if delivery.deliveries > 1:
        log.warning(
            "snapshot_redelivered",
            **_slot(due),
            deliveries=delivery.deliveries,
            advice="nothing for the slot; if there are many, see why replicas die, freeze or are stopped",
        )
    async with _kept_alive(delivery):
        outcome = await _take_or_wait(worker, due, delivery.deliveries)
    if outcome is None:  # the service stops
        await delivery.postpone(0)
        return
    shards_handled.labels(outcome).inc()
    await delivery.acknowledge()
    late = worker.now() - due.scheduled_at
    if outcome == "taken" and late > worker.interval:  # a duplicate was stored before
        shards_overran.inc()
        worker.troubles.happened("overran", f"slot {due.scheduled_at.isoformat()} overran its interval")
        log.warning(
            "slot_overran",
            **_slot(due),
            seconds=round(late.total_seconds(), 1),
            interval_seconds=worker.interval.total_seconds(),
            advice="more SNAPSHOT_SHARDS and replicas, or a longer SNAPSHOT_INTERVAL_MINUTES",
        )


async def _postpone_until_due(delivery: Delivery, due: SnapshotDue, early: timedelta) -> None:
    shards_postponed.labels(_NOT_DUE).inc()
    log.warning(
        "snapshot_postponed",
        **_slot(due),
        reason=_NOT_DUE,
        retry_seconds=round(early.total_seconds(), 1),
        advice="nothing, it is taken when it is due; but none of our timers is early: see who publishes to "
        + TIMER.name,
    )
    await delivery.postpone(early.total_seconds())


async def _take_or_wait(worker: Worker, due: SnapshotDue, deliveries: int) -> str | None:
    """Return what became of the shard: taken, duplicate or skipped; None when the service stops first."""
    hours = worker.calendar.hours if worker.calendar else None
    taken: queries.ShardTaken | None = None
    trouble = worker.troubles.number()
    said, attempts = "", 0
    try:
        while True:
            reason = not_takeable(due.scheduled_at, worker.now(), worker.late_max, hours)
            if reason is not None and taken is None:
                taken = await _stored_before(worker, due)
                if taken is None:
                    return _given_up(worker, due, deliveries, reason, taken)
            elif reason is not None and attempts:
                return _given_up(worker, due, deliveries, reason, taken)
            try:
                if taken is None:
                    again = deliveries > 1 or attempts > 0
                    taken = await store(worker.database, due, worker.interval, again=again, now=worker.now)
                worker.note_stored(due.scheduled_at)
                await announce(worker.bus, due, taken)
            except (DatabaseUnavailable, SchemaMissing, BusUnavailable) as error:
                why = _WHY[type(error)]
                shards_postponed.labels(why).inc()
                worker.troubles.begin(trouble, f"a slot waits: {why}")
                if not attempts:
                    shards_waiting.inc()
                if why != said:
                    said = why
                    log.warning(
                        "snapshot_postponed",
                        **_slot(due),
                        reason=str(error),
                        retry_seconds=RETRY_SECONDS,
                        advice=_ADVICE[why],
                    )
                attempts += 1
            else:
                return "taken" if taken.added else "duplicate"
            if await clock.wait_for_stop(worker.stop, RETRY_SECONDS):
                return None
    finally:
        worker.troubles.end(trouble)
        if attempts:
            shards_waiting.dec()


async def _stored_before(worker: Worker, due: SnapshotDue) -> queries.ShardTaken | None:
    """Return what is stored of a shard that may not be taken any more: its message may have come again."""
    if not timedelta(0) < worker.now() - due.scheduled_at < worker.late_max + FOUND_FOR:
        return None  # it is no timer's
    try:
        return await queries.stored_snapshots(worker.database, due.scheduled_at, due.shard, due.shards)
    except (DatabaseUnavailable, SchemaMissing):  # nobody can tell
        return None


def _given_up(
    worker: Worker, due: SnapshotDue, deliveries: int, reason: str, taken: queries.ShardTaken | None
) -> str:
    slot = due.scheduled_at.isoformat()
    if taken is not None:
        worker.troubles.happened("unannounced", f"slot {slot} is stored and was not announced")
        log.error(
            "snapshots_not_announced",
            **_slot(due),
            advice="they are stored; charts show them within a minute. See why the bus did not store the message",
        )
        return "taken" if taken.added else "duplicate"
    if due.scheduled_at < worker.now():
        worker.troubles.happened("skipped", f"slot {slot} was skipped")
    log.warning(
        "snapshot_skipped",
        **_slot(due),
        reason=reason,
        deliveries=deliveries,
        advice="see what it waited for; with SNAPSHOT_LATE_SECONDS_MAX it may be taken later",
    )
    return "skipped"


async def store(
    database: Database, due: SnapshotDue, interval: timedelta, *, again: bool, now: Now
) -> queries.ShardTaken:
    """Store the shard's snapshots, committed when this returns."""
    began = time.monotonic()
    remaining = (due.scheduled_at + interval - now()).total_seconds()
    taken = await queries.take_snapshots(
        database,
        due.scheduled_at,
        due.shard,
        due.shards,
        again=again,
        timeout=min(max(remaining, TAKE_SECONDS_MIN), TAKE_SECONDS_MAX),
    )
    seconds = time.monotonic() - began
    shard_seconds.observe(seconds)
    portfolios_stored.inc(taken.added)
    log.info(
        "snapshots_taken",
        **_slot(due),
        portfolios=taken.portfolios,
        positions=taken.positions,
        unpriced=taken.unpriced,
        added=taken.added,
        again=again,
        duration_ms=round(seconds * 1000),
    )
    return taken


async def announce(bus: Bus, due: SnapshotDue, taken: queries.ShardTaken) -> None:
    """Publish that the shard's snapshots are there; raises BusUnavailable."""
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
