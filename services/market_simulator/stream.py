"""One client's stream: what waits to be sent to it, and how it is sent, well or badly."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from services.market_simulator.instants import rfc3339
from services.market_simulator.misbehaviour import break_off
from services.market_simulator.questions import CRYPTO, Venue
from services.market_simulator.stream_faults import (
    Freeze,
    Lag,
    MalformedMessage,
    Mute,
    SlowDrip,
    StreamFaults,
)
from services.market_simulator.stream_messages import (
    MESSAGES_OF_A_FRAME_MAX,
    Format,
    error,
    success,
    written,
)
from services.market_simulator.subscriptions import Subscriptions
from services.market_simulator.wire import Json

_THAW_SECONDS = 0.05
_SLOW_CLIENT_SECONDS = 1.0
_CLOSE_SECONDS_MAX = 5.0
_GARBAGE: Mapping[Format, bytes] = {"msgpack": b"\xc1\x00garbage\xc1", "json": b'[{"T":"t","S":'}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where streams are opened; `symbols_max` bounds trades and quotes, `delay_ns` is how late its market is."""

    path: str
    venue: Venue
    feed: str
    symbols_max: int | None
    delay_ns: int


@dataclass(frozen=True, slots=True)
class _Frame:
    due_s: float
    payload: bytes
    messages: int
    close_code: int | None = None


