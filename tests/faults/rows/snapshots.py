"""Snapshotters that die at the worst of moments, or sleep through them, and a timer that says everything twice."""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import nats
import psutil
from nats.js import JetStreamContext

from services.snapshotter import timer
from services.snapshotter.snapshots import ACK_WAIT_SECONDS
from shared.clock import last_boundary, next_boundary, utc_now
from shared.messages import SNAPSHOT_DUE, TIMER
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.population import SYMBOLS, UNKNOWN_SYMBOL
from tests.faults.rows.row import (
    STRUCK_SECONDS_MAX,
    Row,
    arm,
    armed_to_die,
    deaths,
    died_since,
    next_slots,
    said,
    session,
    tampered_when_armed,
    total,
)
from tests.faults.rows.statements import Connection, Held, held
from tests.faults.signs import GONE, Sign
from tests.faults.system import LATE_SECONDS_MAX, SHARDS, SLOT, System
from tests.waiting import eventually

DUPLICATE = 'snapshot_shards_total{outcome="duplicate"}'
SKIPPED = 'snapshot_shards_total{outcome="skipped"}'
COPIED_SLOTS = 3
EARLY_SLOTS = 10
JUST_BEFORE_SECONDS = 0.2
BACKEND_ENDS_MS_MAX = 5000
OTHERS = "OTHER-"
"""What the names of users and symbols begin with that are not of the population."""
LEAVING = 12
MEETINGS = 3
RICH_POSITIONS = 10_000
RICH_SLOTS = 5
RICH_SECONDS_MAX = 5.0
"""How long after a slot is due its 10,000 positions are stored; alone, they take 0.2 s."""
Shard = tuple[str, int]
"""A slot, and the number of a shard of it."""
REDELIVERED = (Sign(GONE, "bus_redeliveries_total", "snapshot_redelivered"),)

_ROWS = """
SELECT
    (SELECT count(*) FROM portfolio_snapshots WHERE timestamp = $1 AND user_id % $2 = $3) AS portfolios,
    (SELECT count(*) FROM position_snapshots WHERE timestamp = $1 AND user_id % $2 = $3) AS positions
"""
# The market knows nothing of these symbols, so that no feeder touches their prices.
_INSERT_PRICES = """
INSERT INTO asset_prices (symbol, price, traded_at, received_at, updated_at, feed)
SELECT $1 || number, 1, now(), now(), now(), 'simulated'
FROM generate_series(1, $2::integer) AS number
"""
_INSERT_POSITIONS = """
INSERT INTO positions (user_id, ticker, shares, cost_basis)
SELECT $1::integer, $2 || number, 1, 1 FROM generate_series(1, $3::integer) AS number
UNION ALL
SELECT $1, $4, 1, 1
"""
_RICH = """
SELECT
    timestamp,
    (
        SELECT count(*)
        FROM position_snapshots AS detail
        WHERE detail.user_id = parent.user_id AND detail.timestamp = parent.timestamp AND current_value = 1
    ) AS positions,
    unpriced_positions,
    investment_value
FROM portfolio_snapshots AS parent
WHERE user_id = $1 AND timestamp = ANY ($2)
"""
_OF_USERS = """
SELECT (SELECT count(*) FROM portfolio_snapshots WHERE user_id = ANY ($1))
    + (SELECT count(*) FROM position_snapshots WHERE user_id = ANY ($1))
"""
_ORPHANS = """
SELECT count(*)
FROM position_snapshots AS detail
WHERE NOT EXISTS (
    SELECT FROM portfolio_snapshots AS parent
    WHERE parent.user_id = detail.user_id AND parent.timestamp = detail.timestamp
)
"""
_REMOVE_USERS = (
    "DELETE FROM users WHERE id = ANY ($1)",
    "DELETE FROM portfolio_snapshots WHERE user_id = ANY ($1)",
    "DELETE FROM position_snapshots WHERE user_id = ANY ($1)",
)
_REMOVE_PRICES = (
    "DELETE FROM asset_prices WHERE starts_with(symbol, $1)",
    "DELETE FROM audited_prices WHERE starts_with(symbol, $1)",
)


async def _after_commit(system: System, _: Life) -> str:
    """The first to commit kills itself with SIGKILL before its acknowledgement."""
    snapshotters = system.services["snapshotter"]
    before = await total(snapshotters, DUPLICATE)
    died = await armed_to_die(system, "snapshotter")
    began = time.monotonic()

    async def is_redelivered() -> bool:
        return await total(snapshotters, DUPLICATE) > before

    await eventually(is_redelivered, timeout=2 * ACK_WAIT_SECONDS)
    seconds = time.monotonic() - began
    await next_slots(2)  # so that an operator sees it
    found = await total(snapshotters, DUPLICATE) - before
    return f"{died.name} died; redelivered {seconds:.1f} s later, {found:g} counted as duplicate"


