"""The timer: on every boundary, publish that each shard is due."""

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timedelta

from prometheus_client import Counter
from pydantic import ValidationError

from services.snapshotter.troubles import Troubles
from shared import clock, logs
from shared.bus import Bus, BusUnavailable, Outgoing, Stored
from shared.clock import Now
from shared.market_calendar import Calendar
from shared.messages import SNAPSHOT_DUE, TIMER, SnapshotDue

RETRY_SECONDS = 1.0
MESSAGES_READ_MAX = 5_000
"""Of the last messages, when a timer begins: among so many there is one of a timer."""
LEAPS_MAX = 16
"""Leaps ahead of the clock that are remembered, should it go back."""
SESSIONS_COUNTED_MAX = 300
"""Sessions whose missed slots are counted; there are more only if a clock leapt by more than a year."""

slots_announced = Counter("snapshot_slots_announced", "Slots whose shards were all published as due")
slots_missed = Counter("snapshot_slots_missed", "Slots that could not be published in time")

log = logs.get_logger()


@dataclass
class _Run:
    """Slots that were announced, without a gap between the first and the last."""

    first: datetime
    last: datetime


async def run(
    bus: Bus,
    interval: timedelta,
    shards: int,
    stop: asyncio.Event,
    *,
    late_max: timedelta | None = None,
    calendar: Calendar | None = None,
    troubles: Troubles | None = None,
    now: Now = clock.utc_now,
) -> None:
    """Announce each slot when it is reached, beginning with the current one, until `stop` is set.

    Beginning with the slot that is under way means that a restart across a boundary loses no slot; where a
    replica has announced it already, the stream discards the copy. Slots that nobody could announce in time are
    announced while they are younger than `late_max`, one interval unless given, also those before the start, and those
    that a clock leapt over which then went back. With `calendar`, the slots outside its sessions are left out.
    """
    late_max = late_max or interval
    is_resting = False
    runs: deque[_Run] = deque(maxlen=LEAPS_MAX)
    before = await _last_announced(bus, stop, now) if late_max != interval else None
    if before is not None:
        # Whoever announced it may have died between two of its shards: it is announced again while there is time.
        last = before if now() - before >= late_max else before - interval
        runs.append(_Run(last, last))
    async for reached in clock.aligned_ticks(interval, stop, now=now):
        for scheduled_at in _slots(runs, reached, interval, now() - late_max, calendar):
            was_resting, is_resting = is_resting, _rests(scheduled_at, calendar, said=is_resting)
            if was_resting and not is_resting:
                log.info("snapshots_resumed", scheduled_at=scheduled_at.isoformat())
            if is_resting or await announce(bus, scheduled_at, late_max, shards, stop, now=now):
                continue
            if troubles and not stop.is_set():
                troubles.happened("missed", f"slot {scheduled_at.isoformat()} was not announced")


