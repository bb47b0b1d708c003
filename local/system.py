"""Start the whole system in order, watch it, and stop it in the reverse order."""

import asyncio
import fcntl
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import aiohttp

from local import demo
from local.children import Child
from local.servers import ServerFailed, kept_secret, nats_server, postgres
from local.settings import ROOT, LocalSettings, free_port, service_environment
from local.terminal import say, step
from services.admin.settings import TokenSettings
from services.admin.tokens import minted_token
from services.market_simulator.settings import Settings as SimulatorSettings
from services.market_simulator.synthetic import SyntheticMarket
from shared import database as databases
from shared.clock import utc_now, wait_for_stop
from shared.database import DatabaseUnavailable

DISK_MB_MIN = 300
READY_SECONDS_MAX = 60.0
REAL_PRICES_SECONDS_MAX = 15.0
TOKEN_LIFETIME = timedelta(days=30)
SERVICES = ("price_feeder", "snapshotter", "api_gateway")


class StartFailed(Exception):
    """The system could not be started, or a part of it has ended; the text is one line for a person."""


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
    with _sole_use(folder):
        _check_room(folder)
        _check_port(settings.gateway_host, settings.gateway_port)
        try:
            async with AsyncExitStack() as stack:
                running = await _start(settings, stack, stop)
                if running is None:
                    return
                (folder / "running.json").write_text(json.dumps(asdict(running)))
                stack.callback((folder / "running.json").unlink, missing_ok=True)
                on_running(running, token(folder, "demo"))
                await stop.wait()
                say("\nstopping …")
        except (ServerFailed, DatabaseUnavailable) as error:
            raise StartFailed(str(error)) from error
        except OSError as error:
            raise StartFailed(f"{error.strerror or error}: {error.filename or folder}") from error


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
        common |= {"ALPACA_API_KEY": "simulated", "ALPACA_SECRET_KEY": "simulated"}
        common |= {"ALPACA_DATA_URL": address, "ALPACA_BASE_URL": address}
        await start("market_simulator", {"SIMULATOR_HOST": "127.0.0.1", "SIMULATOR_PORT": str(port)})
        running.health_urls["market_simulator"] = f"{address}/healthz"
    for name, port in health_ports.items():
        await start(name, {"HEALTH_PORT": str(port)})

    stack.enter_context(_watched(children, stop))
    with step("services"):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:
            await _wait_until_right(session, running, token(folder, "demo"), stop)
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
        history = SyntheticMarket(SimulatorSettings().simulator_seed) if settings.simulated else None
        if not await database.fetch_value("SELECT EXISTS (SELECT FROM users)"):
            with step("demo portfolios and their history"):
                await demo.fill(database, utc_now(), history=history)


async def _wait_until_right(
    session: aiohttp.ClientSession, running: Running, demo_token: str, stop: asyncio.Event
) -> None:
    """Wait until every service is ready and the demo user's portfolio has fresh prices throughout."""
    deadline = time.monotonic() + READY_SECONDS_MAX
    # Real prices may be away for reasons that waiting does not mend (a wrong key): then start all the same.
    prices_deadline = time.monotonic() + (READY_SECONDS_MAX if running.simulated else REAL_PRICES_SECONDS_MAX)
    while not stop.is_set():
        problem = await _service_problem(session, running)
        prices_problem = problem or await _prices_problem(session, running, demo_token)
        if prices_problem is None:
            return
        if problem is None and time.monotonic() > prices_deadline and not running.simulated:
            say(f"  {prices_problem}: see the log of price_feeder, and `make smoke`")
            return
        if time.monotonic() > deadline:
            raise StartFailed(f"not ready after {READY_SECONDS_MAX:g} s: {prices_problem}")
        await wait_for_stop(stop, 0.1)


async def _service_problem(session: aiohttp.ClientSession, running: Running) -> str | None:
    for name, url in running.health_urls.items():
        try:
            async with session.get(url) as answer:
                if answer.status != 200:
                    return f"{name} is not ready: {await answer.text()}"
        except (aiohttp.ClientError, TimeoutError):
            return f"{name} does not answer"
    return None


async def _prices_problem(session: aiohttp.ClientSession, running: Running, demo_token: str) -> str | None:
    headers = {"Authorization": f"Bearer {demo_token}"}
    try:
        async with session.get(f"{running.url}/api/portfolio/current", headers=headers) as answer:
            body = await answer.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return "api_gateway does not answer"
    if answer.status == 404:  # the user demo has been removed on purpose
        return None
    if answer.status != 200:
        return f"/api/portfolio/current answers {answer.status}"
    return None if body["price_fresh"] and not body["unpriced"] else "prices are not all there"


@contextmanager
def _watched(children: list[Child], stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` when a child ends by itself, and raise StartFailed with the reason at the end of the block."""
    failures: list[str] = []

    async def watch_over(child: Child) -> None:
        reason = await child.ended()
        if not stop.is_set():
            failures.append(reason)
            stop.set()

    tasks = [asyncio.create_task(watch_over(child)) for child in children]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
    if failures:
        raise StartFailed(failures[0])


@contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; two systems on one folder would ruin it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StartFailed(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StartFailed(
                f"it runs already, on {folder} (LOCAL_DATA_DIR gives a second one its own folder)"
            ) from error
        yield


def _check_room(folder: Path) -> None:
    free_mb = shutil.disk_usage(folder).free // 1_000_000
    if free_mb < DISK_MB_MIN:
        raise StartFailed(f"the disk of {folder} has {free_mb} MB free, {DISK_MB_MIN} MB are needed")


def _check_port(host: str, port: int) -> None:
    with suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return
    raise StartFailed(f"port {port} of {host} is taken: GATEWAY_PORT=8001 make run")
