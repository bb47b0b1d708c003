"""Publishes ticks with bare nats-py, in batches as the feeder does: `python -m bench.tick_publisher NATS_URL`.

Questions, one a line on stdin: `{"symbols": […], "batch": 500, "every_seconds": 0.25, "seconds": 9,
"acknowledged": false}`.
The time at which a batch begins stands in its ticks, as `traded_at` and as `received_at`. With `acknowledged` each
is published to JetStream and waited for, all of a batch at once; else it is handed to the server, which stores it too.
"""

import asyncio
import sys
import time
from datetime import UTC, datetime
from itertools import cycle, islice
from typing import Any

import nats
from nats.aio.client import Client

from bench.processes import answer_questions
from shared.messages import price_subject


async def publish(client: Client, question: dict[str, Any]) -> dict[str, object]:
    js = client.jetstream(timeout=10)
    symbols = cycle([(symbol, price_subject(symbol)) for symbol in question["symbols"]])
    every_seconds: float = question["every_seconds"]
    batches = round(question["seconds"] / every_seconds)
    used, began = time.process_time(), time.monotonic()
    late_seconds_max = 0.0
    for number in range(batches):
        due = began + number * every_seconds
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        late_seconds_max = max(late_seconds_max, time.monotonic() - due)
        at = datetime.now(UTC)
        # Numbers with gaps, but greater than those of every batch before, of whatever publisher.
        sequence = int(at.timestamp() * 1000)
        ticks = [
            (subject, _tick(symbol, at, sequence)) for symbol, subject in islice(symbols, question["batch"])
        ]
        if question["acknowledged"]:
            await asyncio.gather(*(js.publish(subject, payload) for subject, payload in ticks))
        else:
            for subject, payload in ticks:
                await client.publish(subject, payload)
            await client.flush()
    return {
        "cpu_seconds": time.process_time() - used,
        "seconds": time.monotonic() - began,
        "late_ms_max": late_seconds_max * 1000,
    }


def _tick(symbol: str, at: datetime, sequence: int) -> bytes:
    cents = 10_000 + (sequence // 250 * 7919 + len(symbol)) % 1000
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
