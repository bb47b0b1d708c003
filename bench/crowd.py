"""Clients that ask again as soon as they are answered, whatever the answer says: `python -m bench.crowd PORT …`.

One process and bare protocols, so that it takes little of the machine. A question on stdin, `{"path": …, "tokens": […],
"connections": 64, "seconds": 10}`, lets so many connections ask, the ports and the users in turn; all are closed in the
end.
"""

import asyncio
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from itertools import cycle
from typing import Any, cast

import uvloop

from bench.figures import percentile
from bench.processes import answer_questions

CONNECT_AT_ONCE_MAX = 64
CONNECT_SECONDS_MAX = 30.0
PART_SECONDS = 0.5
"""The answers of each such part of the time are counted by themselves as well."""

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class _Seen:
    """What all connections were answered."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.answers: Counter[int] = Counter()
        self.lost = 0
        self.ok_ms: list[float] = []
        self.refused_ms: list[float] = []
        self.parts: Counter[tuple[int, bool]] = Counter()
        self.parts_ms: dict[int, list[float]] = {}

    def answered(self, status: int, asked_at: float) -> None:
        now = time.monotonic()
        took_ms = (now - asked_at) * 1000
        is_ok, part = status == 200, int((now - self.began) / PART_SECONDS)
        self.answers[status] += 1
        self.parts[part, is_ok] += 1
        (self.ok_ms if is_ok else self.refused_ms).append(took_ms)
        if is_ok:
            self.parts_ms.setdefault(part, []).append(took_ms)

    def report(self, seconds: float, waiting_ms: float) -> dict[str, object]:
        """Return what was seen; `waiting_ms` is how long the one has waited that nobody has answered."""
        ok, parts = self.answers[200], max(int(seconds / PART_SECONDS), 1)
        return {
            "ok_per_second": ok / seconds,
            "refused_per_second": (self.answers.total() - ok) / seconds,
            "answers": dict(self.answers),
            "lost": self.lost,
            "waiting_ms": waiting_ms,
            "ok_ms": _percentiles(self.ok_ms),
            "refused_ms": _percentiles(self.refused_ms),
            "parts": [
                {
                    "ok": self.parts[part, True],
                    "refused": self.parts[part, False],
                    "ends_at": (part + 1) * PART_SECONDS,
                    "p99_ms": percentile(self.parts_ms[part], 0.99) if part in self.parts_ms else None,
                }
                for part in range(parts)
            ],
        }


class _Client(asyncio.Protocol):
    """One connection: asks, reads the answer to its end, and asks again."""

    def __init__(self, crowd: "_Crowd", requests: "deque[bytes]") -> None:
        self._crowd = crowd
        self._requests = requests
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self.asked_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self) -> None:
        assert self._transport is not None
        request = self._requests[0]
        self._requests.rotate(-1)
        self.asked_at = time.monotonic()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        head_end = received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        length = _LENGTH.search(received, 0, head_end + 2)
        if len(received) < head_end + 4 + (int(length[1]) if length else 0):
            return
        self._received = b""
        seen = self._crowd.seen
        if seen is not None:
            seen.answered(int(received[9:12]), self.asked_at)
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._crowd.seen is not None:
            self._crowd.seen.lost += 1

    def leave(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Crowd:
    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self.seen: _Seen | None = None

    async def answer(self, question: dict[str, Any]) -> dict[str, object]:
        """Let the connections ask for a while; return what they were answered."""
        kinds = [
            f"GET {question['path']} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
            for token in question["tokens"]
        ]
        requests = deque(kinds)
        clients = [_Client(self, requests) for _ in range(question["connections"])]
        loop = asyncio.get_running_loop()
        for start in range(0, len(clients), CONNECT_AT_ONCE_MAX):
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                await asyncio.gather(
                    *(
                        loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
                        for client, port in zip(
                            clients[start : start + CONNECT_AT_ONCE_MAX], cycle(self._ports), strict=False
                        )
                    )
                )
        began = time.monotonic()
        self.seen = seen = _Seen(began)
        for client in clients:
            client.ask()
        await asyncio.sleep(question["seconds"])
        self.seen = None
        ended = time.monotonic()
        for client in clients:
            client.leave()
        return seen.report(ended - began, (ended - min(client.asked_at for client in clients)) * 1000)


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}


if __name__ == "__main__":
    uvloop.run(answer_questions(_Crowd([int(port) for port in sys.argv[1:]]).answer))
