"""A subscriber that does not read, on a server with the project's configuration: it hurts nobody but itself."""

import asyncio
import json
import socket
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nats
from nats.aio.msg import Msg
from nats.js.api import DeliverPolicy

from local.servers import nats_server
from shared.bus import Bus, Outgoing
from shared.messages import ALL_PRICES, PriceTick, price_subject
from tests.waiting import eventually, settled

AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
SYMBOLS = [f"S{number}" for number in range(500)]
ROUNDS_MAX = 1000
BATCH_SECONDS_MAX = 4.0
"""A batch of 500 takes a fifteenth of a second; publishing that waited for the slow one would take five."""


def ticks(sequence: int) -> list[Outgoing]:
    return [
        Outgoing(
            price_subject(symbol),
            PriceTick(
                symbol=symbol,
                price=Decimal(sequence),
                traded_at=AT,
                received_at=AT,
                feed="iex",
                sequence=sequence,
            ),
        )
        for symbol in SYMBOLS
    ]


class Deaf:
    """A connection that subscribes to all prices and reads none."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        login = {"user": unquote(parts.username or ""), "pass": unquote(parts.password or "")}
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((parts.hostname or "", parts.port or 0))
        connect = json.dumps(login | {"verbose": False, "headers": True, "name": "deaf"})
        self.socket.sendall(f"CONNECT {connect}\r\nSUB {ALL_PRICES} 1\r\nPING\r\n".encode())
        said = b""
        while b"PONG" not in said:
            said += self.socket.recv(4096)

    def is_cut_off(self) -> bool:
        """Read, at last, and tell whether the server has ended the connection."""
        self.socket.settimeout(5)
        try:
            while self.socket.recv(1 << 20):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True


async def test_a_subscriber_that_does_not_read_is_cut_off_and_hurts_nobody_else(tmp_path: Path) -> None:
    heard: dict[str, int] = {}
    gaps = []

    async def hear(message: Msg) -> None:
        tick = PriceTick.model_validate_json(message.data)
        if tick.sequence != heard.get(tick.symbol, 0) + 1:
            gaps.append(tick)
        heard[tick.symbol] = tick.sequence

    with nats_server(tmp_path / "nats") as server:
        async with Bus(server.url, name="price_feeder") as bus:
            assert await bus.wait_until_ready(asyncio.Event())
            other = await nats.connect(server.url)
            await other.subscribe(ALL_PRICES, cb=hear)
            await settled(other)
            deaf = Deaf(server.url)
            slowest, sequence = 0.0, 0
            while "Slow Consumer" not in server.log.read_text():
                sequence += 1
                assert sequence < ROUNDS_MAX, "the server has not cut it off"
                started = time.monotonic()
                assert await bus.publish_all(ticks(sequence)) == []
                slowest = max(slowest, time.monotonic() - started)
            assert slowest < BATCH_SECONDS_MAX

            async def is_all_heard() -> bool:
                return len(heard) == len(SYMBOLS) and set(heard.values()) == {sequence}

            await eventually(is_all_heard)
            assert not gaps
            assert deaf.is_cut_off()
            deaf.socket.close()

            # Back again, it is told every last value at once.
            back = await nats.connect(server.url)
            prices = await back.jetstream().subscribe(
                ALL_PRICES, ordered_consumer=True, deliver_policy=DeliverPolicy.LAST_PER_SUBJECT
            )
            last = [PriceTick.model_validate_json((await prices.next_msg(5)).data) for _ in SYMBOLS]
            assert {tick.symbol for tick in last} == set(SYMBOLS)
            assert {tick.sequence for tick in last} == {sequence}
            await back.close()
            await other.close()
