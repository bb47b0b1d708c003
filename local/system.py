"""Start the whole system in order, watch it, and stop it in the reverse order."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import aiohttp

from local import demo, preflight, readiness
from local.children import Child
from local.readiness import StartFailed
from local.servers import Server, ServerFailed, kept_secret, nats_server, postgres
from local.settings import ROOT, SIMULATED_KEYS, LocalSettings, free_port, service_environment
from local.terminal import say, step
from services.admin.settings import TokenSettings
from services.admin.tokens import minted_token
from services.market_simulator.replay import ReplayFileError, read_replay
from services.market_simulator.settings import Settings as SimulatorSettings
from services.market_simulator.synthetic import SyntheticMarket
from shared import database as databases
from shared.clock import utc_now, wait_for_stop
from shared.database import Database, DatabaseUnavailable

SERVERS_CHECK_SECONDS = 0.5
RUNNING_FILE = "running.json"
TOKEN_LIFETIME = timedelta(days=30)
SERVICES = ("price_feeder", "snapshotter", "api_gateway")


@dataclass(frozen=True)
class Running:
    """Where the running system is; kept in `running.json` for the other commands."""

    url: str
    database_url: str
    nats_url: str
    health_urls: dict[str, str]
    simulated: bool


async def run(settings: LocalSettings, on_running: Callable[[Running, str], None]) -> None:
    """Run the system until SIGINT, SIGTERM or SIGHUP; raises StartFailed when a part of it fails."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    folder = settings.folder
    with preflight.sole_use(folder):
        preflight.check_settings(settings)
        preflight.check_room(folder)
        preflight.check_port(settings.gateway_host, settings.gateway_port)
        try:
            async with AsyncExitStack() as stack:
                running = await _start(settings, stack, stop)
                if running is None:
                    return
                (folder / RUNNING_FILE).write_text(json.dumps(asdict(running)))
                stack.callback((folder / RUNNING_FILE).unlink, missing_ok=True)
                on_running(running, token(folder, "demo"))
                await stop.wait()
                say("\nstopping …")
        except (ServerFailed, DatabaseUnavailable) as error:
            raise StartFailed(str(error)) from error
        except OSError as error:
            raise StartFailed(f"{error.strerror or error}: {error.filename or folder}") from error