def _whose(system: System, statement: Held) -> Service:
    """Return the snapshotter whose statement it is."""
    for service in system.services["snapshotter"]:
        connections = psutil.Process(service.pids()[0]).net_connections()
        if statement.client_port in {each.laddr.port for each in connections}:
            return service
    raise AssertionError("the statement is no snapshotter's")


class Rows(NamedTuple):
    """How many rows there are of a slot and shard."""

    portfolios: int
    positions: int


async def _rows(connection: Connection, slot: datetime, shard: int) -> Rows:
    row = await connection.fetchrow(_ROWS, slot, SHARDS, shard)
    assert row is not None
    return Rows(*row)


def _all_rows(system: System, shard: int) -> Rows:
    """Return how many rows a slot of a shard has when it is stored."""
    users = [user for user in system.population.active if user.id % SHARDS == shard]
    return Rows(len(users), sum(len(user.shares.keys() - {UNKNOWN_SYMBOL}) for user in users))


async def _in_transaction(system: System, _: Life) -> str:
    """One is killed when its statement has written a whole shard, and what PostgreSQL does for it is ended.

    PostgreSQL would notice only after the commit that nobody listens any more.
    """
    snapshotters = system.services["snapshotter"]
    async with session(system) as connection:
        async with held(connection) as statement:
            victim, before = _whose(system, statement), deaths(system, "snapshotter")
            killed_at = utc_now()
            victim.kill()
            await died_since(system, "snapshotter", before)
            is_gone = await connection.fetchval(
                "SELECT pg_terminate_backend($1, $2)", statement.pid, BACKEND_ENDS_MS_MAX
            )
            assert is_gone, "the statement goes on"
            left = await _rows(connection, statement.slot, statement.shard)
            assert left == (0, 0), f"of a transaction that was not committed there are {left}"
        shard = statement.slot.isoformat(), statement.shard

        async def other() -> Service | None:
            """Return who was given the shard, and has stored it."""
            for service in snapshotters:
                redelivered = _said(service, "snapshot_redelivered", since=killed_at)
                if shard in redelivered.keys() & _stored_by(service, since=killed_at):
                    return service
            return None

        taken_by = await eventually(other, timeout=2 * ACK_WAIT_SECONDS, every=0.2)
        assert taken_by is not None
        seconds = (utc_now() - killed_at).total_seconds()
        stored = await _rows(connection, statement.slot, statement.shard)
        expected = _all_rows(system, statement.shard)
        assert stored == expected, f"{stored} were stored of the shard, and not {expected}"
    await next_slots(2)  # so that an operator sees it
    return (
        f"{victim.name} killed when a shard was written, nothing of it was left; given to {taken_by.name} and "
        f"stored {seconds:.1f} s later, {stored.portfolios} portfolios with {stored.positions} positions"
    )


async def _asleep(services: list[Service]) -> Service | None:
    """Return the service that has stopped itself."""
    for service in services:
        if psutil.Process(service.pids()[0]).status() == psutil.STATUS_STOPPED:
            return service
    return None


def _said(service: Service, event: str, *, since: datetime) -> dict[Shard, dict[str, Any]]:
    """Return what a service has logged of an event since then, the last line of each shard."""
    return {(line["scheduled_at"], line["shard"]): line for line in said(service, event, since=since)}


def _stored_by(service: Service, *, since: datetime) -> set[Shard]:
    """Return whose snapshots a service has stored since then, as the first to do so."""
    return {shard for shard, line in _said(service, "snapshots_taken", since=since).items() if line["added"]}


