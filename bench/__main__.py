"""`python -m bench`: measure, print one table."""

import asyncio
import sys
import tempfile
from pathlib import Path

from bench import gateway, snapshots
from bench.data import USERS, prepared
from bench.figures import Figure, table
from local.servers import nats_server, postgres
from shared import logs


async def measure(database_url: str, nats_url: str) -> list[Figure]:
    print(f"filling {USERS:,} users with 10 positions each …", flush=True)
    await prepared(database_url)
    print("snapshots …", flush=True)
    figures = await snapshots.measure(database_url)
    print("gateway …", flush=True)
    return figures + await gateway.measure(database_url, nats_url)


def main() -> int:
    logs.configure("bench", "ERROR")
    with (
        tempfile.TemporaryDirectory(prefix="foliotick-bench-", ignore_cleanup_errors=True) as folder,
        postgres(Path(folder) / "postgres") as database,
        nats_server(Path(folder) / "nats") as nats,
    ):
        figures = asyncio.run(measure(database.url, nats.url))
    print(table(figures))
    return 0 if all(figure.reached for figure in figures) else 1


sys.exit(main())
