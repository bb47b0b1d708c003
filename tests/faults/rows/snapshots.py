"""Snapshotters that die at the worst of moments, or sleep through them, and a timer that says everything twice."""

import asyncio
import json
import time
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import nats
import psutil

from services.snapshotter import timer
from services.snapshotter.snapshots import ACK_WAIT_SECONDS
from shared.clock import last_boundary, utc_now
from shared.messages import SNAPSHOT_DUE
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.population import UNKNOWN_SYMBOL
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
EARLY_SLOTS = 10
BACKEND_ENDS_MS_MAX = 5000
Shard = tuple[str, int]
"""A slot, and the number of a shard of it."""
TAKEN = 'snapshot_shards_total{outcome="taken"}'
REDELIVERED = (Sign(GONE, "bus_redeliveries_total", "snapshot_redelivered"),)

_ROWS = """
SELECT
    (SELECT count(*) FROM portfolio_snapshots WHERE timestamp = $1 AND user_id % $2 = $3) AS portfolios,
    (SELECT count(*) FROM position_snapshots WHERE timestamp = $1 AND user_id % $2 = $3) AS positions
"""


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
    skipped, duplicate = await total(snapshotters, SKIPPED), await total(snapshotters, DUPLICATE)
    now = last_boundary(utc_now(), SLOT)
    too_late = now - timedelta(seconds=LATE_SECONDS_MAX + 60)
    future = now + timedelta(days=1)
    early = now + EARLY_SLOTS * SLOT
    doubled = [max(now - number * SLOT, life.first) for number in range(3)]
    client = await nats.connect(system.nats_urls)
    try:
        for slot in (*doubled, *reversed(doubled), too_late, future, early):
            due = {"scheduled_at": slot.isoformat(), "shard": 0, "shards": 1}
            await client.jetstream().publish(SNAPSHOT_DUE, json.dumps(due).encode())
        # The timers' own messages for this slot will be dropped as copies of these.
        for shard in range(SHARDS):
            own = timer.due(early, shard, SHARDS)
            await client.jetstream().publish(
                own.subject, own.payload, headers={"Nats-Msg-Id": own.message_id or ""}
            )
    finally:
        await client.close()

    async def are_counted() -> bool:
        return (
            await total(snapshotters, SKIPPED) - skipped >= 2
            and await total(snapshotters, DUPLICATE) - duplicate >= 1
        )

    await eventually(are_counted)
    async with session(system) as connection:
        stored = await connection.fetchval(
            "SELECT count(*) FROM portfolio_snapshots WHERE timestamp IN ($1, $2)", too_late, future
        )
    assert stored == 0, f"{stored} snapshots of a slot that is too late or yet to come"
    await next_slots(EARLY_SLOTS + 1)  # then the checker counts what was early
    return (
        f"{await total(snapshotters, SKIPPED) - skipped:g} skipped, "
        f"{await total(snapshotters, DUPLICATE) - duplicate:g} counted as duplicate"
    )


async def _data(system: System, _: Life) -> str:
    """Users are deleted while snapshots are taken, and one has ten thousand positions."""
    snapshotters = system.services["snapshotter"]
    async with session(system) as connection:
        leaving = [
            await connection.fetchval(
                "INSERT INTO users (subject) VALUES ($1) RETURNING id", f"leaving{number}"
            )
            for number in range(20)
        ]
        for user in leaving:
            await asyncio.sleep(0.1)
            await connection.execute("DELETE FROM users WHERE id = $1", user)
        rich = await connection.fetchval("INSERT INTO users (subject) VALUES ('rich') RETURNING id")
        await connection.execute(
            "INSERT INTO positions (user_id, ticker, shares, cost_basis) "
            "SELECT $1, 'S' || number, 1, 1 FROM generate_series(1, 10000) AS number",
            rich,
        )
        before = await total(snapshotters, TAKEN)
        await next_slots(3)

        async def goes_on() -> bool:
            return await total(snapshotters, TAKEN) >= before + 4

        await eventually(goes_on)
        unpriced = await connection.fetchval(
            "SELECT max(unpriced_positions) FROM portfolio_snapshots WHERE user_id = $1", rich
        )
        assert unpriced == 10_000, f"{unpriced} positions without a price"
        orphans = await connection.fetchval(
            "SELECT count(*) FROM position_snapshots AS detail WHERE NOT EXISTS "
            "(SELECT FROM portfolio_snapshots AS parent "
            "WHERE parent.user_id = detail.user_id AND parent.timestamp = detail.timestamp)"
        )
        assert orphans == 0, f"{orphans} orphans"
        # Nobody else is to be counted at the end.
        await connection.execute("DELETE FROM users WHERE id = $1", rich)
        await connection.execute("DELETE FROM portfolio_snapshots WHERE user_id = ANY($1)", [rich, *leaving])
        await connection.execute("DELETE FROM position_snapshots WHERE user_id = ANY($1)", [rich, *leaving])
    return "20 users deleted meanwhile, a portfolio of 10,000 positions taken, no orphan"


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
        "published by hand",
        _by_hand,
        signs=(
            Sign("snapshots", SKIPPED, "snapshot_skipped"),
            Sign("", "snapshot_shards_postponed_total", "snapshot_postponed"),
        ),
    ),
    Row(
        23,
        "data: unpriced, empty, deleted during a snapshot, 10,000 positions",
        "SQL",
        _data,
    ),
)
