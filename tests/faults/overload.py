"""More requests than gateways can answer, from a process of its own: `python -m tests.faults.overload`.

Each line on stdin orders a load: `{"ports": […], "tokens": […], "connections": 500, "per_second": 4000, "seconds": 9}`.
A connection sends its next request when its turn has come and its last one is answered; without a rate, at once. The
answer is a line with what came of it; latencies are in seconds.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from bench.figures import percentile

REQUEST_SECONDS_MAX = 15.0
CONNECT_AGAIN_SECONDS = 0.2
CONNECT_SECONDS = 3.0
"""All connect within so long: the system's queue is shorter than the crowd."""
_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = b"content-length:"


class _Results:
    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.accepted: list[float] = []
        self.refused: list[float] = []

    def forget(self) -> None:
        """Begin to count; what was found broken stays."""
        for found in (self.accepted, self.refused):
            found.clear()

    def add(self, status: int, seconds: float) -> None:
        self.statuses[str(status)] += 1
        (self.accepted if status == 200 else self.refused).append(seconds)

    def told(self, seconds: float) -> dict[str, Any]:
        return {
            "statuses": dict(self.statuses),
            "accepted_per_second": len(self.accepted) / seconds,
            "answered_per_second": (len(self.accepted) + len(self.refused)) / seconds,
            "accepted_p99": _percentile(self.accepted, 0.99),
            "refused_p50": _percentile(self.refused, 0.50),
            "refused_p99": _percentile(self.refused, 0.99),
        }


class _Connection(asyncio.Protocol):
    """Sends one request after the other until the load is over."""

    def __init__(self, requests: Sequence[bytes], every_seconds: float, results: _Results) -> None:
        self.gone = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._every_seconds = every_seconds
        self._results = results
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._asked_at: float | None = None
        self._due_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self._due_at = loop.time() + random.random() * self._every_seconds
        self._timer = loop.call_at(self._due_at, self._ask)

    def _ask(self) -> None:
        assert self._transport is not None
        self._asked_at = time.monotonic()
        self._transport.write(random.choice(self._requests))
        self._timer = asyncio.get_running_loop().call_later(REQUEST_SECONDS_MAX, self._give_up)

    def _give_up(self) -> None:
        assert self._transport is not None
        self._results.statuses["unanswered"] += 1
        self._asked_at = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(_END_OF_HEAD)
        if end < 0:
            return
        head = self._received[:end].lower()
        at = head.find(_LENGTH) + len(_LENGTH)
        length = int(head[at : (head.find(b"\r", at) + 1 or end + 1) - 1])
        if len(self._received) < end + len(_END_OF_HEAD) + length:
            return
        assert self._asked_at is not None
        assert self._timer is not None
        self._results.add(int(head[9:12]), time.monotonic() - self._asked_at)
        self._received, self._asked_at = b"", None
        self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._due_at = max(self._due_at + self._every_seconds, loop.time())
        self._timer = loop.call_at(self._due_at, self._ask)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._asked_at is not None:
            self._results.statuses[f"broken: {exc or 'closed'}"] += 1
        if not self.gone.done():
            self.gone.set_result(None)

    def end(self) -> None:
        self._asked_at = None
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()


async def load(order: dict[str, Any]) -> dict[str, Any]:
    """Send a load, and return what came of it."""
    requests = [
        f"GET /api/portfolio/current HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        for token in order["tokens"]
    ]
    rate = order.get("per_second")
    every_seconds = order["connections"] / rate if rate else 0.0
    results = _Results()

    async def keep_asking(port: int, after_seconds: float) -> None:
        await asyncio.sleep(after_seconds)
        while True:
            try:
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(requests, every_seconds, results), "127.0.0.1", port
                )
            except OSError:
                results.statuses["not connected"] += 1
            else:
                try:
                    await connection.gone
                finally:
                    connection.end()
            await asyncio.sleep(CONNECT_AGAIN_SECONDS)

    ports = order["ports"]
    asking = [
        asyncio.create_task(keep_asking(ports[number % len(ports)], random.random() * CONNECT_SECONDS))
        for number in range(order["connections"])
    ]
    await asyncio.sleep(CONNECT_SECONDS)
    results.forget()
    began = time.monotonic()
    await asyncio.sleep(order["seconds"])
    seconds = time.monotonic() - began
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return results.told(seconds)


def _percentile(values: list[float], share: float) -> float:
    return percentile(values, share) if values else 0.0


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(f"{json.dumps(asyncio.run(load(json.loads(line))))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
