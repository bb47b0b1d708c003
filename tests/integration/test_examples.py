"""The examples of the README and their neighbours, run as they stand there, against a real bus and a real cache."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from services.price_feeder import answers
from shared.bus import Bus, Outgoing, Unanswered
from shared.database import Database
from shared.messages import PRICES_REQUESTED, PricesReply, PricesRequested, PriceTick, price_subject
from tests.conftest import ROOT
from tests.factories import set_price
from tests.waiting import eventually

EXAMPLES = ROOT / "docs" / "examples"
AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)


def tick(symbol: str, price: str, sequence: int) -> Outgoing:
    message = PriceTick(
        symbol=symbol, price=Decimal(price), traded_at=AT, received_at=AT, feed="iex", sequence=sequence
    )
    return Outgoing(price_subject(symbol), message)


PYTHON = (sys.executable,)
SHELL = ("bash",)
LAST_VALUES = [tick("BRK.B", "700.00", 1), tick("BRK.B", "715.50", 2), tick("BTC/USD", "64250.1234", 1)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples in JavaScript and what they need."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    for file in (*EXAMPLES.glob("*.json"), *EXAMPLES.glob("*.mjs")):
        shutil.copy(file, folder)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True)
    return folder


class Running:
    """An example that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def lines(self, count: int) -> list[str]:
        """Return the next lines that it prints."""
        assert self._process.stdout is not None
        async with asyncio.timeout(30):
            return [(await self._process.stdout.readline()).decode().strip() for _ in range(count)]

    async def end(self) -> tuple[str, int]:
        """Return what it still prints by itself, and its exit code."""
        async with asyncio.timeout(30):
            rest, _ = await self._process.communicate()
        assert self._process.returncode is not None
        return rest.decode(), self._process.returncode


@asynccontextmanager
async def running(command: Sequence[str | Path], nats_url: str, folder: Path) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=os.environ | {"NATS_URL": nats_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# ---- last values, then live ones -----------------------------------------------------------------


async def check_subscriber(command: Sequence[str | Path], bus: Bus, nats_url: str, folder: Path) -> None:
    assert not await bus.publish_all(LAST_VALUES)
    async with running(command, nats_url, folder) as example:
        assert set(await example.lines(2)) == {
            "BRK.B 715.50 2026-03-02T15:00:00Z iex",
            "BTC/USD 64250.1234 2026-03-02T15:00:00Z iex",
        }
        await bus.publish(tick("BRK.B", "716.00", 3))
        assert await example.lines(1) == ["BRK.B 716.00 2026-03-02T15:00:00Z iex"]


async def test_python_subscriber_prints_last_values_then_live_ones(
    bus: Bus, nats_url: str, tmp_path: Path
) -> None:
    await check_subscriber((*PYTHON, EXAMPLES / "subscribe.py"), bus, nats_url, tmp_path)


async def test_javascript_subscriber_prints_last_values_then_live_ones(
    bus: Bus, nats_url: str, node: Path
) -> None:
    await check_subscriber(("node", "subscribe.mjs"), bus, nats_url, node)


async def test_the_protocol_by_hand_gives_last_values_then_live_ones(
    bus: Bus, nats_url: str, tmp_path: Path
) -> None:
    assert not await bus.publish_all(LAST_VALUES)
    async with running((*SHELL, EXAMPLES / "prices.sh", "live"), nats_url, tmp_path) as example:
        last = [PriceTick.model_validate_json(line) for line in await example.lines(2)]
        assert {(each.symbol, each.sequence) for each in last} == {("BRK.B", 2), ("BTC/USD", 1)}
        live = tick("BRK.B", "716.00", 3)
        await bus.publish(live)
        assert await example.lines(1) == [live.payload.decode()]


# ---- what was missed -----------------------------------------------------------------------------


async def check_resuming(command: Sequence[str | Path], bus: Bus, nats_url: str, folder: Path) -> None:
    (folder / "resume.json").unlink(missing_ok=True)
    assert not await bus.publish_all(LAST_VALUES)
    async with running(command, nats_url, folder) as example:
        assert set(await example.lines(2)) == {"BRK.B 715.50", "BTC/USD 64250.1234"}
        await bus.publish(tick("BRK.B", "716.00", 3))
        assert await example.lines(1) == ["BRK.B 716.00"]

        async def is_kept() -> bool:
            with suppress(ValueError):  # it is being written
                return bool(json.loads((folder / "resume.json").read_text())["sequences"]["BRK.B"] == 3)
            return False

        await eventually(is_kept)
    # While it is away; the fourth of BRK.B never comes, the fifth comes twice.
    assert not await bus.publish_all(
        [tick("BTC/USD", "64251.0", 2), tick("BRK.B", "718.00", 5), tick("BRK.B", "718.00", 5)]
    )
    async with running(command, nats_url, folder) as example:
        assert await example.lines(2) == ["BTC/USD 64251.0", "BRK.B 718.00 after 1 missed"]
        await bus.publish(tick("BRK.B", "719.00", 6))
        assert await example.lines(1) == ["BRK.B 719.00"]


async def test_python_goes_on_where_it_was_and_sees_what_is_missing(
    bus: Bus, nats_url: str, tmp_path: Path
) -> None:
    await check_resuming((*PYTHON, EXAMPLES / "resume.py"), bus, nats_url, tmp_path)


async def check_beginning_anew(command: Sequence[str | Path], bus: Bus, nats_url: str, folder: Path) -> None:
    (folder / "resume.json").write_text('{"position": 1000, "sequences": {"BRK.B": 1}}')
    await bus.publish(tick("BRK.B", "715.50", 2))
    async with running(command, nats_url, folder) as example:
        assert await example.lines(1) == ["BRK.B 715.50"]


async def test_python_begins_anew_with_a_stream_that_was_lost(
    bus: Bus, nats_url: str, tmp_path: Path
) -> None:
    await check_beginning_anew((*PYTHON, EXAMPLES / "resume.py"), bus, nats_url, tmp_path)


async def test_javascript_begins_anew_with_a_stream_that_was_lost(
    bus: Bus, nats_url: str, node: Path
) -> None:
    await check_beginning_anew(("node", "resume.mjs"), bus, nats_url, node)


async def test_javascript_goes_on_where_it_was_and_sees_what_is_missing(
    bus: Bus, nats_url: str, node: Path
) -> None:
    await check_resuming(("node", "resume.mjs"), bus, nats_url, node)


async def test_the_protocol_by_hand_gives_what_came_since_a_moment(
    bus: Bus, nats_url: str, tmp_path: Path
) -> None:
    assert not await bus.publish_all(LAST_VALUES)
    since = (*SHELL, EXAMPLES / "prices.sh", "since")
    async with running((*since, "2026-01-01T00:00:00Z"), nats_url, tmp_path) as example:
        lines = await example.lines(3)
        assert [PriceTick.model_validate_json(line).sequence for line in lines] == [1, 2, 1]
    async with running((*since, "when?"), nats_url, tmp_path) as example:
        said, code = await example.end()
        assert "error" in said
        assert code == 1


# ---- asking --------------------------------------------------------------------------------------


@pytest.fixture
async def feeder(database: Database, bus: Bus) -> AsyncIterator[None]:
    """Answers, from a cache with one price."""
    await set_price(database, "BRK.B", "715.50")
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answers.run(database, bus, stop))

        async def answers_already() -> bool:
            question = PricesRequested(symbols=("BRK.B",))
            with suppress(Unanswered):
                await bus.request(PRICES_REQUESTED, question, PricesReply, timeout_seconds=5)
                return True
            return False

        await eventually(answers_already)
        yield
        stop.set()


