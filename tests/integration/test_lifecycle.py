"""Processes end as asked, whatever has become of those who watch them."""

import fcntl
import os
import select
import signal
import subprocess
import sys

import psutil
import pytest

from local.settings import ROOT, free_port, service_environment
from tests.waiting import eventually

SECRET = "long enough to sign the tokens of a test"


@pytest.mark.parametrize("service", ["price_feeder", "snapshotter", "api_gateway", "market_simulator"])
@pytest.mark.parametrize("reader", ["has gone", "stands still"])
async def test_service_whose_log_nobody_reads_any_more_stops_when_asked(
    service: str, reader: str, database_url: str, nats_url: str
) -> None:
    port = free_port()
    environment = service_environment(
        {
            "DATABASE_URL": database_url,
            "NATS_URL": nats_url,
            "JWT_SECRET": SECRET,
            "GATEWAY_PORT": str(free_port()),
            "HEALTH_PORT": str(port),
            "SIMULATOR_PORT": str(port),
            "PRICE_UPDATE_ENABLED": "false",
        }
    )
    reading, writing = os.pipe()
    if reader == "stands still":
        os.write(writing, b"x" * fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, select.PIPE_BUF))
    process = subprocess.Popen(
        [sys.executable, "-m", f"services.{service}"],
        cwd=ROOT,
        env=environment,
        stdout=writing,
        stderr=subprocess.DEVNULL if reader == "stands still" else writing,
    )
    os.close(writing)

    async def is_listening() -> bool:
        listening = psutil.Process(process.pid).net_connections("tcp")
        return any(connection.laddr.port == port for connection in listening)

    try:
        await eventually(is_listening, timeout=30)
        if reader == "has gone":
            os.close(reading)
        process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 0
    finally:
        process.kill()
        process.wait()
        if reader == "stands still":
            os.close(reading)


async def test_process_that_nothing_can_cancel_ends_all_the_same() -> None:
    """A task swallows its cancellation for ever: the signal's last consequence is a thread that ends the process."""
    script = """
import asyncio
from contextlib import suppress
from shared import lifecycle
from shared.settings import LogSettings

lifecycle.STOP_GRACE_SECONDS = lifecycle.CANCEL_SECONDS = 0.1
lifecycle.END_SECONDS_MAX = 1.0

async def serve(settings, stop):
    print("serving", flush=True)
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

lifecycle.run("tests", LogSettings, serve)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        while process.stdout.readline() != "serving\n":
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
        assert process.stderr.read() == "not ended 1 s after it was to: given up\n"
