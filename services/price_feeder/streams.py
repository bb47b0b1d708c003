"""Alpaca's trade streams: connections that heal for ever and follow the symbols that are wanted.

With `market_data` the only importer of alpaca. Its stream classes connect, authenticate and write the protocol; their
own loop is not used: it spins without symbols, only logs a refusal, retries a bad key for ever and does not notice a
socket that has gone mute. Here frames are read in the feeder's own event loop, and every error code has its answer.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgpack  # type: ignore[import-untyped]
from alpaca.data.enums import CryptoFeed, DataFeed
from alpaca.data.live.crypto import CryptoDataStream
from alpaca.data.live.stock import StockDataStream
from websockets.exceptions import WebSocketException
from websockets.legacy.exceptions import InvalidStatusCode

from services.price_feeder import metrics
from services.price_feeder.conflation import Conflation
from services.price_feeder.frames import TradingStatus, Withdrawal, hear, unpacked
from shared import logs
from shared.clock import Now
from shared.market_hours import SIMULATED
from shared.messages import AssetClass

SIMULATED_HEADER = "X-Market-Simulated"

HANDSHAKE_SECONDS_MAX = 10.0
ANSWER_SECONDS_MAX = 10.0
"""What a change of the subscription may take."""
CLOSE_SECONDS_MAX = 0.5
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 1.0, 30.0
OTHER_CONNECTION_PAUSE_SECONDS_MIN, OTHER_CONNECTION_PAUSE_SECONDS_MAX = 4.0, 60.0
"""While another connection has the account's place; one whose owner has died is reaped slowly."""
REFUSED_PAUSE_SECONDS = 300.0
HEALTHY_SECONDS = 30.0
"""A connection that lasted so long begins the next failures' pauses anew."""
REFUSED_SYMBOL_SECONDS = 600.0
REFUSED_SHOWN_MAX = 20
LIMIT_REMEMBERED_SECONDS = 3600.0
MISSED_ROUNDS_MAX, MISSING_SECONDS_MIN = 2, 3.0
"""So many rounds, over so long, may find trades while nothing at all is heard, before a stream counts as mute."""

WEBSOCKET = {
    "ping_interval": 5,
    "ping_timeout": 5,
    "open_timeout": 5,
    "close_timeout": CLOSE_SECONDS_MAX,
    "max_size": 1024 * 1024,
    "max_queue": 64,
    "compression": None,
}
"""A socket on which neither a frame nor a pong comes is given up after ten seconds; memory is bounded.

Unpacking would make reading a frame half as expensive again, and 5,000 trades a second are 600 KB.
"""

PATHS = {
    "iex": "/v2/iex",
    "sip": "/v2/sip",
    "delayed_sip": "/v2/delayed_sip",
    "otc": "/v2/otc",
    "boats": "/v1beta1/boats",
    "overnight": "/v1beta1/overnight",
}
CRYPTO_PATH = f"/v1beta3/crypto/{CryptoFeed.US.value}"
_WITH_STATUSES = frozenset({"iex", "sip", "delayed_sip"})

INVALID_SYNTAX, SYMBOL_LIMIT, CONNECTION_LIMIT, INVALID_ACTION = 400, 405, 406, 410
_ABOUT_THE_KEY = frozenset({401, 402, 403, 409})
_CODES = {
    "not authenticated": 401,
    "auth failed": 402,
    "auth timeout": 404,
    "connection limit exceeded": CONNECTION_LIMIT,
    "insufficient subscription": 409,
}

REFUSED_ADVICE = (
    "polling goes on; set the right key, and an ALPACA_FEED of the plan, or PRICE_STREAM_ENABLED=false"
)
LOST_ADVICE = {
    0: "nothing: it is made again by itself, and polling goes on meanwhile",
    CONNECTION_LIMIT: "another program streams with this key; stop it, or set PRICE_STREAM_ENABLED=false",
    SYMBOL_LIMIT: "the plan streams no more symbols; lower ALPACA_STREAM_SYMBOLS_MAX",
}
LIMITED_ADVICE = "nothing: the rest is polled; with a larger plan raise ALPACA_STREAM_SYMBOLS_MAX"

