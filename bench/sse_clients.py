"""Clients of a stream of Server-Sent Events, cheap ones: `python -m bench.sse_clients PORT`.

One process and bare sockets, because the server that is measured has the other core. Questions, one a line on stdin:
`{"do": "connect", "path": …, "tokens": […]}` connects a client for each token, `{"do": "count", "seconds": 20}` counts
events, `{"do": "listen", "seconds": 20}` reads them, `{"do": "leave"}` closes all connections.
"""

import json
import os
import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from bench.figures import middle, percentile

_READ_BYTES = 256 * 1024
_EVENT = b"event: change"
_END_OF_EVENT = b"\n\n"
_TRADED_AT = re.compile(rb'"price_as_of":"([^"]+)"')
_LEFT_OPEN = len(_EVENT) - 1


@dataclass(slots=True)
class _Client:
    socket: socket.socket
    tail: bytes = b""
    """The end of what was read, which may be the beginning of an event's name."""
    events: int = 0
    size: int = 0
    """Bytes that were read."""
    chunks: list[tuple[int, bytes]] = field(default_factory=list)


class Clients:
    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._clients: list[_Client] = []
        self._keeping = False
        self._question = b""
        os.set_blocking(sys.stdin.fileno(), False)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def answer_questions(self) -> None:
        """Read from all clients for ever, and answer what is asked on stdin until that ends."""
        while (question := self._pump(None)) is not None:
            print(json.dumps(self._answer(question)), flush=True)

    def _answer(self, question: dict[str, Any]) -> dict[str, object]:
        if question["do"] == "connect":
            for token in question["tokens"]:
                self._connect(question["path"], token)
            return {}
        if question["do"] == "leave":
            for client in self._clients:
                self._selector.unregister(client.socket)
                client.socket.close()
            self._clients.clear()
            return {}
        for client in self._clients:
            client.events = client.size = 0
            client.chunks.clear()
        self._keeping = question["do"] == "listen"
        began, began_us = time.monotonic(), time.time_ns() // 1000
        self._pump(began + question["seconds"])
        seconds = time.monotonic() - began
        counts = [client.events / seconds for client in self._clients]
        answer: dict[str, object] = {
            "events_per_second": {"min": min(counts), "median": middle(counts), "max": max(counts)},
            "bytes_per_event": sum(client.size for client in self._clients)
            / max(sum(client.events for client in self._clients), 1),
        }
        return answer | (self._latencies(began_us) if self._keeping else {})

    def _latencies(self, began_us: int) -> dict[str, object]:
        """Return how old each new trade of each event was when the event was read to its end, in milliseconds."""
        found: list[float] = []
        for client in self._clients:
            rest = b""
            for at_us, chunk in client.chunks:
                *whole, rest = (rest + chunk).split(_END_OF_EVENT)
                for event in whole:
                    if _EVENT in event:
                        traded = map(_microseconds, _TRADED_AT.findall(event))
                        found += [(at_us - traded_us) / 1000 for traded_us in traded if traded_us >= began_us]
        assert found, (
            f"{len(self._clients)} clients have read {sum(client.events for client in self._clients)} events, "
            "and in none a trade of this time: does the gateway hear the ticks, and believe them?"
        )
        return {"seen": len(found), "p50": percentile(found, 0.50), "p99": percentile(found, 0.99)}

    def _connect(self, path: str, token: str) -> None:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n"
        connection.sendall(head.encode())
        first = connection.recv(_READ_BYTES)
        assert first.startswith(b"HTTP/1.1 200"), first
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _pump(self, until: float | None) -> dict[str, Any] | None:
        """Read until a time, or until a question comes; return that, None at the end of questions or of the time."""
        while until is None or time.monotonic() < until:
            for key, _ in self._selector.select(None if until is None else max(until - time.monotonic(), 0)):
                if isinstance(key.data, _Client):
                    self._read(key.data)
                    continue
                read = os.read(sys.stdin.fileno(), _READ_BYTES)
                if not read:
                    return None
                self._question += read
                if self._question.endswith(b"\n"):
                    question, self._question = json.loads(self._question), b""
                    assert isinstance(question, dict)
                    return question
        return None

    def _read(self, client: _Client) -> None:
        data = client.socket.recv(_READ_BYTES)
        assert data, "the server has closed a stream"
        if self._keeping:
            client.chunks.append((time.time_ns() // 1000, data))
        client.size += len(data)
        client.events += (client.tail + data).count(_EVENT)
        client.tail = data[-_LEFT_OPEN:]


def _microseconds(instant: bytes) -> int:
    at = datetime.fromisoformat(instant.decode())
    return int(at.replace(microsecond=0).timestamp()) * 1_000_000 + at.microsecond


if __name__ == "__main__":
    Clients(int(sys.argv[1])).answer_questions()
