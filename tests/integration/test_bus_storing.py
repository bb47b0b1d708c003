"""JetStream on a disk that is full, small and real: it is said, and is over when there is room again."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nats
import pytest
import yaml
from structlog.testing import capture_logs

from local.servers import NatsNode, nats_node
from local.settings import free_port
from services.snapshotter import timer
from shared.bus import Bus
from shared.clock import utc_now
from shared.messages import TIMER, probe_subject
from shared.publishing import LATE, LOST, NO_STREAM, Outgoing
from shared.storing import DOUBTFUL_SECONDS, FORBIDDEN, Storing
from tests.conftest import ROOT
from tests.metrics import sample
from tests.waiting import eventually

DISK_BYTES = 8 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a disk of its own can be mounted by root alone")
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(mounting, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    state = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(state.f_bavail * state.f_frsize))
    return filler


async def publish(bus: Bus) -> bool:
    return not await bus.publish_all([timer.due(utc_now(), 0, 1)])


class HealthCheck:
    """The health check of docker-compose.yml, on this machine: with its port, folder and process."""

    def __init__(self, folder: Path, tools: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._tools = tools
        # nc as the container has it: it sends what it is told, and prints what comes.
        (tools / "nc").write_text(
            f"#!{sys.executable}\nimport socket, sys\n"
            "with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:\n"
            "    connection.sendall(sys.stdin.buffer.read())\n"
            "    sys.stdout.buffer.write(b''.join(iter(lambda: connection.recv(4096), b'')))\n"
        )
        (tools / "nc").chmod(0o755)

    def __call__(self, node: NatsNode) -> int:
        """Run it; return its exit code."""
        assert node.process is not None
        compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        script: str = compose["services"]["nats"]["healthcheck"]["test"][1]
        changes = {
            "8222": str(self.port),
            "/data": str(self._folder),
            "kill 1": f"kill {node.process.pid}",
            "65536": "1024",
            "$$": "$",
        }
        for theirs, ours in changes.items():
            assert theirs in script, theirs
            script = script.replace(theirs, ours)
        environment = os.environ | {"PATH": f"{self._tools}:{os.environ['PATH']}"}
        return subprocess.run(["sh", "-c", script], env=environment, check=False).returncode


async def test_full_disk_is_said_until_what_is_published_is_stored_again(
    small_disk: Path, tmp_path: Path
) -> None:
    health_check = HealthCheck(small_disk, tmp_path)
    options = f'http: "127.0.0.1:{health_check.port}"\n'
    with nats_node(small_disk / "nats", options) as node, capture_logs() as logs:
        async with Bus(node.url, name="publisher") as bus, Bus(node.url, name="listener") as listener:
            for each in (bus, listener):
                async with asyncio.timeout(10):
                    assert await each.wait_until_ready(asyncio.Event())
            acknowledged = 0
            assert await publish(bus)
            acknowledged += 1
            assert health_check(node) == 0
            silent = sample("bus_publishes_unacknowledged_total", stream="TIMER", why="silent")
            filler = fill(small_disk)

            async def is_refused() -> bool:
                nonlocal acknowledged
                stored = await publish(bus)
                acknowledged += stored
                return not stored

            # A block of the disk is left in the file: some still go in.
            await eventually(is_refused, timeout=30, every=0)
            told = []
            for _ in range(2):  # it stays so, though all else goes on: streams are found, echoes come back
                assert not await publish(bus)
                told.append(str(await bus.check()))
            assert all("JetStream does not store what is published to" in each for each in told), told
            assert all("TIMER" in each for each in told), told
            assert sample("bus_publishes_unacknowledged_total", stream="TIMER", why="silent") == silent + 3
            assert sample("bus_storing", stream="TIMER") == 0
            await finds_out(node)
            assert node.process is not None
            assert health_check(node) == 1
            assert node.process.poll() is None  # without room a restart would help nobody
            filler.unlink()
            assert not await publish(bus)  # after an error the server never writes to the stream again
            assert health_check(node) == 1
            node.process.wait(timeout=20)
            node.stop()
            node.start()  # as the restart policy does

            async def is_well() -> bool:
                return await bus.check() is None and await publish(bus)

            await eventually(is_well, timeout=15)
            assert await bus.check() is None
            assert sample("bus_storing", stream="TIMER") == 1
            state = (await listener._client.jetstream().stream_info(TIMER.name)).state
            assert state.messages >= acknowledged + 1  # what was not acknowledged may be there as well
    said = [line for line in logs if line["event"] == "bus_does_not_store" and line["stream"] == "TIMER"]
    assert len(said) == 1
    assert "make room" in said[0]["advice"]


async def finds_out(node: NatsNode) -> None:
    """A service that publishes nothing by itself finds out when it begins, and twice a minute."""
    async with Bus(node.url, name="deaf") as late:

        async def is_said() -> bool:
            return "PROBES" in str(await late.check())

        await eventually(is_said, timeout=20)


def test_what_is_refused_for_the_streams_own_bound_says_nothing_of_the_server() -> None:
    storing = Storing()
    due = timer.due(utc_now(), 0, 1)
    for reason in ("maximum bytes exceeded (code 400, 10077)", LOST):
        storing.note([due], [(due, reason)])
        assert storing.problem is None
    for reason in (LATE, NO_STREAM, "insufficient resources (code 503, 10023)"):
        storing.note([due], [(due, reason)])
        assert storing.problem == f"JetStream does not store what is published to TIMER: {reason}"
        storing.note([due], [(due, LOST)])
        assert storing.problem is not None
        storing.note([due], [])
        assert storing.problem is None


def test_silence_of_who_publishes_no_more_ends_with_a_probe_that_is_stored_well_after_it() -> None:
    now = [0.0]
    storing = Storing(lambda: now[0])
    due, probe = timer.due(utc_now(), 0, 1), Outgoing(probe_subject("tests"), b"")
    storing.note([due], [(due, LATE)])
    for seconds in (1, 19):  # it may be tried again, and fail again
        now[0] = seconds
        storing.note([probe], [])
        assert storing.problem is not None
    storing.note([due], [(due, LATE)])
    now[0] = 38
    storing.note([probe], [])
    assert storing.problem is not None
    now[0] = 40
    storing.note([probe], [(probe, LATE)])
    assert storing.problem is not None
    storing.note([probe], [])
    assert storing.problem is None
    assert sample("bus_storing", stream="TIMER") == 1


async def test_stream_that_was_silent_once_is_well_again_though_nothing_more_is_published_to_it(
    bus: Bus, nats_url: str
) -> None:
    ahead = [0.0]
    bus._storing = Storing(lambda: time.monotonic() + ahead[0])
    client = await nats.connect(nats_url)
    await client.jetstream().delete_stream(TIMER.name)
    assert not await publish(bus)

    assert "TIMER" in str(await bus.check())
    ahead[0] = DOUBTFUL_SECONDS + 1

    async def is_well() -> bool:
        return await bus.check() is None

    await eventually(is_well)
    assert sample("bus_storing", stream="TIMER") == 1
    await client.close()


async def test_probe_that_the_user_may_not_publish_is_said_once_and_named_apart_from_a_full_disk(
    tmp_path: Path,
) -> None:
    user = 'user: $NATS_USER, password: $NATS_PASSWORD, permissions: {publish: {deny: ["probes.v1.>"]}}'
    options = f"authorization: {{users: [{{{user}}}]}}\n"
    problem = f"JetStream does not store what is published to PROBES: {FORBIDDEN}"
    with nats_node(tmp_path / "nats", options) as node, capture_logs() as logs:
        async with Bus(node.url, name="Tests") as bus:

            async def is_said() -> bool:
                return await bus.check() == problem

            await eventually(is_said, timeout=20)

            async def has_tried_again() -> bool:
                return node.log.read_text().count("Publish Violation") >= 3

            await eventually(has_tried_again, timeout=30, every=0.2)
            assert await publish(bus)  # all else is stored
            assert await bus.check() == problem
    (said,) = [line for line in logs if line["event"] == "bus_does_not_store"]
    assert "authorization" in said["advice"]
    assert "room" not in said["advice"]
    assert len([line for line in logs if line["event"] == "bus_problem"]) == 1