log = logs.get_logger()


class StreamError(Exception):
    """Alpaca has sent an error, or an HTTP status instead of a stream."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code


class StreamMute(Exception):
    """The stream says nothing though there are trades."""


_FAILURES = (StreamError, StreamMute, WebSocketException, OSError, TimeoutError, EOFError)
# What alpaca-py meets in a greeting that is not what it expects.
_NO_GREETING = (ValueError, TypeError, KeyError, IndexError, AttributeError)


class StreamState(StrEnum):
    OFF = "off"
    """Nothing is to be streamed."""
    CONNECTING = "connecting"
    SUBSCRIBED = "subscribed"
    REFUSED = "refused"
    """The key or the plan does not allow it; tried again now and then."""


class Connection(Protocol):
    """A connection to one endpoint."""

    simulated: bool

    async def open(self) -> None:
        """Connect and authenticate; raises one of many errors."""

    async def receive(self) -> bytes | str:
        """Return the next frame; raises ConnectionClosed when there are no more."""

    async def change(self, action: str, symbols: Sequence[str], *, statuses: bool) -> None:
        """Ask for `subscribe` or `unsubscribe`."""

    async def end(self) -> None:
        """Close it, soon."""


class _Handshake:
    """What is added to alpaca-py's stream classes: errors keep their codes, and frames are handed out unread."""

    _ws: Any
    _api_key: str
    _secret_key: str
    simulated = False

    async def open(self) -> None:
        try:
            await self._start_ws()  # type: ignore[attr-defined]  # alpaca-py's
        except InvalidStatusCode as error:
            raise StreamError(error.status_code, f"answered {error.status_code}") from error
        except _NO_GREETING as error:
            raise StreamError(500, "answered with something that is no greeting") from error
        self.simulated = self._ws.response_headers.get(SIMULATED_HEADER, "").strip().lower() == "true"

    async def _auth(self) -> None:
        key = {"action": "auth", "key": self._api_key, "secret": self._secret_key}
        await self._ws.send(msgpack.packb(key))
        messages, _ = unpacked(await self._ws.recv())
        answer = messages[0] if messages and isinstance(messages[0], dict) else {}
        if answer.get("T") == "error":
            raise _error(answer)
        if answer.get("msg") != "authenticated":
            raise StreamError(500, "the key was neither accepted nor refused")

    async def receive(self) -> bytes | str:
        frame: bytes | str = await self._ws.recv()
        return frame

    async def change(self, action: str, symbols: Sequence[str], *, statuses: bool) -> None:
        channels = {"trades": list(symbols), **({"statuses": list(symbols)} if statuses else {})}
        await self._ws.send(msgpack.packb({"action": action, **channels}))

    async def end(self) -> None:
        if self._ws is None:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await self._ws.close()
        except _FAILURES:
            if self._ws.transport is not None:
                self._ws.transport.abort()


class _Stocks(_Handshake, StockDataStream):
    pass


class _Crypto(_Handshake, CryptoDataStream):
    pass


def connections(
    url: str, feed: str, api_key: str, secret_key: str
) -> dict[AssetClass, Callable[[], Connection]]:
    """Return what makes a new connection for each class of symbols."""
    keys: dict[str, Any] = {"api_key": api_key, "secret_key": secret_key, "raw_data": True}

    def stocks() -> Connection:
        # The constructor knows two feeds alone; the URL decides.
        return _Stocks(
            **keys, feed=DataFeed.IEX, url_override=url + PATHS[feed], websocket_params=dict(WEBSOCKET)
        )

    def crypto() -> Connection:
        return _Crypto(**keys, url_override=url + CRYPTO_PATH, websocket_params=dict(WEBSOCKET))

    assert urlsplit(url).scheme in ("ws", "wss")
    return {AssetClass.EQUITY: stocks, AssetClass.CRYPTO: crypto}


@dataclass(frozen=True)
class Listener:
    """Who hears of what streams bring besides trades; every one is called in the event loop and returns at once."""

    arrived: Callable[[], None]
    """There are trades in the conflation."""
    withdrawn: Callable[[Withdrawal], None]
    subscribed: Callable[[Iterable[str]], None]
    """From now on these are heard; what they cost before has to be asked for."""
    changed: Callable[[], None]
    """The state or what is streamed has changed."""


