"""Disks that are full: small ones, really mounted, and filled to the last byte."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from tests.faults.mix import Life
from tests.faults.parts import Nats, Postgres
from tests.faults.population import Population
from tests.faults.rows.row import Row, next_slots, seconds_to_health
from tests.faults.signs import Sign
from tests.faults.system import Options, System, running

POSTGRES_MB, NATS_MB = 400, 200
FULL_SECONDS = 10.0
RECOVERED_SECONDS_MAX = 20.0
"""PostgreSQL that has ended for want of room has to recover first."""
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
    """Leave no byte on the disk of a file."""
    with ballast.open("wb", buffering=0) as file:
        for size in (len(_BLOCK), 512, 1):
            try:
                while file.write(_BLOCK[:size]) == size:
                    pass
            except OSError:
                continue


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    ballast = folder / "ballast"
    _fill(ballast)
    try:
        yield
    finally:
        ballast.unlink()


async def _disk_full(system: System, life: Life) -> str:
    seen = []
    assert isinstance(system.nats, Nats)
    for part in (system.postgres, system.nats):
        texts: set[str] = set()
        with _full(part.folder):
            for _ in range(int(FULL_SECONDS)):
                await asyncio.sleep(1)
                if isinstance(part, Postgres):  # what is written goes on until a segment of the log is full
                    await asyncio.to_thread(_fill, part.folder / "ballast")
                for service in system.all_services:
                    status, text = await service.ask("readyz")
                    if status == 503:
                        texts.add(text)
        assert texts, f"no service says that the disk of {part.name} is full"
        if part is system.nats:
            # It does not write again by itself: the health check of docker-compose.yml ends it once there is room.
            await part.terminate(signal.SIGTERM)
        seconds = await seconds_to_health(system, RECOVERED_SECONDS_MAX)
        seen.append(f"{part.name}: seen in /readyz, healthy {seconds:.1f} s after there was room")
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
        signs=(
            Sign("postgres", 'database_unavailable_total{reason="no_room"}', "check_failed"),
            Sign("nats", "bus_storing", "bus_does_not_store"),
        ),
    ),
)