@dataclass(slots=True, eq=False)
class Stream:
    """One client's connection: its subscription and what waits to be sent to it."""

    endpoint: Endpoint
    form: Format
    socket: web.WebSocketResponse
    transport: asyncio.Transport
    faults: StreamFaults
    queued_bytes_max: int
    client: str
    subscriptions: Subscriptions = field(init=False)
    account: str | None = None
    opened_ns: int = field(default_factory=time.time_ns)
    ending: bool = False
    messages_sent: int = 0
    frames_sent: int = 0
    bytes_sent: int = 0
    messages_lost: int = 0
    queued_bytes: int = 0
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    _queue: deque[_Frame] = field(default_factory=deque)
    _wakes: asyncio.Event = field(default_factory=asyncio.Event)
    _writes: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.subscriptions = Subscriptions(self.endpoint.venue)

    def wants(self, channel: str, symbol: str) -> bool:
        return ("/" in symbol) == (self.endpoint.venue is CRYPTO) and self.subscriptions.wants(
            channel, symbol
        )

    def say(self, message: Json) -> None:
        """Send a control message: alone in its frame."""
        self._put(written([message], self.form), 1)

    def refuse(self, code: int) -> None:
        """Send an error and close."""
        self.say(error(code))
        self.end()

    def send(self, messages: Sequence[Any]) -> None:
        """Send market data, unless a fault says that it is lost."""
        if not messages or self.ending:
            return
        now_s, path = time.monotonic(), self.endpoint.path
        if self.faults.standing(Mute, path, now_s) or self.faults.standing(Freeze, path, now_s):
            self.messages_lost += len(messages)
            return
        if malformed := self.faults.take(MalformedMessage, path, now_s):
            middle = len(messages) // 2
            messages = [*messages[:middle], malformed.message, *messages[middle:]]
        for start in range(0, len(messages), MESSAGES_OF_A_FRAME_MAX):
            part = messages[start : start + MESSAGES_OF_A_FRAME_MAX]
            self._put(written(part, self.form), len(part))

    def end(self, code: int = 1000) -> None:
        """Close after everything that waits; who does not take it is broken off in the end."""
        if not self.ending:
            last = self._put(b"", 0, close_code=code)
            self.ending = True
            self._break_off_later((last.due_s - time.monotonic() if last else 0.0) + _CLOSE_SECONDS_MAX)

    def drop(self, code: int | None) -> None:
        """Close at once with a code, or break the connection off without one."""
        if code is None:
            self.ending = True
            break_off(self.transport)
            return
        self._queue.clear()
        self.queued_bytes = 0
        self.end(code)

    def drop_later(self, seconds: float, code: int | None) -> None:
        self.timers.append(asyncio.get_running_loop().call_later(seconds, self.drop, code))

    def _break_off_later(self, seconds: float) -> None:
        self.timers.append(asyncio.get_running_loop().call_later(seconds, break_off, self.transport))

    def send_garbage(self) -> None:
        self._put(_GARBAGE[self.form], 0)

    def send_half_frame(self) -> None:
        """Send the begin of a frame and hang up, without a word about it."""
        frame = _raw_frame(written([success("half a frame")] * 20, self.form), self.form)
        self.transport.write(frame[: len(frame) // 2])
        self.ending = True
        self.transport.close()

    async def thawed(self) -> None:
        """Wait while a fault freezes this stream."""
        await thawed(self.faults, self.endpoint.path)

    async def pong(self, data: bytes) -> None:
        async with self._writes:
            with suppress(ConnectionResetError):  # the next thing heard is the end
                await self.socket.pong(data)

    async def write(self) -> None:
        """Send what waits, until the stream is closed or broken."""
        try:
            while True:
                while not self._queue:
                    self._wakes.clear()
                    await self._wakes.wait()
                wait_s = self._queue[0].due_s - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                    continue  # the queue may be another one by now
                await self.thawed()
                frame = self._queue.popleft()
                self.queued_bytes -= len(frame.payload)
                if frame.close_code is not None:
                    await self.socket.close(code=frame.close_code)
                    return
                await self._write(frame)
        except ConnectionResetError:
            return  # the reader hears of it too

    async def _write(self, frame: _Frame) -> None:
        drip = self.faults.standing(SlowDrip, self.endpoint.path, time.monotonic())
        async with self._writes:
            if drip is not None:
                whole = _raw_frame(frame.payload, self.form)
                for start in range(0, len(whole), drip.piece_bytes):
                    if self.transport.is_closing():
                        return
                    self.transport.write(whole[start : start + drip.piece_bytes])
                    await asyncio.sleep(drip.interval_seconds)
            elif self.form == "msgpack":
                await self.socket.send_bytes(frame.payload)
            else:
                await self.socket.send_str(frame.payload.decode())
        self.frames_sent += 1
        self.messages_sent += frame.messages
        self.bytes_sent += len(frame.payload)

    def _put(self, payload: bytes, messages: int, close_code: int | None = None) -> _Frame | None:
        if self.ending:
            return None
        lag = self.faults.standing(Lag, self.endpoint.path, time.monotonic())
        due_s = time.monotonic() + (lag.lag_seconds if lag else 0.0)
        if self.queued_bytes + len(payload) > self.queued_bytes_max:
            self._give_up()
            return None
        frame = _Frame(due_s, payload, messages, close_code)
        self._queue.append(frame)
        self.queued_bytes += len(payload)
        self._wakes.set()
        return frame

    def _give_up(self) -> None:
        """Tell a slow client so, if it reads fast enough for that, and hang up."""
        self._queue.clear()
        self.queued_bytes = 0
        now_s = time.monotonic()
        self._queue.extend((_Frame(now_s, written([error(407)], self.form), 1), _Frame(now_s, b"", 0, 1008)))
        self.ending = True
        self._wakes.set()
        self._break_off_later(_SLOW_CLIENT_SECONDS)

    def listed(self) -> Json:
        """Return what this stream is, for people."""
        return {
            "path": self.endpoint.path,
            "client": self.client,
            "format": self.form,
            "opened_at": rfc3339(self.opened_ns),
            "authenticated": self.account is not None,
            "subscriptions": {name: list(symbols) for name, symbols in self.subscriptions.channels.items()},
            "messages_sent": self.messages_sent,
            "frames_sent": self.frames_sent,
            "bytes_sent": self.bytes_sent,
            "messages_lost": self.messages_lost,
            "queued_bytes": self.queued_bytes,
        }


async def thawed(faults: StreamFaults, path: str) -> None:
    """Wait while a fault freezes the streams of a path."""
    while faults.standing(Freeze, path, time.monotonic()):  # noqa: ASYNC110 - it may end by its own time
        await asyncio.sleep(_THAW_SECONDS)


def _raw_frame(payload: bytes, form: Format) -> bytes:
    """Return a whole WebSocket frame as a server writes it, for faults that take it to pieces."""
    first = 0x82 if form == "msgpack" else 0x81
    length = len(payload)
    if length < 126:
        head = bytes((first, length))
    elif length < 65_536:
        head = bytes((first, 126)) + length.to_bytes(2, "big")
    else:
        head = bytes((first, 127)) + length.to_bytes(8, "big")
    return head + payload