class Stream:
    """One connection to one of Alpaca's endpoints, made again and again, subscribed to what `follow` asks for."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Connection],
        *,
        feed: str,
        symbols_max: int,
        conflation: Conflation,
        listener: Listener,
        now: Now,
    ) -> None:
        self.name = name
        self.state = StreamState.OFF
        self.problem: str | None = None
        self.subscribed: frozenset[str] = frozenset()
        self._connect = connect
        self._feed = feed
        self._label = feed
        self._symbols_max = symbols_max
        self._conflation = conflation
        self._listener = listener
        self._now = now
        self._wanted: tuple[str, ...] = ()
        self._steering_wanted = asyncio.Event()
        self._answer: asyncio.Future[int] | None = None
        self._asked_for: set[str] = set()
        self._with_statuses = feed in _WITH_STATUSES
        self._accepted_count = 0
        self._refused_count: int | None = None
        self._refused_count_until = 0.0
        self._limit = symbols_max
        self._batch_max = symbols_max
        self._refused_until: dict[str, float] = {}
        self._trades_heard = 0
        self._missed_rounds = 0
        self._missing_since = 0.0
        self._trades_heard_before = 0
        self._said: str | None = None
        self._has_said_malformed = False

    # ---- what is asked of it ---------------------------------------------------------------------

    def follow(self, symbols: Sequence[str]) -> None:
        """Stream these from now on, the first ones first if not all can be."""
        self._wanted = tuple(symbols)
        self._steering_wanted.set()

    @property
    def limit(self) -> int:
        """How many symbols this stream carries at most, as far as is known."""
        self._forget_limit()
        return self._limit

    @property
    def is_whole(self) -> bool:
        """Tell whether all that may be streamed is."""
        if self.state is StreamState.SUBSCRIBED:
            return self.subscribed == frozenset(self._target())
        return self.state is StreamState.OFF and not self._wanted

    def note_found(self, symbols: Iterable[str]) -> None:
        """Learn of which symbols a round has found trades that were not heard before."""
        heard = self._trades_heard != self._trades_heard_before
        self._trades_heard_before = self._trades_heard
        if heard:
            self._missed_rounds = 0
            return
        if self.subscribed.isdisjoint(symbols):
            return
        if not self._missed_rounds:
            self._missing_since = time.monotonic()
        self._missed_rounds += 1
        self._steering_wanted.set()

    @property
    def _is_mute(self) -> bool:
        """Tell whether nothing is heard for so long, and in so many rounds, that what was found would have come."""
        seconds = time.monotonic() - self._missing_since
        return self._missed_rounds >= MISSED_ROUNDS_MAX and seconds >= MISSING_SECONDS_MIN

    # ---- its life --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Stream until cancelled."""
        failures = 0
        while True:
            self._steering_wanted.clear()
            if not self._wanted:
                self._set_state(StreamState.OFF, None)
                failures = 0
                await self._steering_wanted.wait()
                continue
            if self.state is not StreamState.REFUSED:
                self._set_state(StreamState.CONNECTING, self.problem)
            began_at = time.monotonic()
            try:
                await self._live()
            except _FAILURES as error:
                failures = 0 if time.monotonic() - began_at >= HEALTHY_SECONDS else failures
                pause = self._fail(error, failures)
                failures += 1
                await asyncio.sleep(pause)

    async def _live(self) -> None:
        """Connect, subscribe and hear until nothing is wanted any more, or an error."""
        connection = self._connect()
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
                await connection.open()
            self._label = SIMULATED if connection.simulated else self._feed
            self._asked_for.clear()
            self._missed_rounds = 0
            working = {
                asyncio.create_task(self._hear(connection)),
                asyncio.create_task(self._steer(connection)),
            }
            try:
                done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in working:
                    task.cancel()
                await asyncio.wait(working)
            for task in done:
                task.result()
        finally:
            self._set_subscribed(frozenset())
            await connection.end()

    async def _hear(self, connection: Connection) -> None:
        counts = metrics.streamed_trades(self.name)
        conflation = self._conflation
        while True:
            frame = await connection.receive()
            now_ns = int(self._now().timestamp() * 1e9)
            heard = hear(frame, self.subscribed, self._label, conflation, now_ns=now_ns)
            self._trades_heard += heard.trades
            counts(heard)
            if heard.taken:
                self._listener.arrived()
            for control in heard.controls:
                self._take_control(control)
            for withdrawal in heard.withdrawals:
                self._listener.withdrawn(withdrawal)
            for status in heard.statuses:
                self._say_status(status)
            if heard.malformed:
                self._say_malformed(heard.malformed)

    def _take_control(self, message: dict[str, object]) -> None:
        waiting = self._answer if self._answer and not self._answer.done() else None
        if message["T"] == "subscription":
            trades = message.get("trades")
            named = filter(_is_text, trades) if isinstance(trades, list) else ()
            # A symbol that nobody has asked for has no place in the table, and may not even fit it.
            self._set_subscribed(frozenset(self._asked_for.intersection(named)))
            if waiting:
                waiting.set_result(0)
        elif message["T"] == "error":
            error = _error(message)
            if waiting and error.code in (INVALID_SYNTAX, SYMBOL_LIMIT, INVALID_ACTION):
                waiting.set_result(error.code)
            else:
                raise error

    async def _steer(self, connection: Connection) -> None:
        """Change the subscription until it is what is wanted, and again when something else is."""
        while self._wanted:
            self._steering_wanted.clear()
            if self._is_mute:
                raise StreamMute("polling finds trades that the stream does not bring")
            request = self._next_request()
            if request is None:
                await self._steering_wanted.wait()
                continue
            action, symbols = request
            if action == "subscribe":
                self._asked_for.update(symbols)
            self._answer = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                await connection.change(action, symbols, statuses=self._with_statuses)
                code = await self._answer
            self._learn(code, symbols)

    def _target(self) -> list[str]:
        at = time.monotonic()
        allowed = (symbol for symbol in self._wanted if self._refused_until.get(symbol, 0.0) <= at)
        return [symbol for symbol, _ in zip(allowed, range(self.limit), strict=False)]

    def _next_request(self) -> tuple[str, list[str]] | None:
        """Return the next change of the subscription; what is not wanted goes first, to make room."""
        target = self._target()
        superfluous = self.subscribed.difference(target)
        if superfluous:
            return "unsubscribe", sorted(superfluous)
        missing = [symbol for symbol in target if symbol not in self.subscribed]
        return ("subscribe", missing[: self._batch_max]) if missing else None

    def _learn(self, code: int, asked: Sequence[str]) -> None:
        """Draw the conclusion from an answer: 0, or the code of an error that left the subscription as it was."""
        if code in (SYMBOL_LIMIT, INVALID_ACTION) and self._with_statuses:
            self._with_statuses = False  # trades are worth more, and statuses may count as well
        elif code == SYMBOL_LIMIT:
            self._refused_count = len(self.subscribed) + len(asked)
            self._refused_count_until = time.monotonic() + LIMIT_REMEMBERED_SECONDS
        elif code == INVALID_SYNTAX and len(asked) > 1:
            self._batch_max = len(asked) // 2
        elif code:
            at = time.monotonic()
            still_refused = {symbol: until for symbol, until in self._refused_until.items() if until > at}
            self._refused_until = still_refused | dict.fromkeys(asked, at + REFUSED_SYMBOL_SECONDS)
            log.warning(
                "stream_symbols_refused",
                stream=self.name,
                count=len(asked),
                symbols=list(asked[:REFUSED_SHOWN_MAX]),
                code=code,
                advice="nothing: they are polled, and asked for again in ten minutes",
            )
        else:
            self._batch_max = min(self._batch_max * 2, self._symbols_max)
        if self._refused_count is not None:
            # Half way between what is accepted and what was refused, until they are neighbours.
            accepted = max(self._accepted_count, len(self.subscribed))
            self._accepted_count = accepted if accepted < self._refused_count else len(self.subscribed)
            self._limit = (self._accepted_count + self._refused_count) // 2
            if self._refused_count - self._accepted_count == 1:
                self._say("stream_symbols_limited", f"{self._limit} symbols are accepted", LIMITED_ADVICE)
            if self._limit == 0:
                raise StreamError(SYMBOL_LIMIT, "no symbol is accepted")

    def _forget_limit(self) -> None:
        if self._refused_count is not None and time.monotonic() > self._refused_count_until:
            self._refused_count, self._accepted_count, self._limit = None, 0, self._symbols_max

    # ---- failures, states, words -----------------------------------------------------------------

    def _fail(self, error: Exception, failures: int) -> float:
        """Say what has happened, and return how many seconds to wait before the next try."""
        code = error.code if isinstance(error, StreamError) else 0
        problem = (
            "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        )
        metrics.STREAM_FAILURES.labels(self.name, _label(code)).inc()
        if code in _ABOUT_THE_KEY:
            self._set_state(StreamState.REFUSED, problem)
            log.error("market_stream_refused", stream=self.name, problem=problem, advice=REFUSED_ADVICE)
            return REFUSED_PAUSE_SECONDS * random.uniform(0.9, 1.1)  # noqa: S311  # spreads, hides nothing
        self._set_state(StreamState.CONNECTING, problem)
        self._say("market_stream_lost", problem, LOST_ADVICE.get(code, LOST_ADVICE[0]))
        if code in (CONNECTION_LIMIT, SYMBOL_LIMIT, 429):
            return _pause(OTHER_CONNECTION_PAUSE_SECONDS_MIN, OTHER_CONNECTION_PAUSE_SECONDS_MAX, failures)
        return _pause(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX, failures)

    def _set_subscribed(self, symbols: frozenset[str]) -> None:
        before, self.subscribed = self.subscribed, symbols
        if symbols == before:
            return
        for symbol in before - symbols:
            self._conflation.forget(symbol)
        metrics.STREAMED_SYMBOLS.labels(self.name).set(len(symbols))
        if symbols:
            self._set_state(StreamState.SUBSCRIBED, None)
            log.info("stream_subscribed", stream=self.name, symbols=len(symbols), added=len(symbols - before))
        if symbols - before:
            self._listener.subscribed(symbols - before)
        if symbols and self.is_whole:  # half way through a change nothing is said
            self._listener.changed()

    def _set_state(self, state: StreamState, problem: str | None) -> None:
        self.problem = problem
        if state is not self.state:
            self.state = state
            for each in StreamState:
                metrics.STREAM_STATE.labels(self.name, each).set(each is state)
            if state is StreamState.SUBSCRIBED:
                self._said = None
                self._has_said_malformed = False
            self._listener.changed()

    def _say(self, event: str, problem: str, advice: str) -> None:
        """Warn once while it stays the same."""
        if self._said != f"{event} {problem}":
            log.warning(event, stream=self.name, problem=problem, advice=advice)
        self._said = f"{event} {problem}"

    def _say_malformed(self, count: int) -> None:
        """Say it of the first frame of a connection alone; the metric counts all."""
        if not self._has_said_malformed:
            self._has_said_malformed = True
            log.warning(
                "stream_message_malformed",
                stream=self.name,
                count=count,
                advice="nothing: the other messages count, and polling has those prices",
            )

    def _say_status(self, status: TradingStatus) -> None:
        metrics.TRADING_STATUSES.labels(status.kind).inc()
        log.info(
            "trading_status", symbol=status.symbol, kind=status.kind, code=status.code, message=status.message
        )


def _error(message: dict[Any, Any]) -> StreamError:
    code, text = message.get("code"), str(message.get("msg") or "error")[:200]
    return StreamError(code if isinstance(code, int) else _CODES.get(text, 500), text)


def _label(code: int) -> str:
    """Return what a metric calls the code of an error; a market cannot make up more series than there are codes."""
    if not code:
        return "connection"
    return str(code) if code in range(400, 600) else "other"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _pause(seconds_min: float, seconds_max: float, failures: int) -> float:
    """Return a random pause that is likely to be longer after every failure, so that many clients do not storm."""
    longest = min(seconds_min * 2 ** (min(failures, 16) + 1), seconds_max)
    return random.uniform(seconds_min, longest)  # noqa: S311  # spreads, hides nothing
