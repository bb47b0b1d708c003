"""The real-time streams that are open, and what they are sent: each turn's trades in one frame for each stream.

A turn looks at the market's clock and sends every trade since the turn before. Questions over HTTP take a turn first,
so what is answered as the latest trade has always been sent to whoever is subscribed to it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.market_simulator.access import KEY_HEADER, SECRET_HEADER, Credentials, Refused
from services.market_simulator.bars import Span, first_bars
from services.market_simulator.instants import MINUTE_NS
from services.market_simulator.load import Load
from services.market_simulator.market import Bar, Trade
from services.market_simulator.market_clock import MarketClock
from services.market_simulator.questions import CRYPTO
from services.market_simulator.stream import Stream
from services.market_simulator.stream_faults import (
    Drop,
    DropAfter,
    Garbage,
    HalfFrame,
    HeldConnection,
    Once,
    RefuseAuth,
    RefuseSubscribe,
    Standing,
    StreamError,
    StreamFaults,
    SymbolLimit,
)
from services.market_simulator.stream_messages import (
    Malformed,
    bar_message,
    error,
    load_messages,
    quote_message,
    read,
    success,
    trade_message,
)
from services.market_simulator.subscriptions import EVERY, Rejected
from services.market_simulator.tape import Tape
from services.market_simulator.timeframes import DAY
from services.market_simulator.wire import Json

STREAMS_MAX = 200
ATTEMPTS_MAX = 200
"""Attempts to connect that are remembered."""

_TURN_SECONDS = 0.02
_LOAD_TURN_SECONDS = 0.01
_TRADES_AT_ONCE_MAX = 10  # of a symbol in a turn; a fast replay leaves the older ones out
_MINUTES_AT_ONCE_MAX = 5
_NEVER_NS = 2**63 - 1

Event = tuple[str | None, str | None, Any]
"""Channel and symbol of something to send (None: every stream gets it), and a Trade, a Bar, or the whole message."""


@dataclass(slots=True)
class _Followed:
    """The symbols whose own trades streams of one delay want: how far they were sent and when the next is due."""

    until_ns: int
    due_ns: dict[str, int] = field(default_factory=dict)


class Streams:
    """Who is connected, and the task that sends them the market's trades."""

    def __init__(self, tape: Tape, clock: MarketClock, credentials: Credentials) -> None:
        self.faults = StreamFaults()
        self.open: dict[Stream, None] = {}
        self.attempts: deque[tuple[str, int]] = deque(maxlen=ATTEMPTS_MAX)
        """Path and time (ns) of each attempt to connect, refused ones among them: clients that storm are seen."""
        self.auth_seconds = 10.0
        self.queued_bytes_max = 16 * 1024 * 1024
        self._tape = tape
        self._clock = clock
        self._credentials = credentials
        self._accounts: dict[tuple[str, str], float] = {}  # path and account → until when the place is taken
        self._followed: dict[int, _Followed] = {}
        self._wakes = asyncio.Event()

    # ---- connections -----------------------------------------------------------------------------

    def enter(self, stream: Stream) -> None:
        self.open[stream] = None

    def leave(self, stream: Stream) -> None:
        """Forget a stream; its account may open the next one, unless a fault holds its place."""
        self.open.pop(stream, None)
        for timer in stream.timers:
            timer.cancel()
        if stream.account is not None:
            place = (stream.endpoint.path, stream.account)
            now_s = time.monotonic()
            if held := self.faults.standing(HeldConnection, stream.endpoint.path, now_s):
                self._accounts[place] = now_s + held.held_seconds
            else:
                del self._accounts[place]
        self._follow()

    def authenticate(self, stream: Stream, keys: Mapping[str, str]) -> None:
        """Answer an authentication by header or message."""
        if stream.account is not None:
            stream.say(error(403))
            return
        path, now_s = stream.endpoint.path, time.monotonic()
        if refusal := self.faults.take(RefuseAuth, path, now_s):
            stream.refuse(refusal.code)
            return
        try:
            self._credentials.check(keys, required=True)
        except Refused:
            stream.refuse(402)
            return
        self._accounts = {place: until_s for place, until_s in self._accounts.items() if until_s > now_s}
        place = (path, keys[KEY_HEADER])
        if place in self._accounts:
            stream.refuse(406)
            return
        self._accounts[place] = float("inf")
        stream.account = keys[KEY_HEADER]
        stream.say(success("authenticated"))
        if drop := self.faults.standing(DropAfter, path, now_s):
            stream.drop_later(drop.after_seconds, drop.code)

    def hear(self, stream: Stream, payload: bytes | str, *, binary: bool) -> None:
        """Answer what a client says."""
        try:
            said = read(payload, binary=binary)
        except Malformed:
            stream.say(error(400))
            return
        match said.get("action"):
            case "auth":
                key, secret = said.get("key"), said.get("secret")
                if isinstance(key, str) and isinstance(secret, str):
                    self.authenticate(stream, {KEY_HEADER: key, SECRET_HEADER: secret})
                else:
                    stream.say(error(400))
            case "subscribe" | "unsubscribe" if stream.account is None:
                stream.say(error(401))
            case "subscribe" | "unsubscribe":
                self._subscribe(stream, said)
            case _:
                stream.say(error(400))

    def _subscribe(self, stream: Stream, said: Json) -> None:
        path, now_s = stream.endpoint.path, time.monotonic()
        refusal = self.faults.take(RefuseSubscribe, path, now_s) if said["action"] == "subscribe" else None
        if refusal is not None:
            stream.say(error(refusal.code))
            return
        limit = self.faults.standing(SymbolLimit, path, now_s)
        try:
            stream.subscriptions.change(
                said, stream.endpoint.symbols_max if limit is None else limit.symbols_max
            )
        except Rejected as rejection:
            stream.say(error(rejection.code))
            return
        stream.say(stream.subscriptions.message())
        self.turn()
        self._follow()

    def close(self) -> None:
        """Send everybody away, because the server stops."""
        self.faults.clear()
        for stream in self.open:
            stream.drop(1001)

    # ---- faults ----------------------------------------------------------------------------------

    def order(self, fault: Once | Standing) -> None:
        """Do what happens once, or let a fault stand; raises OverflowError when too many do."""
        concerned = [one for one in self.open if one.endpoint.path.startswith(fault.path or "/")]
        match fault:
            case StreamError():
                for stream in concerned:
                    stream.refuse(fault.code) if fault.close else stream.say(error(fault.code))
            case Drop():
                for stream in concerned:
                    stream.drop_later(fault.after_seconds, fault.code)
            case Garbage() | HalfFrame():
                for stream in concerned:
                    stream.send_garbage() if isinstance(fault, Garbage) else stream.send_half_frame()
            case _:
                self.faults.add(fault, time.monotonic())
                if isinstance(fault, DropAfter):
                    for stream in concerned:
                        stream.drop_later(fault.after_seconds, fault.code)

    # ---- what is sent ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Take turns while anybody listens or a load runs."""
        while True:
            if not self._followed and self._tape.load is None:
                self._wakes.clear()
                await self._wakes.wait()
            self.turn()
            await asyncio.sleep(_TURN_SECONDS if self._tape.load is None else _LOAD_TURN_SECONDS)

    def turn(self) -> None:
        """Send every trade since the turn before."""
        if self._tape.load is not None:
            self._send_load(self._tape.load)
        if self._followed:
            now_ns = self._clock.now_ns()
            for delay_ns, followed in self._followed.items():
                streams = [one for one in self.open if one.endpoint.delay_ns == delay_ns]
                self._send_own(streams, followed, now_ns - delay_ns)

    def announce(self, trades: Iterable[tuple[str, Trade]]) -> None:
        """Send trades that are the latest from now on, in one frame."""
        self.publish([("trades", symbol, trade) for symbol, trade in trades])

    def announce_latest(self, symbols: Iterable[str]) -> None:
        """Send the trades that are the latest again, because what was newer has gone."""
        now_ns = self._clock.now_ns()
        found = ((symbol, self._tape.latest(symbol, now_ns)) for symbol in symbols)
        self.announce((symbol, trade) for symbol, trade in found if trade is not None)

    def clock_was_set(self) -> None:
        """Go on from another instant: what is the latest there is sent, what lies between is not."""
        for delay_ns, followed in self._followed.items():
            followed.until_ns = self._clock.now_ns() - delay_ns
            wanted = list(followed.due_ns)
            followed.due_ns = {symbol: self._next_ns(symbol, followed.until_ns) for symbol in wanted}
            self.announce_latest(symbol for symbol in wanted if self._tape.trades_by_itself(symbol))

    def set_load(self, load: Load | None) -> None:
        """Begin, replace or end a load; the symbols of one that ends trade by themselves again."""
        ended, self._tape.load = self._tape.load, load
        if ended is not None:
            self.announce_latest(
                symbol for symbol in ended.symbols if load is None or symbol not in load.positions
            )
        self._wakes.set()

    def publish(self, events: Sequence[Event], path: str = "/") -> int:
        """Send events to whoever wants them, those of a stream in one frame; return how many messages that were."""
        return sum(self._deliver(one, events) for one in self.open if one.endpoint.path.startswith(path))

    def _deliver(self, stream: Stream, events: Sequence[Event]) -> int:
        if stream.account is None:
            return 0
        messages = []
        venue, feed = stream.endpoint.venue, stream.endpoint.feed
        for channel, symbol, what in events:
            if channel is None or symbol is None:
                messages.append(what)
            elif isinstance(what, Trade):
                if stream.wants("trades", symbol):
                    messages.append(trade_message(venue, symbol, what, feed))
                if stream.wants("quotes", symbol):
                    messages.append(quote_message(venue, symbol, what, feed))
            elif stream.wants(channel, symbol):
                messages.append(
                    bar_message(venue, symbol, what, "d" if channel == "dailyBars" else "b")
                    if isinstance(what, Bar)
                    else what
                )
        stream.send(messages)
        return len(messages)

    def _send_load(self, load: Load) -> None:
        made = load.turn(time.time_ns())
        listening = [
            one for one in self.open if one.account is not None and one.subscriptions.channels["trades"]
        ]
        if not made or not listening:
            return
        pinned = self._tape.pins
        messages = load_messages([one for one in made if one[0] not in pinned])
        for stream in listening:
            wanted = stream.subscriptions.channels["trades"]
            crypto = stream.endpoint.venue is CRYPTO
            if EVERY in wanted:
                stream.send([one for one in messages if ("/" in one["S"]) == crypto])
            else:
                stream.send([one for one in messages if one["S"] in wanted])

    def _send_own(self, streams: Sequence[Stream], followed: _Followed, until_ns: int) -> None:
        after_ns = followed.until_ns
        if until_ns <= after_ns:
            return
        followed.until_ns = until_ns
        trades: list[tuple[str, Trade]] = []
        for symbol, due_ns in followed.due_ns.items():
            if due_ns > until_ns:
                continue
            if self._tape.trades_by_itself(symbol):
                own = self._tape.own_trades(symbol, after_ns, until_ns, _TRADES_AT_ONCE_MAX)
                trades.extend((symbol, trade) for trade in own)
            followed.due_ns[symbol] = self._next_ns(symbol, until_ns)
        trades.sort(key=lambda one: one[1].at_ns)
        events: list[Event] = [("trades", symbol, trade) for symbol, trade in trades]
        minute_ns = until_ns // MINUTE_NS * MINUTE_NS
        if minute_ns > after_ns // MINUTE_NS * MINUTE_NS:
            events.extend(
                self._bars(streams, max(after_ns, minute_ns - _MINUTES_AT_ONCE_MAX * MINUTE_NS), minute_ns)
            )
        if events:
            for stream in streams:
                self._deliver(stream, events)

    def _bars(self, streams: Sequence[Stream], after_ns: int, until_ns: int) -> list[Event]:
        """Return the bars of the minutes that ended, and of the day so far."""
        market = self._tape.market
        events: list[Event] = []
        minutes = range(after_ns // MINUTE_NS * MINUTE_NS, until_ns, MINUTE_NS)
        for symbol in self._wanted(streams, ("bars",)):
            for start_ns in minutes:
                if bar := market.bar(symbol, start_ns, start_ns + MINUTE_NS):
                    events.append(("bars", symbol, bar))
        for symbol in self._wanted(streams, ("dailyBars",)):
            zone = next(one.endpoint.venue.day_zone for one in streams if one.wants("dailyBars", symbol))
            span = Span(DAY, zone, 0, until_ns, until_ns, descending=True)
            events.extend(("dailyBars", symbol, bar) for bar in first_bars(market, symbol, span, 1))
        return events

    def _follow(self) -> None:
        """Follow the symbols that streams want now, each from where the others are."""
        delays = {one.endpoint.delay_ns for one in self.open if any(one.subscriptions.channels.values())}
        now_ns = self._clock.now_ns()
        followed = {}
        for delay_ns in delays:
            one = self._followed.get(delay_ns) or _Followed(now_ns - delay_ns)
            streams = [stream for stream in self.open if stream.endpoint.delay_ns == delay_ns]
            one.due_ns = {
                symbol: one.due_ns.get(symbol) or self._next_ns(symbol, one.until_ns)
                for symbol in self._wanted(streams, ("trades", "quotes"))
            }
            followed[delay_ns] = one
        self._followed = followed
        self._wakes.set()

    def _wanted(self, streams: Iterable[Stream], channels: Iterable[str]) -> list[str]:
        """Return the market's symbols that any of the streams wants on any of the channels."""
        named: set[str] = set()
        for stream in streams:
            for channel in channels:
                named.update(stream.subscriptions.channels.get(channel, ()))
        if EVERY in named:
            return [
                symbol
                for symbol in self._tape.market.symbols
                if any(stream.wants(channel, symbol) for stream in streams for channel in channels)
            ]
        return sorted(named)

    def _next_ns(self, symbol: str, after_ns: int) -> int:
        return self._tape.market.next_trade_ns(symbol, after_ns) or _NEVER_NS
