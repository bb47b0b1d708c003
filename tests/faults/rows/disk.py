"""Disks that are full: small ones, really mounted, and filled to the last byte."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from shared.clock import wait_for_stop
from tests.faults.mix import Life
from tests.faults.parts import Nats
from tests.faults.population import Population
from tests.faults.rows.feeders import lease_holder
from tests.faults.rows.row import Row, next_slots, seconds_to_health
from tests.faults.signs import Sign, shown
from tests.faults.system import Options, System, running

POSTGRES_MB, NATS_MB = 400, 200
FULL_SECONDS = 10.0
RECOVERED_SECONDS_MAX = 20.0
"""PostgreSQL that has ended for want of room has to recover first."""
SEEN_SECONDS_MAX = 20.0
"""PostgreSQL writes on where it has room, until a table has to grow."""
FILL_SECONDS = 0.5
POSTGRES_FULL = Sign(
    "postgres",
    'database_unavailable_total{reason="no_room"}',
    "check_failed",
    words="No space left on device",
)
NATS_FULL = Sign("nats", "bus_storing", "bus_does_not_store", words="does not store")
_BLOCK = b"\0" * 65_536


@contextmanager
def _small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@asynccontextmanager
async def _running_on_small_disks(
    folder: Path, population: Population, options: Options
) -> AsyncIterator[System]:
    with ExitStack() as disks:
        disks.enter_context(_small_disk(folder / "postgres", POSTGRES_MB))
        disks.enter_context(_small_disk(folder / "nats", NATS_MB))
        async with running(folder, population, options) as system:
            yield system


def _fill(ballast: Path) -> None:
    """Leave no byte on the disk of a file, which grows: what it has taken stays taken."""
    with ballast.open("ab", buffering=0) as file:
        for size in (len(_BLOCK), 512, 1):
            try:
                while file.write(_BLOCK[:size]) == size:
                    pass
            except OSError:
                continue


@asynccontextmanager
async def _full(folder: Path) -> AsyncIterator[None]:
    """Keep a disk full while the block runs: what becomes free on it is taken at once."""
    ballast, stop = folder / "ballast", asyncio.Event()
    await asyncio.to_thread(_fill, ballast)

    async def keep_full() -> None:
        while not await wait_for_stop(stop, FILL_SECONDS):
            await asyncio.to_thread(_fill, ballast)

    filling = asyncio.create_task(keep_full())
    try:
        yield
    finally:
        stop.set()
        await filling
        ballast.unlink()


async def _disk_full(system: System, life: Life) -> str:
    seen = []
    assert isinstance(system.nats, Nats)
    for part, sign in ((system.postgres, POSTGRES_FULL), (system.nats, NATS_FULL)):
        # The others only read, or do nothing but stand by.
        writing = [await lease_holder(system), *system.services["snapshotter"]]
        # Before NATS is ended: then it would be missed for another reason.
        async with _full(part.folder), shown(system, sign, by=writing, seconds_max=SEEN_SECONDS_MAX):
            await asyncio.sleep(FULL_SECONDS)
        if part is system.nats:
            # It does not write again by itself: the health check of docker-compose.yml ends it once there is room.
            await part.terminate(signal.SIGTERM)
        seconds = await seconds_to_health(system, RECOVERED_SECONDS_MAX)
        seen.append(f"{part.name}: {sign.words!r} in /readyz, healthy {seconds:.1f} s after there was room")
        await next_slots(2)
    return f"{'; '.join(seen)}; {len(life.readers.refused)} refused"


def _lacks() -> str | None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return "mounting a small disk needs root"
    return None


ROWS = (
    Row(
        12,
        "disk full (PostgreSQL, JetStream)",
        "small tmpfs, filled to the last byte",
        _disk_full,
        needs=_lacks,
        start=_running_on_small_disks,
        signs=(POSTGRES_FULL, NATS_FULL),
    ),
)