async def check_asking(command: Sequence[str | Path], nats_url: str, folder: Path) -> None:
    async with running((*command, "BRK.B", "NOPE"), nats_url, folder) as example:
        said, code = await example.end()
        known, unknown = said.splitlines()
        assert known.startswith("BRK.B 715.5000 known to be the last at 20")
        assert unknown == "without a price: NOPE"
        assert code == 0
    async with running((*command, "not a symbol"), nats_url, folder) as example:
        said, code = await example.end()
        assert "refused: 400" in said
        assert code == 1


@pytest.mark.usefixtures("feeder")
async def test_python_is_told_the_current_prices(nats_url: str, tmp_path: Path) -> None:
    await check_asking((*PYTHON, EXAMPLES / "ask.py"), nats_url, tmp_path)


@pytest.mark.usefixtures("feeder")
async def test_javascript_is_told_the_current_prices(nats_url: str, node: Path) -> None:
    await check_asking(("node", "ask.mjs"), nats_url, node)


@pytest.mark.usefixtures("feeder")
async def test_the_protocol_by_hand_asks_for_the_current_prices(nats_url: str, tmp_path: Path) -> None:
    command = (*SHELL, EXAMPLES / "prices.sh", "ask")
    async with running((*command, "BRK.B", "NOPE"), nats_url, tmp_path) as example:
        said, code = await example.end()
        reply = PricesReply.model_validate_json(said)
        assert [price.price for price in reply.prices] == [Decimal("715.5")]
        assert (reply.unknown, code) == (("NOPE",), 0)


async def test_asked_by_hand_while_nobody_answers_it_says_so(nats_url: str, tmp_path: Path) -> None:
    command = (*SHELL, EXAMPLES / "prices.sh", "ask", "BRK.B")
    async with running(command, nats_url, tmp_path) as example:
        said, code = await example.end()
        assert "503" in said
        assert code == 1


# ---- the README ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["subscribe.py", "subscribe.mjs"])
def test_readme_shows_the_examples_as_they_are(name: str) -> None:
    assert (EXAMPLES / name).read_text().strip() in (ROOT / "README.md").read_text()


def test_readme_names_every_example() -> None:
    readme = (ROOT / "README.md").read_text()
    for file in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.mjs"), *EXAMPLES.glob("*.sh")):
        assert f"docs/examples/{file.name}" in readme or file.read_text().strip() in readme, file.name
