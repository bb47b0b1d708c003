"""The subscribers of the README, run as they stand there, against ticks that the feed has published."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from shared.bus import Bus, Outgoing
from shared.messages import PriceTick, price_subject
from tests.conftest import ROOT

EXAMPLES = ROOT / "docs" / "examples"
AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)


def tick(symbol: str, price: str, sequence: int) -> Outgoing:
    message = PriceTick(
        symbol=symbol, price=Decimal(price), traded_at=AT, received_at=AT, feed="iex", sequence=sequence
    )
    return Outgoing(price_subject(symbol), message)


async def printed(command: Sequence[str], nats_url: str, bus: Bus, folder: Path) -> list[str]:
    """Run a subscriber between a first and a second price; return the lines it prints."""
    await bus.publish_all(
        [tick("BRK.B", "700.00", 1), tick("BRK.B", "715.50", 2), tick("BTC/USD", "64250.1234", 1)]
    )
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=os.environ | {"NATS_URL": nats_url}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            lines = [(await process.stdout.readline()).decode().strip() for _ in range(2)]
            await bus.publish(tick("BRK.B", "716.00", 3))
            lines.append((await process.stdout.readline()).decode().strip())
    finally:
        process.kill()
        await process.wait()
    return lines


EXPECTED_LAST_VALUES = {
    "BRK.B 715.50 2026-03-02T15:00:00Z iex",
    "BTC/USD 64250.1234 2026-03-02T15:00:00Z iex",
}
EXPECTED_LIVE = "BRK.B 716.00 2026-03-02T15:00:00Z iex"


async def test_python_subscriber_prints_last_values_then_live_ones(bus: Bus, nats_url: str) -> None:
    lines = await printed([sys.executable, str(EXAMPLES / "subscribe.py")], nats_url, bus, EXAMPLES)
    assert set(lines[:2]) == EXPECTED_LAST_VALUES
    assert lines[2] == EXPECTED_LIVE


async def test_javascript_subscriber_prints_last_values_then_live_ones(
    bus: Bus, nats_url: str, tmp_path: Path
) -> None:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    for name in ("package.json", "package-lock.json", "subscribe.mjs"):
        shutil.copy(EXAMPLES / name, tmp_path)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=tmp_path, check=True, capture_output=True)
    lines = await printed(["node", "subscribe.mjs"], nats_url, bus, tmp_path)
    assert set(lines[:2]) == EXPECTED_LAST_VALUES
    assert lines[2] == EXPECTED_LIVE


@pytest.mark.parametrize("name", ["subscribe.py", "subscribe.mjs"])
def test_readme_shows_the_examples_as_they_are(name: str) -> None:
    assert (EXAMPLES / name).read_text().strip() in (ROOT / "README.md").read_text()
