"""Take the snapshot that a user asks for: store, commit, publish, answer, in that order.

Any replica may. A request that comes again, because its answer was lost, finds the snapshot that it made.
"""

import asyncio
import time
from datetime import timedelta

from prometheus_client import Counter, Histogram

from services.snapshotter import queries
from shared import clock, logs, refreshes
from shared.bus import Bus, BusUnavailable, Outgoing, Refused
from shared.clock import Now
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.messages import REQUESTED_SNAPSHOT_TAKEN, SNAPSHOT_REQUESTED, SnapshotRequested, SnapshotTaken

QUEUE = "snapshotter"
AT_ONCE_MAX = 2
"""Requests that have a connection to the database; the rest wait, so that due shards have theirs."""
WAITING_MAX = 256
TURN_SECONDS_MAX = 1.5
"""What has waited longer is refused before it takes a connection: a gateway asks the next one after 1.8 s."""
ANSWER_SECONDS_MAX = 2.5
"""Less than a gateway waits for the second one that it asks, which finds what the first has stored meanwhile."""
PUBLISH_SECONDS_MAX = 0.5
"""What the answer waits for the announcement; the snapshot is there whether it is announced or not."""
RETRY_SECONDS = 2

requests_handled = Counter(
    "snapshot_requests",
    "Requested snapshots by outcome: taken, repeated, refused, unstored (no database).",
    ["outcome"],
)
request_seconds = Histogram(
    "snapshot_request_seconds",
    "Time to value, store and announce a requested snapshot",
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)

log = logs.get_logger()


async def run(
    database: Database, bus: Bus, cooldown: timedelta, stop: asyncio.Event, *, now: Now = clock.utc_now
) -> None:
    """Answer requests for snapshots until `stop` is set."""
    turn = asyncio.Semaphore(AT_ONCE_MAX)

    async def answer(payload: bytes) -> SnapshotTaken:
        try:
            async with asyncio.timeout(TURN_SECONDS_MAX):
                await turn.acquire()
        except TimeoutError:
            requests_handled.labels("refused").inc()
            raise Refused(503, "many have asked for snapshots", RETRY_SECONDS) from None
        try:
            return await handle(database, bus, payload, cooldown, now=now)
        finally:
            turn.release()

    await bus.serve(
        SNAPSHOT_REQUESTED,
        answer,
        stop,
        queue=QUEUE,
        at_once_max=WAITING_MAX,
        answer_seconds_max=ANSWER_SECONDS_MAX,
    )


async def handle(
    database: Database, bus: Bus, payload: bytes, cooldown: timedelta, *, now: Now = clock.utc_now
) -> SnapshotTaken:
    """Take the snapshot that a message asks for, and announce it; raises Refused, or ValidationError."""
    began = time.monotonic()
    requested = SnapshotRequested.model_validate_json(payload)
    try:
        refreshes.check_time(requested.requested_at, now())
        taken, added = await queries.take_requested_snapshot(
            database, requested.user_id, requested.requested_at, cooldown
        )
    except Refused as refusal:
        requests_handled.labels("refused").inc()
        log.info("snapshot_request_refused", user_id=requested.user_id, reason=str(refusal))
        raise
    except (DatabaseUnavailable, SchemaMissing) as error:
        requests_handled.labels("unstored").inc()
        log.warning(
            "requested_snapshot_not_taken",
            advice="see /readyz and PostgreSQL; the user was told to try again",
            user_id=requested.user_id,
            reason=str(error),
        )
        raise Refused(503, "snapshots cannot be stored now", RETRY_SECONDS) from error
    requests_handled.labels("taken" if added else "repeated").inc()
    await _announce(bus, taken)
    seconds = time.monotonic() - began
    request_seconds.observe(seconds)
    log.info(
        "requested_snapshot_taken",
        user_id=taken.user_id,
        requested_at=taken.timestamp.isoformat(),
        unpriced=taken.unpriced_positions,
        added=added,
        duration_ms=round(seconds * 1000),
    )
    return taken


async def _announce(bus: Bus, taken: SnapshotTaken) -> None:
    message_id = f"{taken.user_id}/{taken.timestamp.isoformat()}"
    try:
        async with asyncio.timeout(PUBLISH_SECONDS_MAX):
            await bus.publish(Outgoing(REQUESTED_SNAPSHOT_TAKEN, taken, message_id))
    except (BusUnavailable, TimeoutError) as error:
        log.warning(
            "requested_snapshot_not_announced",
            advice="it is stored, and charts show it within a minute; see /readyz and nats-server",
            user_id=taken.user_id,
            requested_at=taken.timestamp.isoformat(),
            reason=str(error) or "no acknowledgement came in time",
        )
