"""Servers of which there are several: one is lost, and the others go on."""

import asyncio
import time

import nats

from local.servers import promote
from shared.messages import TIMER
from tests.faults.mix import Life
from tests.faults.parts import Replica
from tests.faults.rows.row import Row, next_slots, seconds_to_health
from tests.faults.signs import Sign
from tests.faults.system import Options, System

LEADERLESS_SECONDS_MAX = 15.0
"""A new leader is chosen, and a client that was connected to the old one finds another server."""
DEAD_SECONDS = 3.0
FOLLOWED_SECONDS_MAX = 5.0


async def _leader_killed(system: System, life: Life) -> str:
    seen = []
    for _ in range(2):
        client = await nats.connect(system.nats_urls)
        info = await client.jetstream().stream_info(TIMER.name)
        await client.close()
        assert info.cluster is not None
        leader = next(server for server in system.nats_servers if server.name == info.cluster.leader)
        leader.kill()
        await asyncio.sleep(1)
        seconds = 1 + await seconds_to_health(system, LEADERLESS_SECONDS_MAX)
        await leader.wait_until_ready()
        await next_slots(3)
        seen.append(f"{leader.name} killed, all well after {seconds:.1f} s")
    assert not life.readers.refused, f"reads were refused: {life.readers.refused[0]}"
    return f"{'; '.join(seen)}; no read refused"


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
        "kill -9, twice",
        _leader_killed,
        options=lambda _: Options(nats_nodes=3),
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
