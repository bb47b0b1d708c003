"""The streams of all classes, one conflation, and what is done with what they bring."""

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

from services.price_feeder import metrics
from services.price_feeder.conflation import Conflation, StreamedTrade
from services.price_feeder.frames import Withdrawal
from services.price_feeder.streams import Connection, Listener, Stream, StreamState
from shared import clock
from shared.clock import Now
from shared.messages import AssetClass

WITHDRAWALS_MAX = 1000
UNSTORED_PAUSE_SECONDS = 1.0


class Sink(Protocol):
    """Who stores and publishes what streams bring."""

    async def store_streamed(self, batch: Mapping[str, StreamedTrade]) -> bool:
        """Store a batch, and let it be published; return False when it could not be stored and may be later."""

    async def withdraw(self, withdrawals: Sequence[Withdrawal]) -> Collection[str] | None:
        """Let none of these trades stay as a price; return what to ask for instead, None when that may work later."""

    async def fill_gap(self, symbols: Iterable[str]) -> None:
        """Ask for what happened before these symbols were heard."""

    def note_streams(self) -> None:
        """Learn that what is streamed has changed."""


class Streaming:
    """What is streamed, and the work that comes of it while `run` runs."""

    def __init__(
        self,
        connections: Mapping[AssetClass, Callable[[], Connection]],
        *,
        feed: str,
        symbols_max: int,
        now: Now = clock.utc_now,
    ) -> None:
        self.symbols_max = symbols_max
        self.conflation = Conflation()
        self._sink: Sink | None = None
        self._arrived = asyncio.Event()
        self._gap = _Wanted()
        self._instead = _Wanted()
        self._withdrawn = asyncio.Event()
        self._withdrawals: list[Withdrawal] = []
        listener = Listener(
            arrived=self._arrived.set,
            withdrawn=self._note_withdrawal,
            subscribed=self._gap.add,
            changed=self._note_change,
        )
        self._streams = {
            kind: Stream(
                kind.value,
                connect,
                feed=feed if kind is AssetClass.EQUITY else "us",
                symbols_max=symbols_max,
                conflation=self.conflation,
                listener=listener,
                now=now,
            )
            for kind, connect in connections.items()
        }

    @property
    def streamed(self) -> frozenset[str]:
        """The symbols whose trades are heard."""
        return frozenset[str]().union(*(stream.subscribed for stream in self._streams.values()))

    @property
    def is_whole(self) -> bool:
        """Tell whether every symbol that may be streamed is."""
        return all(stream.is_whole for stream in self._streams.values())

    @property
    def states(self) -> dict[str, str]:
        """The state of each stream, with its problem, in words."""
        return {
            stream.name: f"{stream.state}: {stream.problem}" if stream.problem else str(stream.state)
            for stream in self._streams.values()
            if stream.state is not StreamState.OFF
        }

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong with each stream that has a problem, with its state, in words."""
        return {
            stream.name: f"{stream.state}: {stream.problem}"
            for stream in self._streams.values()
            if stream.problem
        }

    def follow(self, selection: Mapping[AssetClass, Sequence[str]]) -> None:
        """Stream these symbols from now on."""
        for kind, stream in self._streams.items():
            stream.follow(selection.get(kind, ()))
            metrics.STREAM_SYMBOLS_MAX.labels(stream.name).set(stream.limit)

    def note_found(self, symbols: Iterable[str]) -> None:
        """Learn of which symbols a round has found trades that the streams had not brought."""
        found = frozenset(symbols)
        for stream in self._streams.values():
            stream.note_found(found)

    async def run(self, sink: Sink) -> None:
        """Stream until cancelled; the connections are closed then."""
        self._sink = sink
        try:
            async with asyncio.TaskGroup() as tasks:
                work: list[Coroutine[Any, Any, None]] = [stream.run() for stream in self._streams.values()]
                work += [self._flush(sink), self._withdraw(sink)]
                work += [wanted.ask(sink) for wanted in (self._gap, self._instead)]
                for each in work:
                    tasks.create_task(each)
        finally:
            self._sink = None

    async def _flush(self, sink: Sink) -> None:
        """Hand out what is in the conflation, whenever some of it is due."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while (wait_seconds := self.conflation.wait_seconds(time.monotonic())) is not None:
                if wait_seconds:
                    await asyncio.sleep(wait_seconds)
                batch = self.conflation.batch(time.monotonic())
                if not batch:  # a window is over in which nothing came
                    continue
                metrics.FLUSHED_TRADES.inc(len(batch))
                if not await sink.store_streamed(batch):
                    self.conflation.take_back(batch)
                    await asyncio.sleep(UNSTORED_PAUSE_SECONDS)

    async def _withdraw(self, sink: Sink) -> None:
        """Hand on withdrawals, whatever is asked for meanwhile, until they are seen to."""
        while True:
            await self._withdrawn.wait()
            self._withdrawn.clear()
            withdrawals, self._withdrawals = self._withdrawals, []
            to_ask = await sink.withdraw(withdrawals)
            if to_ask is None:
                self._withdrawals = [*withdrawals, *self._withdrawals][:WITHDRAWALS_MAX]
                await asyncio.sleep(UNSTORED_PAUSE_SECONDS)
                self._withdrawn.set()
            else:
                self._instead.add(to_ask)

    def _note_withdrawal(self, withdrawal: Withdrawal) -> None:
        if len(self._withdrawals) < WITHDRAWALS_MAX:
            self._withdrawals.append(withdrawal)
            self._withdrawn.set()

    def _note_change(self) -> None:
        if self._sink is not None:
            self._sink.note_streams()


class _Wanted:
    """What a stream cannot tell, and is to be asked for: trades before a subscription, or instead of withdrawn ones."""

    def __init__(self) -> None:
        self._symbols: set[str] = set()
        self._added = asyncio.Event()

    def add(self, symbols: Iterable[str]) -> None:
        self._symbols.update(symbols)
        self._added.set()

    async def ask(self, sink: Sink) -> None:
        """Ask until cancelled, for all at once that has been added."""
        while True:
            await self._added.wait()
            self._added.clear()
            symbols, self._symbols = self._symbols, set()
            if symbols:
                await sink.fill_gap(symbols)
