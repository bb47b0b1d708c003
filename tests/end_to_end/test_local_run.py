"""`make run` as a new user meets it: one command, one screen, a curl that works, nothing left behind."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import psutil
import pytest

from local.settings import ROOT, free_port
from tests.waiting import eventually

START_SECONDS_MAX = 60.0


class LocalRun:
    """A running `python -m local run`, and what it has printed."""

    def __init__(self, process: asyncio.subprocess.Process, output: Path) -> None:
        self.process = process
        self._output = output

    @property
    def screen(self) -> str:
        return self._output.read_text()

    async def is_running(self) -> bool:
        assert self.process.returncode is None, self.screen
        return "Foliotick is running" in self.screen

    async def end(self, number: signal.Signals) -> int:
        """Send the signal and return the exit code; no process of the system may be left then."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        assert len(family) > 6
        self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), 30)
        _, alive = psutil.wait_procs(family, timeout=5)  # the system buries orphans when it comes to it
        assert not alive
        return code


@asynccontextmanager
async def local_run(folder: Path, **settings: str) -> AsyncIterator[LocalRun]:
    output = folder.parent / f"{folder.name}.screen"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALPACA_")}
    environment |= {"LOCAL_DATA_DIR": str(folder), "GATEWAY_PORT": str(free_port()), **settings}
    with output.open("wb") as screen:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "local", "run", cwd=ROOT, env=environment, stdout=screen, stderr=screen
        )
    try:
        yield LocalRun(process, output)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_one_command_shows_a_screen_whose_curl_works_and_a_second_run_keeps_the_history(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    async with local_run(folder) as first:
        await eventually(first.is_running, timeout=START_SECONDS_MAX)
        curls = re.findall(r"^.*(curl -H .*)$", first.screen, flags=re.MULTILINE)
        assert len(curls) == 2
        answers = [
            json.loads(subprocess.check_output(["sh", "-c", f"{curl} --silent"]), parse_float=Decimal)
            for curl in curls
        ]
        current, chart = answers
        (address,) = re.findall(r"^  page +(\S+)$", first.screen, flags=re.MULTILINE)
        start = json.loads(subprocess.check_output(["curl", "--silent", f"{address}/page/start"]))
        assert start["token"].count(".") == 2  # a token of the demo user's own, made at the same start
        assert current["price_fresh"] is True
        assert current["simulated"] is True
        assert {"BRK.B", "BTC/USD"} <= {position["ticker"] for position in current["positions"]}
        assert current["cash_balance"] == Decimal("5000.50")
        # A month of history by the hour, there at once.
        assert 715 <= len(chart["data_points"]) <= 720
        smoke = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "local", "smoke"),
            cwd=ROOT,
            env=os.environ | {"LOCAL_DATA_DIR": str(folder)},
            stdout=subprocess.PIPE,
        )
        answer, _ = await smoke.communicate()
        assert answer.decode().strip().endswith(" ok, 0 wrong"), answer.decode()
        assert smoke.returncode == 0
        assert await first.end(signal.SIGINT) == 0
    async with local_run(folder) as second:
        await eventually(second.is_running, timeout=START_SECONDS_MAX)
        assert "demo portfolios" not in second.screen
        assert await second.end(signal.SIGTERM) == 0


async def test_a_taken_port_is_said_in_one_line_and_nothing_is_left_running(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with local_run(tmp_path / "data", GATEWAY_PORT=str(port)) as refused:
            assert await asyncio.wait_for(refused.process.wait(), 30) == 1
            assert refused.screen.splitlines() == [
                "starting Foliotick",
                f"foliotick: port {port} of 127.0.0.1 is taken: GATEWAY_PORT={port + 1} make run",
            ]


async def test_wrong_settings_are_all_said_before_anything_starts(tmp_path: Path) -> None:
    wrong = {"SNAPSHOT_INTERVAL_MINUTES": "never", "ALPACA_FEED": "rumours"}
    async with local_run(tmp_path / "data", **wrong) as refused:
        assert await asyncio.wait_for(refused.process.wait(), START_SECONDS_MAX) == 1
        said = refused.screen.splitlines()
        assert said[1] == "foliotick: settings are wrong:"
        assert [line.split()[0] for line in said[2:]] == ["ALPACA_FEED", "SNAPSHOT_INTERVAL_MINUTES"]
    assert not (tmp_path / "data" / "postgres").exists()


@pytest.mark.parametrize(
    ("part", "name"),
    [("services.snapshotter", "snapshotter"), ("nats-server", "nats-server"), ("postgres -D", "PostgreSQL")],
)
async def test_a_part_that_dies_is_said_in_one_line_and_the_rest_is_stopped(
    tmp_path: Path, part: str, name: str
) -> None:
    async with local_run(tmp_path / "data") as broken:
        await eventually(broken.is_running, timeout=START_SECONDS_MAX)
        family = psutil.Process(broken.process.pid).children(recursive=True)
        (victim,) = [process for process in family if part in " ".join(process.cmdline())]
        victim.kill()
        assert await asyncio.wait_for(broken.process.wait(), 40) == 1
        assert f"foliotick: {name} ended with signal SIGKILL" in broken.screen.splitlines()[-1]
        _, alive = psutil.wait_procs(family, timeout=5)  # the system buries orphans when it comes to it
        assert not alive


async def test_a_symbol_without_a_price_keeps_nobody_from_running(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    async with local_run(folder) as first:
        await eventually(first.is_running, timeout=START_SECONDS_MAX)
        (tmp_path / "odd.csv").write_text("ticker,shares,cost_basis\nNOSUCH,1,1\n")
        imported = subprocess.run(
            [sys.executable, "-m", "local", "admin", "import-positions", "demo", str(tmp_path / "odd.csv")],
            cwd=ROOT,
            env=os.environ | {"LOCAL_DATA_DIR": str(folder)},
            check=False,
        )
        assert imported.returncode == 0
        assert await first.end(signal.SIGTERM) == 0
    async with local_run(folder) as second:
        await eventually(second.is_running, timeout=START_SECONDS_MAX)
        assert "no price for NOSUCH" in second.screen


async def test_a_recorded_market_is_replayed_to_portfolios_of_its_symbols(
    tmp_path: Path, shared_folder: Path
) -> None:
    recorded = shared_folder / "market-data" / "minute-bars-2013-10-04-to-11.csv.gz"
    replay = {"SIMULATOR_REPLAY_FILE": str(recorded), "SIMULATOR_REPLAY_SPEED": "100000"}
    for _ in range(2):  # the second time it begins again, with prices older than those of the first
        async with local_run(tmp_path / "data", **replay) as running:
            await eventually(running.is_running, timeout=START_SECONDS_MAX)
            assert "no price for" not in running.screen
            assert "not updating" not in running.screen
            assert await running.end(signal.SIGTERM) == 0


async def test_a_supervisor_that_is_killed_takes_its_children_along(tmp_path: Path) -> None:
    async with local_run(tmp_path / "data") as killed:
        await eventually(killed.is_running, timeout=START_SECONDS_MAX)
        family = psutil.Process(killed.process.pid).children(recursive=True)
        killed.process.kill()
        await killed.process.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, timeout=20)
        assert not alive


async def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine lets nobody mount")
    try:
        async with local_run(small / "data") as refused:
            assert await asyncio.wait_for(refused.process.wait(), 30) == 1
            assert "MB free, 300 MB are needed" in refused.screen.splitlines()[-1]
    finally:
        subprocess.run(["umount", str(small)], check=True)
