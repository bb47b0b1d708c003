"""Servers of which there are several: one is lost, and the others go on."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import nats
from nats.js.api import StreamInfo

from local.servers import promote
from shared.clock import utc_now
from shared.messages import TIMER
from tests.faults.mix import Life
from tests.faults.parts import Nats, NatsMember, Replica
from tests.faults.rows.row import (
    Row,
    next_slots,
    seconds_to_health,
    seconds_to_prices,
    seconds_until,
    session,
)
from tests.faults.rows.servers import KILLED, away
from tests.faults.signs import Sign
from tests.faults.system import Options, System
from tests.waiting import eventually

REPLICAS = 3
LEADERLESS_SECONDS_MAX = 15.0
"""The servers that are left choose a new leader: 4 to 9 s after they last heard of the old one, or once more."""
WELL_SECONDS_MAX = 20.0
"""So does each stream for itself, and a client that was connected to the lost server finds another one."""
ASK_SECONDS_MAX = 1.0
CURRENT_SECONDS_MAX = 30.0
"""A server that has come back has what it missed by then."""
DEAD_SECONDS = 3.0
FOLLOWED_SECONDS_MAX = 5.0


async def _leader_killed(system: System, life: Life) -> str:
    seen = []
    for _ in range(2):
        old = await _leader_of_three(system)
        began = time.monotonic()
        async with away(old, KILLED):
            others = [server for server in system.nats_servers if server is not old]
            new = await eventually(partial(_another_leader, others), timeout=LEADERLESS_SECONDS_MAX)
            led = time.monotonic() - began
            left = WELL_SECONDS_MAX - led
            await asyncio.gather(
                seconds_to_health(system, left),
                seconds_to_slot(system, left),
                seconds_to_prices(system, left),
            )
            seconds = time.monotonic() - began
            await next_slots(3)
        await old.wait_until_ready()
        seen.append(
            f"{old.name} killed: {new} leads after {led:.1f} s, all well without it after {seconds:.1f} s"
        )
    assert not life.readers.refused, f"reads were refused: {life.readers.refused[0]}"
    return f"{'; '.join(seen)}; no read refused"


async def _leader_of_three(system: System) -> Nats | NatsMember:
    """Wait until three servers have all that the stream of timers has; return the one that leads."""

    async def leader() -> str | None:
        info = await _timers(system.nats_servers)
        if info is None or info.cluster is None:
            return None
        assert info.config.num_replicas == REPLICAS
        followers = info.cluster.replicas or []
        assert len(followers) == REPLICAS - 1, f"only {followers} follow"
        return info.cluster.leader if all(each.current and not each.offline for each in followers) else None

    name = await eventually(leader, timeout=CURRENT_SECONDS_MAX, every=0.1)
    return next(server for server in system.nats_servers if server.name == name)


async def _another_leader(others: Sequence[Nats | NatsMember]) -> str | None:
    """Return the name of the server that leads the stream of timers, if it is one of these."""
    info = await _timers(others)
    leader = info.cluster.leader if info and info.cluster else None
    return leader if leader in {server.name for server in others} else None


async def _timers(servers: Sequence[Nats | NatsMember]) -> StreamInfo | None:
    """Return what these servers say of the stream of timers; None while they cannot, as nobody leads."""
    client = await nats.connect([server.url for server in servers])
    try:
        return await client.jetstream(timeout=ASK_SECONDS_MAX).stream_info(TIMER.name)
    except nats.errors.Error:
        return None
    finally:
        await client.close()


async def seconds_to_slot(system: System, seconds_max: float) -> float:
    """Wait until a slot is stored that begins from now on; return how long that takes."""
    now = utc_now()
    async with session(system) as connection:

        async def is_stored() -> bool:
            newest = await connection.fetchval("SELECT max(timestamp) FROM portfolio_snapshots")
            return bool(newest > now)

        return await seconds_until(is_stored, seconds_max)


async def _primary_lost(system: System, life: Life) -> str:
    primary, replica = system.postgres_servers
    assert isinstance(replica, Replica)
    assert replica.server is not None
    primary.lose()
    await asyncio.sleep(DEAD_SECONDS)
    began = time.monotonic()
    await asyncio.to_thread(promote, replica.server)
    system.postgres_servers.reverse()
    promoted_seconds = time.monotonic() - began
    seconds = await seconds_to_health(system, FOLLOWED_SECONDS_MAX)
    primary.spells[-1].ended_at = time.monotonic()  # it is missed no more
    await next_slots(3)
    refused = len(life.readers.refused)
    return (
        f"promoted in {promoted_seconds:.1f} s, all services well {seconds:.1f} s later, without a restart; "
        f"{refused} refused meanwhile"
    )


ROWS = (
    Row(
        11,
        "a three-node NATS cluster loses its leader",
        "kill -9 of the leader, and of the next one once it is back",
        _leader_killed,
        options=lambda _: Options(nats_nodes=REPLICAS),
        signs=(Sign("nats", "bus_reconnects_total", "bus_problem"),),
    ),
    Row(
        24,
        "PostgreSQL's primary is lost, its replica promoted",
        "kill -9 for good, pg_promote",
        _primary_lost,
        options=lambda _: Options(postgres_replica=True),
        signs=(Sign("postgres", "database_primary_changes_total", "database_primary_changed"),),
    ),
)
