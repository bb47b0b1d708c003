"""A snapshotter replica without its timer: `python -m bench.replica URL SHARD SHARDS`, a question a line on stdin.

`{"slot": …}` takes the shard's snapshots of the slot, `{"memory": …}` tells the most memory that was ever resident.
"""

import asyncio
import json
import re
import sys
from datetime import datetime
from pathlib import Path

from services.snapshotter import queries
from shared import database as databases


async def answer_questions(url: str, shard: int, shards: int) -> None:
    async with databases.connect(
        url,
        application_name="snapshotter",
        connections_max=4,
        statement_timeout_seconds=150.0,
        server_settings=queries.SERVER_SETTINGS,
    ) as database:
        while line := await asyncio.to_thread(sys.stdin.readline):
            question = json.loads(line)
            if "slot" in question:
                slot = datetime.fromisoformat(question["slot"])
                taken = await queries.take_snapshots(database, slot, shard, shards)
                answer: dict[str, float] = {"added": taken.added}
            else:
                answer = {"memory_mb": _memory_mb_max()}
            print(json.dumps(answer), flush=True)


def _memory_mb_max() -> float:
    """Return the most that was resident; the kernel's `ru_maxrss` would count the process that started this one."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    asyncio.run(answer_questions(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
