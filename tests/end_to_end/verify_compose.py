"""docker-compose.yml, for real: build, start with the demo profile, ask, stop, start again, remove.

Not part of `make test`, as it needs Docker and minutes. Run it alone: `pytest -n0 tests/end_to_end/verify_compose.py`.
It uses a project, an image, a port and secrets of its own, and leaves nothing behind.
"""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.waiting import eventually

pytestmark = pytest.mark.xdist_group("compose")

ROOT = Path(__file__).parent.parent.parent
BUILD_AND_START_SECONDS_MAX = 400
COMMAND_SECONDS_MAX = 90
STOP_SECONDS_MAX = 20
OURS = ("api_gateway", "market_simulator", "price_feeder", "snapshotter")
JOBS = ("demo_portfolios", "migrate")


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any


class Compose:
    """A project of docker compose with an .env of its own."""

    def __init__(self, env_file: Path, port: int) -> None:
        self.name = f"foliotick-verify-{os.getpid()}"
        self.image = self.name
        self.url = f"http://127.0.0.1:{port}"
        self._command = ("docker", "compose", "--project-name", self.name, "--env-file", str(env_file))
        self._environment = clean_environment() | {
            "FOLIOTICK_IMAGE": self.image,
            "GATEWAY_PORT": str(port),
            "PRICE_UPDATE_INTERVAL_SECONDS": "1",
            "SNAPSHOT_INTERVAL_MINUTES": "0.05",
        }

    def run(
        self, *argv: str, stdin: str = "", timeout: float = COMMAND_SECONDS_MAX, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self._command, "--profile", "demo", *argv],
            cwd=ROOT,
            env=self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{' '.join(argv)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
        return done

    def start(self, build: str = "--build") -> None:
        up = self.run("up", build, "--detach", "--wait", timeout=BUILD_AND_START_SECONDS_MAX, check=False)
        if up.returncode != 0:
            logs = self.run("logs", "--tail", "30", check=False).stdout
            pytest.fail(f"docker compose up failed:\n{up.stderr[-3000:]}\n{logs}", pytrace=False)

    def admin(self, *argv: str, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("run", "--rm", "--no-TTY", "admin", *argv, stdin=stdin, check=check)

    def token(self, subject: str) -> str:
        return self.admin("mint-token", subject).stdout.strip()

    def inspected(self, service: str) -> Any:
        container = self.run("ps", "--all", "--quiet", service).stdout.strip()
        done = subprocess.run(["docker", "inspect", container], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)[0]

    def remove(self) -> None:
        self.run(
            "--profile", "admin", "down", "--volumes", "--remove-orphans", "--timeout", "20", check=False
        )
        subprocess.run(["docker", "image", "rm", "--force", self.image], capture_output=True, check=False)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what compose would take from it instead of from the file."""
    names = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    return {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith("COMPOSE_")
    }


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    env_file = tmp_path_factory.mktemp("compose") / "env"
    made = subprocess.run([ROOT / "ops" / "new-env"], capture_output=True, text=True, check=True)
    env_file.write_text(made.stdout)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    project = Compose(env_file, port)
    try:
        project.start()
        yield project
    finally:
        project.remove()


@pytest.fixture(scope="module")
def demo_token(compose: Compose) -> str:
    return compose.token("demo")


async def ask(compose: Compose, path: str, token: str | None = None) -> Answer:
    headers: Mapping[str, str] = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = aiohttp.ClientTimeout(total=10)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"{compose.url}{path}", headers=headers) as response,
    ):
        return Answer(response.status, json.loads(await response.text(), parse_float=Decimal))


async def fully_priced(compose: Compose, token: str) -> Any:
    answer = await ask(compose, "/api/portfolio/current", token)
    assert answer.status == 200
    assert answer.body["positions"]
    assert all(position["price_status"] == "live" for position in answer.body["positions"])
    return answer.body


async def chart(compose: Compose, token: str, *, points_min: int = 1) -> list[Any]:
    answer = await ask(compose, "/api/portfolio/performance?timeframe=1D", token)
    assert answer.status == 200
    points: list[Any] = answer.body["data_points"]
    assert len(points) >= points_min
    return points


async def test_demo_portfolio_is_valued_at_simulated_prices(compose: Compose, demo_token: str) -> None:
    current = await eventually(lambda: fully_priced(compose, demo_token), timeout=30)
    held = {position["ticker"]: position["shares"] for position in current["positions"]}
    assert held == {"AAPL": 40, "MSFT": 15, "BRK.B": 12, "SPY": 25, "BTC/USD": Decimal("0.35")}
    assert current["cash_balance"] == Decimal("5000.50")
    assert current["investment_value"] == sum(position["current_value"] for position in current["positions"])
    assert current["total_value"] == current["investment_value"] + Decimal("5000.50")
    assert current["simulated"] is True
    assert {position["price_feed"] for position in current["positions"]} == {"simulated"}


async def test_snapshots_become_a_chart(compose: Compose, demo_token: str) -> None:
    points = await eventually(lambda: chart(compose, demo_token), timeout=30)
    assert all(point["value"] >= 5000 for point in points)


async def test_page_is_served_with_its_chart_library_and_without_a_token(compose: Compose) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{compose.url}/") as page:
            assert (page.status, page.content_type) == (200, "text/html")
        async with session.get(f"{compose.url}/page/lightweight-charts.js") as library:
            assert (library.status, library.content_type) == (200, "text/javascript")
            assert "Apache License 2.0" in await library.text()
    start = await ask(compose, "/page/start")
    assert start.body == {"token": None, "has_chart_library": True}


async def test_request_without_a_token_is_refused(compose: Compose) -> None:
    answer = await ask(compose, "/api/portfolio/current")
    assert answer.status == 401


async def test_operator_creates_a_user_and_imports_a_portfolio(compose: Compose) -> None:
    compose.admin("create-user", "carol", "--cash", "100.25")
    refused = compose.admin(
        "import-positions", "carol", "-", stdin="ticker,shares,cost_basis\nIBM,x,1\n", check=False
    )
    assert refused.returncode == 1
    assert "line 2: shares is 'x'" in refused.stderr
    compose.admin("import-positions", "carol", "-", stdin="ticker,shares,cost_basis\nIBM,2,500.00\n")
    token = compose.token("carol")
    current = await eventually(lambda: fully_priced(compose, token), timeout=30)
    assert [position["ticker"] for position in current["positions"]] == ["IBM"]
    price = current["positions"][0]["price_per_share"]
    assert abs(current["total_value"] - (Decimal("100.25") + 2 * price)) <= Decimal("0.01")


@pytest.mark.parametrize("service", OURS)
def test_container_runs_without_rights(compose: Compose, service: str) -> None:
    container = compose.inspected(service)
    assert container["State"]["Health"]["Status"] == "healthy"
    assert container["Config"]["User"] == "10001:10001"
    assert container["HostConfig"]["ReadonlyRootfs"] is True
    assert container["HostConfig"]["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in container["HostConfig"]["SecurityOpt"]
    status = compose.run("exec", "--no-TTY", service, "cat", "/proc/1/status").stdout
    assert re.search(r"^Uid:\s+10001\s+10001", status, flags=re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, flags=re.MULTILINE)


def test_only_the_gateway_is_published_and_on_loopback_alone(compose: Compose) -> None:
    for service in (*OURS, "postgres", "nats"):
        published = [
            binding["HostIp"]
            for bindings in compose.inspected(service)["NetworkSettings"]["Ports"].values()
            for binding in bindings or []
        ]
        assert published == (["127.0.0.1"] if service == "api_gateway" else []), service


def test_feeder_that_is_to_ask_alpaca_without_a_key_says_so_and_ends(compose: Compose) -> None:
    done = compose.run(
        *("run", "--rm", "--no-deps", "--no-TTY", "--env", "ALPACA_DATA_URL=https://data.alpaca.markets"),
        "price_feeder",
        check=False,
    )
    assert done.returncode == 2
    assert "ALPACA_API_KEY and ALPACA_SECRET_KEY are not set" in done.stderr


def test_compose_without_passwords_is_refused() -> None:
    done = subprocess.run(
        ["docker", "compose", "--env-file", os.devnull, "config", "--quiet"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "is not set - make .env with ops/new-env" in done.stderr


async def test_stop_is_clean_and_everything_is_there_after_the_next_start(
    compose: Compose, demo_token: str
) -> None:
    before = await eventually(lambda: chart(compose, demo_token), timeout=30)
    started_at = time.monotonic()
    compose.run("stop")
    assert time.monotonic() - started_at < STOP_SECONDS_MAX
    for service in (*OURS, *JOBS, "postgres", "nats"):
        state = compose.inspected(service)["State"]
        assert (service, state["Status"], state["ExitCode"]) == (service, "exited", 0)
        assert state["OOMKilled"] is False
    compose.start("--no-build")
    after = await eventually(lambda: chart(compose, demo_token, points_min=len(before)), timeout=30)
    assert after[0]["timestamp"] == before[0]["timestamp"]
    await eventually(lambda: fully_priced(compose, demo_token), timeout=30)