async def _paused(system: System, _: Life) -> str:
    """One falls asleep just before the statement for a shard, and wakes when another has stored it."""
    snapshotters = system.services["snapshotter"]
    arm(system)
    asleep = await eventually(partial(_asleep, snapshotters), timeout=STRUCK_SECONDS_MAX)
    assert asleep is not None
    asleep.freeze()
    slept_at = utc_now()
    other = next(each for each in snapshotters if each is not asleep)

    async def is_taken_over() -> bool:
        redelivered = _said(other, "snapshot_redelivered", since=slept_at)
        return bool(_stored_by(other, since=slept_at) & redelivered.keys())

    await eventually(is_taken_over, timeout=2 * ACK_WAIT_SECONDS, every=0.2)
    await next_slots(2)  # it may have had another one besides, which comes a moment later
    before = await total([asleep], DUPLICATE)
    woke_at = utc_now()
    asleep.thaw()

    async def conflicting() -> set[Shard]:
        """Return for which shards the sleeper has tried, as if it were the first, what the other had done."""
        tried = _said(asleep, "snapshots_taken", since=woke_at)
        return {
            shard
            for shard in tried.keys() & _stored_by(other, since=slept_at)
            if not tried[shard]["again"] and not tried[shard]["added"]
        }

    await eventually(conflicting, timeout=STRUCK_SECONDS_MAX, every=0.2)
    await eventually(partial(_is_more, asleep, before))
    return (
        f"{asleep.name} slept {(woke_at - slept_at).total_seconds():.0f} s; its write of shards that {other.name} had "
        f"stored ({len(await conflicting())}) added nothing, and counted as duplicate"
    )


async def _is_more(service: Service, before: float) -> bool:
    return await total([service], DUPLICATE) > before


async def _by_hand(system: System, life: Life) -> str:
    snapshotters = system.services["snapshotter"]
    await next_slots(COPIED_SLOTS + 2)
    now, began_at = last_boundary(utc_now(), SLOT), utc_now()
    copied = [now - number * SLOT for number in range(1, COPIED_SLOTS + 1)]
    assert copied[-1] >= life.first, "a slot that may never have been"
    skipped, duplicate = await total(snapshotters, SKIPPED), await total(snapshotters, DUPLICATE)
    too_late, future = now - timedelta(seconds=LATE_SECONDS_MAX + 60), now + timedelta(days=1)
    early = [now + (EARLY_SLOTS + number) * SLOT for number in (1, 0)]
    async with session(system) as connection, _jetstream(system) as js:
        for slot in copied:
            await eventually(partial(_is_whole, system, connection, slot))
        copies = [*copied, *reversed(copied)]
        for slot in (*copies, too_late, future, *early):
            await js.publish(SNAPSHOT_DUE, _whole_slot(slot))
        # The timers' own messages for these slots will be dropped as copies of these.
        own = [await _publish_own(js, slot, shard) for slot in early for shard in range(SHARDS)]

        async def are_counted() -> bool:
            return await total(snapshotters, SKIPPED) - skipped >= 2 and await total(
                snapshotters, DUPLICATE
            ) - duplicate >= len(copies)

        await eventually(are_counted, timeout=STRUCK_SECONDS_MAX)
        added = _whole_slots_added(snapshotters, since=began_at)
        for slot in copied:
            assert len(added[slot]) >= 2, f"{len(added[slot])} of the 2 copies of {slot} were tried"
            assert not any(added[slot]), f"copies of {slot} added {added[slot]}"
        stored = await connection.fetchval(
            "SELECT count(*) FROM portfolio_snapshots WHERE timestamp IN ($1, $2)", too_late, future
        )
        assert stored == 0, f"{stored} snapshots of a slot that is too late or yet to come"
        seconds = await _seconds_after_due(system, connection, early)
        await eventually(partial(_timers_are_past, js, early[0]))
        kept = await _own_messages(js, early, since=own[0])
        assert kept == own, f"the stream has {kept} of the early slots, though ours were {own}"
    return (
        f"{await total(snapshotters, SKIPPED) - skipped:g} skipped; {len(copies)} copies of {len(copied)} slots, out "
        f"of order, added nothing and were counted as duplicates; {len(early)} early slots taken {seconds:.1f} s after "
        f"they were due at most, the timers' own messages for them dropped"
    )


@asynccontextmanager
async def _jetstream(system: System) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(system.nats_urls)
    try:
        yield client.jetstream()
    finally:
        await client.close()


def _whole_slot(slot: datetime) -> bytes:
    """Return a message of nobody's making: all users in one shard."""
    return json.dumps({"scheduled_at": slot.isoformat(), "shard": 0, "shards": 1}).encode()


async def _publish_own(js: JetStreamContext, slot: datetime, shard: int) -> int:
    """Publish what the timers will publish when the slot is due; return its number in the stream."""
    own = timer.due(slot, shard, SHARDS)
    assert own.message_id is not None
    stored = await js.publish(own.subject, own.payload, headers={"Nats-Msg-Id": own.message_id})
    assert not stored.duplicate, f"the timers were earlier with {own.message_id}"
    return stored.seq


async def _is_whole(system: System, connection: Connection, slot: datetime) -> bool:
    """Tell whether all that is due of a slot is stored."""
    return all([await _rows(connection, slot, shard) == _all_rows(system, shard) for shard in range(SHARDS)])


