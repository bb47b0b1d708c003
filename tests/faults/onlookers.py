"""Clients that watch portfolios, in a process of their own, to be frozen: `python -m tests.faults.onlookers`.

The first line on stdin is `{"port": …, "requests": […]}`: each request opens a stream, by SSE or WebSocket. When all
are open that is said, and at the end of stdin the longest time that any of them has waited for something to read.
"""

import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass

CONNECT_SECONDS_MAX = 20.0
LOOK_SECONDS = 0.25
READ_BYTES = 256 * 1024


@dataclass
class _Client:
    socket: socket.socket
    heard_at: float


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    selector = selectors.DefaultSelector()
    clients = [_opened(asked["port"], request) for request in asked["requests"]]
    for client in clients:
        client.heard_at = time.monotonic()
        selector.register(client.socket, selectors.EVENT_READ, client)
    say(open=len(clients))
    selector.register(sys.stdin, selectors.EVENT_READ)
    longest = 0.0
    while True:
        for key, _ in selector.select(LOOK_SECONDS):
            if key.fileobj is sys.stdin:
                say(waited_seconds=longest)
                return
            if not key.data.socket.recv(READ_BYTES):
                raise ConnectionResetError("a stream was closed to one who reads")
            key.data.heard_at = time.monotonic()
        now = time.monotonic()
        longest = max(longest, *(now - client.heard_at for client in clients))


def _opened(port: int, request: str) -> _Client:
    connection = socket.create_connection(("127.0.0.1", port), timeout=CONNECT_SECONDS_MAX)
    connection.sendall(request.encode())
    head = connection.recv(READ_BYTES)
    assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 101")), head[:200]
    return _Client(connection, time.monotonic())


def say(**facts: object) -> None:
    sys.stdout.write(f"{json.dumps(facts)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
