"""The timer: on every boundary, publish that each shard is due."""

import asyncio
from datetime import datetime, timedelta

from prometheus_client import Counter

from services.snapshotter.troubles import Troubles
from shared import clock, logs
from shared.bus import Bus, Outgoing
from shared.market_calendar import Calendar
from shared.messages import SNAPSHOT_DUE, SnapshotDue

RETRY_SECONDS = 1.0

slots_announced = Counter("snapshot_slots_announced", "Slots whose shards were all published as due")
slots_missed = Counter("snapshot_slots_missed", "Slots that could not be published before the next one")

log = logs.get_logger()


async def run(
    bus: Bus,
    interval: timedelta,
    shards: int,
    stop: asyncio.Event,
    *,
    calendar: Calendar | None = None,
    troubles: Troubles | None = None,
) -> None:
    """Announce each slot when it is reached, beginning with the current one, until `stop` is set.

    Beginning with the slot that is under way means that a restart across a boundary loses no slot; where a
    replica has announced it already, the stream discards the copy. With `calendar`, the slots outside its
    sessions are left out.
    """
    is_resting = False
    async for scheduled_at in clock.aligned_ticks(interval, stop):
        was_resting, is_resting = is_resting, _rests(scheduled_at, calendar, said=is_resting)
        if is_resting:
            continue
        if was_resting:
            log.info("snapshots_resumed", scheduled_at=scheduled_at.isoformat())
        if not await announce(bus, scheduled_at, interval, shards, stop) and troubles and not stop.is_set():
            troubles.happened("missed", f"slot {scheduled_at.isoformat()} was not announced")


def _rests(scheduled_at: datetime, calendar: Calendar | None, *, said: bool) -> bool:
    """Tell whether the slot is left out; log it unless that was `said` of the one before."""
    if calendar is None or calendar.hours.is_in_session(scheduled_at):
        return False
    if not said:
        opens_at = calendar.hours.next_session(scheduled_at).opens_at
        log.info("snapshots_resting", until=opens_at.isoformat(), setting="SNAPSHOT_MARKET_HOURS_ONLY")
    return True


async def announce(
    bus: Bus, scheduled_at: datetime, interval: timedelta, shards: int, stop: asyncio.Event
) -> bool:
    """Publish SnapshotDue for every shard, trying again while the slot is younger than one interval.

    Return whether all were acknowledged.
    """
    waiting = [due(scheduled_at, shard, shards) for shard in range(shards)]
    reason = ""
    while not stop.is_set():
        if clock.utc_now() - scheduled_at >= interval:
            slots_missed.inc()
            log.error(
                "slot_missed",
                scheduled_at=scheduled_at.isoformat(),
                shards=len(waiting),
                reason=reason,
                advice="NATS did not store the slot for a whole interval: see /readyz and nats-server",
            )
            return False
        failed = await bus.publish_all(waiting)
        if not failed:
            slots_announced.inc()
            return True
        waiting, reason = [outgoing for outgoing, _ in failed], failed[0][1]
        await clock.wait_for_stop(stop, RETRY_SECONDS)
    return False


def due(scheduled_at: datetime, shard: int, shards: int) -> Outgoing:
    """The message that all replicas publish for a shard, of which the stream keeps one."""
    message = SnapshotDue(scheduled_at=scheduled_at, shard=shard, shards=shards)
    return Outgoing(SNAPSHOT_DUE, message, f"{scheduled_at.isoformat()}/{shard}/{shards}")