def _whole_slots_added(services: list[Service], *, since: datetime) -> dict[datetime, list[int]]:
    """Return what each message of `_whole_slot` added that was tried since then, by its slot."""
    added: dict[datetime, list[int]] = defaultdict(list)
    for service in services:
        for line in said(service, "snapshots_taken", since=since):
            if line["shards"] == 1:
                added[datetime.fromisoformat(line["scheduled_at"])].append(line["added"])
    return added


async def _seconds_after_due(system: System, connection: Connection, slots: list[datetime]) -> float:
    """Wait until slots are stored, none of them before it is due; return how long after that the slowest is."""
    seconds = []
    for slot in sorted(slots):
        await asyncio.sleep((slot - utc_now()).total_seconds() - JUST_BEFORE_SECONDS)
        early = await connection.fetchval(
            "SELECT count(*) FROM portfolio_snapshots WHERE timestamp = $1 AND clock_timestamp() < $1", slot
        )
        assert early == 0, f"{early} snapshots of {slot} before it is due"
        await eventually(partial(_is_whole, system, connection, slot), timeout=STRUCK_SECONDS_MAX)
        seconds.append((utc_now() - slot).total_seconds())
    return max(seconds)


async def _timers_are_past(js: JetStreamContext, slot: datetime) -> bool:
    """Tell whether the timers have announced a slot after this one."""
    newest = await js.get_last_msg(TIMER.name, SNAPSHOT_DUE)
    return datetime.fromisoformat(json.loads(newest.data or b"")["scheduled_at"]) > slot


async def _own_messages(js: JetStreamContext, slots: list[datetime], *, since: int) -> list[int]:
    """Return the numbers of the messages that the stream has since then of these slots, as the timers make them."""
    last = (await js.stream_info(TIMER.name)).state.last_seq
    found = []
    for number in range(since, last + 1):
        due = json.loads((await js.get_msg(TIMER.name, number)).data or b"")
        if datetime.fromisoformat(due["scheduled_at"]) in slots and due["shards"] == SHARDS:
            found.append(number)
    return found


async def _data(system: System, _: Life) -> str:
    """Users are deleted while snapshots are taken, and one has ten thousand positions."""
    async with session(system) as connection, _others(connection) as (leaving, rich):
        await next_slots(2)
        await _delete(system, connection, list(leaving))
        seconds = await _seconds_of_rich(system, connection, rich)
        left = await connection.fetchval(_OF_USERS, leaving)
        assert left == 0, f"{left} rows of users who were deleted"
        orphans = await connection.fetchval(_ORPHANS)
        assert orphans == 0, f"{orphans} orphans"
    return (
        f"{LEAVING} users deleted, {MEETINGS} while their snapshots were written, {MEETINGS} before, and nothing of "
        f"them is left; {RICH_SLOTS} slots with {RICH_POSITIONS} positions and one without a price stored "
        f"{seconds:.1f} s after they were due at most"
    )


@asynccontextmanager
async def _others(connection: Connection) -> AsyncIterator[tuple[list[int], int]]:
    """Insert users who will leave, and a rich one; nothing of them is left to be counted when the block has ended."""
    async with connection.transaction():
        leaving = [await _insert_user(connection, f"leaving{number}") for number in range(LEAVING)]
        await connection.execute(
            "INSERT INTO positions (user_id, ticker, shares, cost_basis) SELECT unnest($1::integer[]), $2, 1, 1",
            leaving,
            SYMBOLS[0],
        )
        rich = await _insert_rich(connection)
    try:
        yield leaving, rich
    finally:
        for statement in _REMOVE_USERS:
            await connection.execute(statement, [*leaving, rich])
        for statement in _REMOVE_PRICES:
            await connection.execute(statement, OTHERS)


async def _insert_user(connection: Connection, subject: str) -> int:
    user: int = await connection.fetchval(
        "INSERT INTO users (subject, cash_balance) VALUES ($1, 100) RETURNING id", OTHERS + subject
    )
    return user


async def _insert_rich(connection: Connection) -> int:
    """Insert a user of many positions of a dollar each, and one that has no price."""
    rich = await _insert_user(connection, "rich")
    await connection.execute(_INSERT_PRICES, OTHERS, RICH_POSITIONS)
    await connection.execute(_INSERT_POSITIONS, rich, OTHERS, RICH_POSITIONS, UNKNOWN_SYMBOL)
    return rich


async def _delete(system: System, connection: Connection, staying: list[int]) -> None:
    """Delete users, some of them just when their snapshots are written."""
    for _ in range(MEETINGS):
        await _deletion_meets_statement(system, connection, staying)
        await _statement_meets_deletion(system, connection, staying)
    for user in staying:
        await connection.execute("DELETE FROM users WHERE id = $1", user)


