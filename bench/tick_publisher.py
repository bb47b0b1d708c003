"""Publishes ticks with bare nats-py, in batches as the feeder does: `python -m bench.tick_publisher NATS_URL`.

Questions, one a line on stdin: `{"symbols": […], "batch": 500, "every_seconds": 0.25, "seconds": 9,
"first": 1, "acknowledged": false}`. A symbol's first tick has the sequence `first`, each further one the next number.
With `acknowledged` each tick is published to JetStream and waited for, all of a batch at once, and the time at which
the batch began stands in it, as `traded_at` and as `received_at`. Else it is handed to the server, which stores it
too, and the time is its own.
"""

import asyncio
import sys
import time
from datetime import UTC, datetime
from itertools import count, islice
from typing import Any

import nats
from nats.aio.client import Client

from bench.processes import answer_questions
from shared.messages import price_subject

WRITTEN_AT_ONCE = 32


async def publish(client: Client, question: dict[str, Any]) -> dict[str, object]:
    js = client.jetstream(timeout=10)
    symbols = [(symbol, price_subject(symbol)) for symbol in question["symbols"]]
    turns = (
        (symbol, subject, sequence) for sequence in count(question["first"]) for symbol, subject in symbols
    )
    every_seconds: float = question["every_seconds"]
    batches = round(question["seconds"] / every_seconds)
    used, began = time.process_time(), time.monotonic()
    late_seconds_max = 0.0
    for number in range(batches):
        due = began + number * every_seconds
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        late_seconds_max = max(late_seconds_max, time.monotonic() - due)
        batch, at = islice(turns, question["batch"]), datetime.now(UTC)
        if question["acknowledged"]:
            await asyncio.gather(
                *(js.publish(subject, _tick(symbol, sequence, at)) for symbol, subject, sequence in batch)
            )
        else:
            for place, (symbol, subject, sequence) in enumerate(batch):
                await client.publish(subject, _tick(symbol, sequence, datetime.now(UTC)))
                if place % WRITTEN_AT_ONCE == 0:  # what the library has gathered is written meanwhile
                    await asyncio.sleep(0)
            await client.flush()
    return {
        "cpu_seconds": time.process_time() - used,
        "seconds": time.monotonic() - began,
        "late_ms_max": late_seconds_max * 1000,
    }


def _tick(symbol: str, sequence: int, at: datetime) -> bytes:
    cents = 10_000 + (sequence * 7919 + len(symbol)) % 1000  # another price with every tick
    instant = at.isoformat().replace("+00:00", "Z")
    return (
        f'{{"symbol":"{symbol}","price":"{cents // 100}.{cents % 100:02}","traded_at":"{instant}",'
        f'"received_at":"{instant}","feed":"simulated","sequence":{sequence}}}'
    ).encode()


async def main(nats_url: str) -> None:
    client = await nats.connect(nats_url, pending_size=16 * 1024 * 1024)
    await answer_questions(lambda question: publish(client, question))
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
