"""What is to be published, until NATS has acknowledged it: ticks, confirmations, the feed's status."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

from services.price_feeder import metrics
from services.price_feeder.lease import Lease
from shared import logs
from shared.bus import Bus, Outgoing
from shared.messages import (
    FEED_STATUS,
    PRICES_CONFIRMED,
    FeedState,
    FeedStatus,
    PricesConfirmed,
    PriceTick,
    price_subject,
    symbol_token,
)

PUBLISH_SECONDS_MAX = 5.0
BATCH_MAX = 256
CONFIRMED_MAX = 2000
"""Symbols in one confirmation: 20 KB."""
LAST_STATUS_SECONDS_MAX = 1.5
SUBJECTS_REMEMBERED_MAX = 10_000

log = logs.get_logger()


class Outbox:
    """The newest unpublished tick of each symbol. Nothing is sent without the lease, and never two batches at once.

    So that of two ticks of a symbol the one that is sent last is the newer one.
    """

    def __init__(self, bus: Bus, lease: Lease) -> None:
        self._bus = bus
        self._lease = lease
        self._ticks: dict[str, PriceTick] = {}
        self._confirmed: dict[str, datetime] = {}
        self._status: FeedStatus | None = None
        self._status_published = False
        self._publishing = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._failure: str | None = None
        self.problem: str | None = None
        """Why not all was published the last time, in words."""

    def __len__(self) -> int:
        """How many ticks are not acknowledged."""
        return len(self._ticks)

    def add(self, ticks: Iterable[PriceTick]) -> None:
        """Take in ticks, which must be committed; of a symbol's the one with the highest sequence stays."""
        for tick in ticks:
            waiting = self._ticks.get(tick.symbol)
            if waiting is None or waiting.sequence <= tick.sequence:
                self._ticks[tick.symbol] = tick

    def confirm(self, symbols: Iterable[str], at: datetime) -> None:
        """Take in that these prices are still the last; of a symbol the latest confirmation waits."""
        for symbol in symbols:
            before = self._confirmed.get(symbol)
            if before is None or before < at:
                self._confirmed[symbol] = at

    def set_status(self, state: FeedState, detail: str, at: datetime, *, streamed: int, polled: int) -> None:
        """Take in the feed's state, if it is another one."""
        before = self._status
        if before and (before.state, before.streamed, before.polled) == (state, streamed, polled):
            return
        if before is None or before.state is not state:
            said = {"state": state, "detail": detail, "streamed": streamed, "polled": polled}
            if state is FeedState.STALE:
                log.warning(
                    "feed_status", **said, advice="mend what the detail names; old prices stay meanwhile"
                )
            else:
                log.info("feed_status", **said)
            for each in FeedState:
                metrics.FEED_STATE.labels(each).set(each is state)
        since = before.since if before and before.state is state else at
        self._status = FeedStatus(state=state, since=since, detail=detail, streamed=streamed, polled=polled)
        self._status_published = False

    @property
    def status(self) -> FeedStatus | None:
        """The feed's state, once it is known."""
        return self._status

    def repeat_status(self) -> None:
        """Publish the status again: the stream that keeps it may have been lost."""
        self._status_published = False

    def wake(self) -> None:
        """Let `keep_publishing` publish."""
        self._wanted.set()

    async def keep_publishing(self) -> None:
        """Publish whenever `wake` is called, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            await self.publish()

    async def publish(self) -> None:
        """Publish all that waits; what NATS does not acknowledge waits for the next time."""
        try:
            async with asyncio.timeout(PUBLISH_SECONDS_MAX), self._publishing:
                self._failure = None
                await self._publish_status()
                for symbols in _batches(list(self._ticks)):
                    if not await self._publish_ticks(symbols):
                        break
                await self._publish_confirmations()
                failure = self._failure
        except TimeoutError:
            failure = f"not acknowledged within {PUBLISH_SECONDS_MAX:g} s"
        metrics.UNPUBLISHED.set(len(self._ticks))
        self._say(failure)

    def _say(self, failure: str | None) -> None:
        """Warn once when publishing begins to fail, and say once that it is over."""
        if failure and not self.problem:
            log.warning(
                "prices_unpublished",
                ticks=len(self._ticks),
                problem=failure,
                advice="see the check nats of /readyz; prices are stored meanwhile, and published once NATS is well",
            )
        elif self.problem and not failure:
            log.info("prices_published_again")
        self.problem = failure

    async def _send(self, batch: Sequence[Outgoing]) -> list[Outgoing]:
        """Publish and return what was not acknowledged."""
        failed = await self._bus.publish_all(batch)
        if failed:
            self._failure = failed[0][1]
        return [outgoing for outgoing, _ in failed]

    async def _publish_ticks(self, symbols: Sequence[str]) -> bool:
        """Publish the ticks that wait now, which may be newer than when the symbols were listed."""
        if not self._lease.holds():
            return False
        term = self._lease.term.number
        ticks = [self._ticks[symbol] for symbol in symbols]
        failed = await self._send([_outgoing(tick, term) for tick in ticks])
        unacknowledged = {outgoing.subject for outgoing in failed}
        for tick in ticks:
            subject, _ = _subject_and_token(tick.symbol)
            if subject in unacknowledged:
                # The others go first the next time: a stream that is full refuses some for ever.
                self._ticks[tick.symbol] = self._ticks.pop(tick.symbol)
            elif self._ticks.get(tick.symbol) is tick:
                del self._ticks[tick.symbol]
        return len(failed) < len(ticks)

    async def _publish_confirmations(self) -> None:
        if not self._confirmed or not self._lease.holds():
            return
        confirmations = list(_confirmations(self._confirmed))
        failed = await self._send([Outgoing(PRICES_CONFIRMED, each) for each in confirmations])
        unacknowledged = {id(outgoing.message) for outgoing in failed}
        for each in confirmations:
            for symbol in each.symbols if id(each) not in unacknowledged else ():
                if self._confirmed.get(symbol) == each.confirmed_at:  # no later one has come in meanwhile
                    del self._confirmed[symbol]

    async def _publish_status(self) -> None:
        status = self._status
        may_speak = self._lease.holds() or self._lease.has_just_run_out()
        if status and not self._status_published and may_speak:
            failed = await self._send([Outgoing(FEED_STATUS, status)])
            self._status_published = not failed and self._status is status

    async def publish_last_status(self) -> None:
        """Publish the status alone, once, as there is no later."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_STATUS_SECONDS_MAX), self._publishing:
                await self._publish_status()


def _outgoing(tick: PriceTick, term: int) -> Outgoing:
    """The message's id is the change's and the term's.

    So the stream drops a second copy, but not what a new holder of the lease publishes to be sure.
    """
    subject, token = _subject_and_token(tick.symbol)
    change = f"{token}.{tick.sequence}.{tick.received_at.timestamp():.6f}.{term}"
    return Outgoing(subject, tick, change)


@lru_cache(maxsize=SUBJECTS_REMEMBERED_MAX)
def _subject_and_token(symbol: str) -> tuple[str, str]:
    return price_subject(symbol), symbol_token(symbol)


def _confirmations(confirmed: Mapping[str, datetime]) -> Iterator[PricesConfirmed]:
    """Say which symbols were confirmed when, the earliest first, in messages that are not too large."""
    for at in sorted(set(confirmed.values())):
        symbols = sorted(symbol for symbol, confirmed_at in confirmed.items() if confirmed_at == at)
        for start in range(0, len(symbols), CONFIRMED_MAX):
            yield PricesConfirmed(confirmed_at=at, symbols=tuple(symbols[start : start + CONFIRMED_MAX]))


def _batches(symbols: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(symbols), BATCH_MAX):
        yield symbols[start : start + BATCH_MAX]