def running_system(folder: Path) -> Running | None:
    """Return where the system on this folder is, or None when none runs."""
    try:
        with preflight.sole_use(folder):
            return None
    except StartFailed:
        pass
    try:
        return Running(**json.loads((folder / RUNNING_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def token(folder: Path, subject: str) -> str:
    """Return a bearer token for a user of the local system."""
    signing = TokenSettings.model_validate({"jwt_secret": kept_secret(folder / "jwt_secret")})
    return minted_token(signing, subject, now=utc_now(), lifetime=TOKEN_LIFETIME)


async def _start(settings: LocalSettings, stack: AsyncExitStack, stop: asyncio.Event) -> Running | None:
    """Start everything; return None when a stop was asked for on the way."""
    folder = settings.folder
    with step("PostgreSQL"):
        database_server = stack.enter_context(postgres(folder / "postgres"))
    with step("NATS"):
        nats = stack.enter_context(nats_server(folder / "nats"))
    await _prepare_database(settings, database_server.url)
    if stop.is_set():
        return None
    health_ports = {name: free_port() for name in SERVICES}
    running = Running(
        url=f"http://{settings.gateway_host}:{settings.gateway_port}",
        database_url=database_server.url,
        nats_url=nats.url,
        health_urls={name: f"http://127.0.0.1:{port}/readyz" for name, port in health_ports.items()},
        simulated=settings.simulated,
    )
    common = {
        "DATABASE_URL": database_server.url,
        "NATS_URL": nats.url,
        "JWT_SECRET": kept_secret(folder / "jwt_secret"),
        "HEALTH_HOST": "127.0.0.1",
        "GATEWAY_HOST": settings.gateway_host,
        "GATEWAY_PORT": str(settings.gateway_port),
        "GATEWAY_DRAIN_SECONDS": "0",  # there is no other one to go to
        "GATEWAY_PAGE_TOKEN": token(folder, "demo") if settings.page_signs_in else "",
    }
    (folder / "logs").mkdir(exist_ok=True)
    children: list[Child] = []

    async def start(name: str, own: dict[str, str]) -> None:
        child = Child(name, folder / "logs" / f"{name}.log")
        stack.push_async_callback(child.stop)
        await child.start(service_environment({**common, **own}))
        children.append(child)

    if settings.simulated:
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        common |= {**SIMULATED_KEYS, "ALPACA_DATA_URL": address, "ALPACA_BASE_URL": address}
        common["ALPACA_STREAM_URL"] = address.replace("http", "ws", 1)
        running.health_urls["market_simulator"] = f"{address}/healthz"
        await start("market_simulator", {"SIMULATOR_HOST": "127.0.0.1", "SIMULATOR_PORT": str(port)})
    await start("price_feeder", {"HEALTH_PORT": str(health_ports["price_feeder"])})
    await start("api_gateway", {"HEALTH_PORT": str(health_ports["api_gateway"])})
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:
        stack.enter_context(_watched(children, [database_server, nats], stop))
        with step("prices and gateway"):
            early = {name: url for name, url in running.health_urls.items() if name != "snapshotter"}
            await readiness.wait_for_services(session, early, stop)
            problem = await readiness.wait_for_prices(
                session, running.url, token(folder, "demo"), running.simulated, stop
            )
        # Prices first: else the first snapshot would be without them.
        with step("snapshotter"):
            await start("snapshotter", {"HEALTH_PORT": str(health_ports["snapshotter"])})
            stack.enter_context(_watched(children[-1:], [], stop))
            await readiness.wait_for_services(session, running.health_urls, stop)
    if problem and not stop.is_set():
        say(f"  {problem}; `make smoke` says more")
    for child in children:
        child.quiet = False
    return None if stop.is_set() else running


async def _prepare_database(settings: LocalSettings, url: str) -> None:
    async with databases.connect(url, application_name="local", connections_max=1) as database:
        if await database.check_schema():
            with step("tables"):
                done = subprocess.run(  # noqa: ASYNC221  # nothing else runs yet
                    [sys.executable, "-m", "alembic", "upgrade", "head"],
                    cwd=ROOT,
                    env=service_environment({"DATABASE_URL": url}),
                    capture_output=True,
                    text=True,
                    check=False,
                )
            if done.returncode != 0:
                lines = (done.stdout + done.stderr).strip().splitlines()
                raise StartFailed(f"the tables cannot be made: {lines[-1] if lines else 'no reason given'}")
        if not await database.fetch_value("SELECT EXISTS (SELECT FROM users)"):
            with step("demo portfolios and their history"):
                await _fill(settings, database)
        if settings.simulated:
            # It may be another market than the last time, or the same replay from its start: whatever it says is newer.
            await database.fetch("UPDATE asset_prices SET traded_at = 'epoch' WHERE feed = 'simulated'")


async def _fill(settings: LocalSettings, database: Database) -> None:
    if not settings.simulated:
        await demo.fill(database, utc_now(), history=None)
        return
    simulator = SimulatorSettings()
    if simulator.simulator_replay_file:
        try:
            recorded = read_replay(simulator.simulator_replay_file)
        except ReplayFileError as error:
            raise StartFailed(str(error)) from error
        await demo.fill(database, utc_now(), history=None, users=demo.users_of_replay(recorded.symbols))
    else:
        await demo.fill(database, utc_now(), history=SyntheticMarket(simulator.simulator_seed))


@contextmanager
def _watched(children: list[Child], servers: list[Server], stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` when one ends by itself, and raise StartFailed with the reason at the end of the block."""
    failures: list[str] = []

    def fail(reason: str) -> None:
        if not stop.is_set():
            failures.append(reason)
            stop.set()

    async def watch_over(child: Child) -> None:
        fail(await child.ended())

    async def watch_over_servers() -> None:
        while not stop.is_set():
            for reason in filter(None, (server.ended() for server in servers)):
                fail(reason)
            await wait_for_stop(stop, SERVERS_CHECK_SECONDS)

    tasks = [asyncio.create_task(watch_over(child)) for child in children]
    tasks.append(asyncio.create_task(watch_over_servers()))
    try:
        yield
    finally:
        for child in children:
            child.quiet = True
        for task in tasks:
            task.cancel()
    if failures:
        raise StartFailed(failures[0])
