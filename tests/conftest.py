"""Servers once per test process; a database cloned from a migrated template and an empty bus for each test."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import hypothesis
import nats
import pytest

from shared import database as databases
from shared.bus import Bus
from shared.database import Database
from tests.servers import BACKENDS, Servers, chosen_backend, running
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent

# How long an example takes says something of the machine alone, which may stand still meanwhile. The short profile
# tries the same examples every time, so that a green suite stays green; `make fuzz` looks for new ones.
hypothesis.settings.register_profile("short", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("auto", *BACKENDS),
        default=os.environ.get("TEST_BACKEND", "auto"),
        help="where PostgreSQL and NATS come from; external reads TEST_DATABASE_URL and TEST_NATS_URL",
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"backend: {chosen_backend(config.getoption('backend'))}, shared material: {_shared_folder()}"


def pytest_configure(config: pytest.Config) -> None:
    workers = getattr(config.option, "numprocesses", None)
    if workers and chosen_backend(config.getoption("backend")) == "external":
        raise pytest.UsageError("the external backend is one server for all: run without -n")


def _shared_folder() -> Path:
    return (ROOT / os.environ.get("FOLIOTICK_SHARED", "../shared")).resolve()


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Recorded market data, Alpaca's OpenAPI and the Docker rig; not part of a user's clone."""
    folder = _shared_folder()
    if not (folder / "market-data").is_dir():
        pytest.skip(f"no recorded material at {folder} (set FOLIOTICK_SHARED)")
    return folder


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    backend = chosen_backend(request.config.getoption("backend"))
    with running(backend, tmp_path_factory.mktemp("servers")) as started:
        yield started


@pytest.fixture(scope="session")
def template_name(servers: Servers) -> Iterator[str]:
    """The name of a migrated, empty database, to be cloned."""
    name = f"foliotick_template_{os.getpid()}"
    asyncio.run(_administer(servers, f"CREATE DATABASE {name}"))
    environment = os.environ | {"DATABASE_URL": _with_database(servers, name)}
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    yield name
    asyncio.run(_administer(servers, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def database_url(servers: Servers, template_name: str) -> AsyncIterator[str]:
    """The URL of a migrated, empty database of the test's own."""
    name = f"foliotick_test_{os.getpid()}"
    await _administer(servers, f"CREATE DATABASE {name} TEMPLATE {template_name}")
    yield _with_database(servers, name)
    await _administer(servers, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    # A machine that does other things as well may stand still for some seconds.
    async with databases.connect(
        database_url, application_name="tests", connections_max=4, answer_seconds_max=20
    ) as connected:
        yield connected


@pytest.fixture
async def nats_url(servers: Servers) -> str:
    """The URL of a NATS server with JetStream on which no stream exists."""
    client = await nats.connect(servers.nats_url)
    js = client.jetstream()
    for stream in await js.streams_info():
        assert stream.config.name is not None
        await js.delete_stream(stream.config.name)
    await client.close()
    return servers.nats_url


@pytest.fixture
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    """A connected bus with the project's streams, all empty."""
    async with AsyncExitStack() as stack:
        connected = await stack.enter_async_context(Bus(nats_url, name="tests"))

        async def is_ready() -> bool:
            return await connected.check() is None

        await eventually(is_ready)
        yield connected


async def _administer(servers: Servers, statement: str) -> None:
    connection = await asyncpg.connect(servers.database_url, timeout=10)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def _with_database(servers: Servers, name: str) -> str:
    return urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