async def _deletion_meets_statement(system: System, connection: Connection, staying: list[int]) -> None:
    """Delete a user whose snapshot is written and not committed: the deletion waits, and then takes that away too."""
    async with session(system) as other, asyncio.TaskGroup() as tasks, held(connection) as statement:
        user = next(user for user in staying if user % SHARDS == statement.shard)
        staying.remove(user)
        deleting = tasks.create_task(other.execute("DELETE FROM users WHERE id = $1", user))

        async def waits_or_has_ended() -> bool:
            blocking = await connection.fetchval("SELECT pg_blocking_pids($1)", other.get_server_pid())
            return deleting.done() or statement.pid in blocking

        await eventually(waits_or_has_ended)
        waits = not deleting.done()
    assert waits, "a user was deleted while a snapshot of his was written"


async def _statement_meets_deletion(system: System, connection: Connection, staying: list[int]) -> None:
    """Delete a user, and commit only after a slot: the statement does not wait, and leaves him out."""
    user = staying.pop()
    async with session(system) as other, other.transaction():
        await other.execute("DELETE FROM users WHERE id = $1", user)
        slot = next_boundary(utc_now(), SLOT)
        whole = partial(_is_whole_but, system, connection, slot, user)
        await eventually(whole, timeout=STRUCK_SECONDS_MAX)


async def _is_whole_but(system: System, connection: Connection, slot: datetime, user: int) -> bool:
    """Tell whether a slot is stored for all of the population and not for this user."""
    people = [each.id for each in system.population.active]
    stored = await connection.fetch(
        "SELECT user_id FROM portfolio_snapshots WHERE timestamp = $1 AND user_id = ANY ($2)",
        slot,
        [*people, user],
    )
    return {row["user_id"] for row in stored} == set(people)


async def _seconds_of_rich(system: System, connection: Connection, rich: int) -> float:
    """See that slots have all that the rich user holds; return how long after it was due the slowest was stored."""
    since = utc_now()
    slots = [next_boundary(since, SLOT) + number * SLOT for number in range(RICH_SLOTS)]
    snapshotters = system.services["snapshotter"]

    async def stored() -> dict[datetime, datetime] | None:
        """Return when each of the slots was stored."""
        at = {
            datetime.fromisoformat(slot): datetime.fromisoformat(line["timestamp"])
            for service in snapshotters
            for (slot, shard), line in _said(service, "snapshots_taken", since=since).items()
            if shard == rich % SHARDS
        }
        return {slot: at[slot] for slot in slots} if at.keys() >= set(slots) else None

    at = await eventually(stored, timeout=RICH_SLOTS + STRUCK_SECONDS_MAX, every=0.2)
    assert at is not None
    found = {row["timestamp"]: tuple(row)[1:] for row in await connection.fetch(_RICH, rich, slots)}
    expected = dict.fromkeys(slots, (RICH_POSITIONS, 1, RICH_POSITIONS))
    assert found == expected, f"positions, unpriced and value are {found}"
    seconds = max((at[slot] - slot).total_seconds() for slot in slots)
    assert seconds <= RICH_SECONDS_MAX, f"stored {seconds:.1f} s after the slot was due"
    return seconds


ROWS = (
    Row(
        1,
        "snapshotter dies after commit, before ack",
        "SIGKILL between the two",
        _after_commit,
        tampered_when_armed("snapshotter", "die_before_acknowledging"),
        signs=REDELIVERED,
    ),
    Row(
        2,
        "snapshotter dies inside the transaction",
        "SIGKILL between the last row and the commit, then pg_terminate_backend: else it would be committed, as in 1",
        _in_transaction,
        signs=REDELIVERED,
    ),
    Row(
        3,
        "snapshotter paused longer than the ack wait",
        "SIGSTOP just before its statement, SIGCONT when another has stored the shard",
        _paused,
        tampered_when_armed("snapshotter", "sleep_before_storing"),
        signs=REDELIVERED,
    ),
    Row(
        5,
        "doubled, late, out-of-order timer messages",
        "published by hand, of three slots that are stored and two that are to come",
        _by_hand,
        signs=(
            Sign("snapshots", SKIPPED, "snapshot_skipped"),
            Sign("", "snapshot_shards_postponed_total", "snapshot_postponed"),
        ),
    ),
    Row(
        23,
        "data: unpriced, empty, deleted during a snapshot, 10,000 positions",
        "SQL, some while a statement is held between its last row and its commit",
        _data,
    ),
)
