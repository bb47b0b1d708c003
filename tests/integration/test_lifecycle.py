"""Processes end as asked, whatever has become of those who watch them."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from local.settings import ROOT, free_port, service_environment
from tests.waiting import eventually

SECRET = "long enough to sign the tokens of a test"


@pytest.mark.parametrize("service", ["price_feeder", "snapshotter", "api_gateway", "market_simulator"])
async def test_service_whose_log_nobody_reads_any_more_stops_when_asked(
    service: str, database_url: str, nats_url: str
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
    process = subprocess.Popen(
        [sys.executable, "-m", f"services.{service}"],
        cwd=ROOT,
        env=environment,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)

    async def is_listening() -> bool:
        listening = psutil.Process(process.pid).net_connections("tcp")
        return any(connection.laddr.port == port for connection in listening)

    try:
        await eventually(is_listening, timeout=30)
        os.close(reading)
        process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 0
    finally:
        process.kill()
        process.wait()