def _slots(
    runs: deque[_Run],
    reached: datetime,
    interval: timedelta,
    too_late: datetime,
    calendar: Calendar | None,
) -> list[datetime]:
    """Return the slots after the one that was announced last and after `too_late`, up to `reached`, and note them.

    At most that one when none was announced, or when the clock went back to one that was. When it went back over a
    leap ahead, the run before the leap goes on. Those that are too late are missed, but for those that rest.
    """
    while runs and runs[-1].first > reached:
        runs.pop()
    if not runs:
        runs.append(_Run(reached, reached))
        return [reached] if reached > too_late else []  # nobody knows whether it was announced
    if reached <= runs[-1].last:
        return [reached] if reached > too_late else []
    first = clock.next_boundary(runs[-1].last, interval)
    slot = max(first, clock.next_boundary(min(too_late, reached), interval))
    missed, since = _missed(first, slot, interval, calendar)
    if missed:
        slots_missed.inc(missed)
        log.error(
            "slots_missed",
            slots=missed,
            first=since.isoformat(),
            reason="nobody could announce them in time",
            advice="SNAPSHOT_LATE_SECONDS_MAX says how late a slot may be",
        )
        runs.append(_Run(min(slot, reached), reached))
    else:
        runs[-1].last = reached
    return [slot + number * interval for number in range((reached - slot) // interval + 1)]


def _missed(
    first: datetime, until: datetime, interval: timedelta, calendar: Calendar | None
) -> tuple[int, datetime]:
    """Return how many slots there are from `first` until before `until`, and the first of them.

    With `calendar` those outside its sessions rest, and are not counted.
    """
    if calendar is None:
        return (until - first) // interval, first
    counted: list[tuple[int, datetime]] = []
    slot = first
    for _ in range(SESSIONS_COUNTED_MAX):
        session = calendar.hours.last_session(slot)
        if slot > session.closes_at:
            session = calendar.hours.next_session(slot)
            slot = clock.next_boundary(session.opens_at - timedelta.resolution, interval)
        if slot >= until:
            break
        # The close is a slot of its session.
        end = min(until, clock.next_boundary(session.closes_at, interval))
        if slot < end:  # else the interval is so long that the session has none
            counted.append(((end - slot) // interval, slot))
            slot = end
    return sum(slots for slots, _ in counted), counted[0][1] if counted else first


async def _last_announced(bus: Bus, stop: asyncio.Event, now: Now) -> datetime | None:
    """Return the slot that some timer announced last, before this one began; None without one.

    What was published by hand, or again from the dead letters, says nothing of the slots before it: it has not the id
    that timers give. Neither does what a clock announced that was ahead.
    """
    while await bus.wait_until_ready(stop):
        try:
            async for stored in bus.backwards(TIMER, SNAPSHOT_DUE, MESSAGES_READ_MAX):
                slot = _timers_own(stored)
                if slot is not None and slot <= now():
                    return slot
            return None
        except BusUnavailable:
            await clock.wait_for_stop(stop, RETRY_SECONDS)
    return None


def _timers_own(stored: Stored) -> datetime | None:
    """Return the slot of a message that a timer published; None of another one's."""
    try:
        announced = SnapshotDue.model_validate_json(stored.payload)
    except ValidationError:
        return None
    own = due(announced.scheduled_at, announced.shard, announced.shards)
    return announced.scheduled_at if stored.message_id == own.message_id else None


def _rests(scheduled_at: datetime, calendar: Calendar | None, *, said: bool) -> bool:
    """Tell whether the slot is left out; log it unless that was `said` of the one before."""
    if calendar is None or calendar.hours.is_in_session(scheduled_at):
        return False
    if not said:
        opens_at = calendar.hours.next_session(scheduled_at).opens_at
        log.info("snapshots_resting", until=opens_at.isoformat(), setting="SNAPSHOT_MARKET_HOURS_ONLY")
    return True


async def announce(
    bus: Bus,
    scheduled_at: datetime,
    late_max: timedelta,
    shards: int,
    stop: asyncio.Event,
    *,
    now: Now = clock.utc_now,
) -> bool:
    """Publish SnapshotDue for every shard, trying again while the slot is younger than `late_max`.

    Return whether all were acknowledged.
    """
    waiting = [due(scheduled_at, shard, shards) for shard in range(shards)]
    while not stop.is_set():
        failed = await bus.publish_all(waiting)
        if not failed:
            slots_announced.inc()
            return True
        waiting, reason = [outgoing for outgoing, _ in failed], failed[0][1]
        if await clock.wait_for_stop(stop, RETRY_SECONDS):
            break
        if now() - scheduled_at >= late_max:
            slots_missed.inc()
            log.error(
                "slot_missed",
                scheduled_at=scheduled_at.isoformat(),
                shards=len(waiting),
                reason=reason,
                advice="NATS did not store the slot in time: see /readyz and nats-server",
            )
            break
    return False


def due(scheduled_at: datetime, shard: int, shards: int) -> Outgoing:
    """The message that all replicas publish for a shard, of which the stream keeps one."""
    message = SnapshotDue(scheduled_at=scheduled_at, shard=shard, shards=shards)
    return Outgoing(SNAPSHOT_DUE, message, f"{scheduled_at.isoformat()}/{shard}/{shards}")
