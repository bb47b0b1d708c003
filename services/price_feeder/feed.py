"""The loop, and one round: held symbols, their last trades, the cache, then the ticks of what changed."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from services.price_feeder import metrics, queries
from services.price_feeder.failures import Unauthorized
from services.price_feeder.market_data import LastTrades, MarketData
from services.price_feeder.trades import SIMULATED, Rejection
from shared import clock, lifecycle, logs
from shared.bus import Bus, Outgoing
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.freshness import is_price_fresh
from shared.messages import (
    FEED_STATUS,
    FeedState,
    FeedStatus,
    PriceTick,
    price_subject,
    symbol_token,
)

ANSWERS_SECONDS_MAX = 9.0
"""What a round may wait for Alpaca: less than the usual interval, more than one request may take."""
PUBLISH_SECONDS_MAX = 5.0
PUBLISH_BATCH_MAX = 256
STOP_SECONDS_MAX = 3.0
"""What a round that is under way may still take when the service is to stop."""
BUS_SECONDS_MAX = 2.0
"""What the first round waits for NATS, and the last status for its acknowledgement."""
LOUD_EVERY = timedelta(minutes=5)
REJECTED_SHOWN_MAX = 20

log = logs.get_logger()


@dataclass(frozen=True)
class Round:
    """What a round did, for the log."""

    outcome: str
    symbols: int = 0
    confirmed: int = 0
    changed: int = 0
    rejected: int = 0
    waiting: int = 0
    unpublished: int = 0
    simulated: bool = False
    problem: str | None = None


async def run(
    database: Database, bus: Bus, market: MarketData, interval: timedelta, stop: asyncio.Event
) -> None:
    """Take a round now and on every boundary of `interval`, until `stop` is set."""
    feed = Feed(database, bus, market)
    with suppress(TimeoutError):  # so that the first round can publish, but prices do not wait for NATS
        async with asyncio.timeout(BUS_SECONDS_MAX):
            await bus.wait_until_ready(stop)
    async for _ in clock.aligned_ticks(interval, stop):
        await lifecycle.finish(feed.take_round(stop), stop, stop_seconds_max=STOP_SECONDS_MAX)
    await feed.say_stopped()


class Feed:
    """What the feeder knows from one round to the next. The price cache holds all that must not be lost."""

    def __init__(self, database: Database, bus: Bus, market: MarketData) -> None:
        self._database = database
        self._bus = bus
        self._market = market
        self._unpublished: dict[str, PriceTick] = {}
        self._streams_found = 0
        self._held: int | None = None
        self._confirmed_at: datetime | None = None
        self._status: FeedStatus | None = None
        self._status_published = False
        self._problem: str | None = None
        self._said_loudly_at: datetime | None = None
        self._rejected: Mapping[str, Rejection] = {}

    async def take_round(self, stop: asyncio.Event) -> Round:
        """Fetch, store, commit, publish. Survives the market, the database and the bus being away."""
        started = time.monotonic()
        try:
            done = await self._fetch_and_store(stop)
        except (DatabaseUnavailable, SchemaMissing) as error:
            done = Round("unstored", problem=f"database: {error}")
            self._say_problem(done.problem, loud=False, at=clock.utc_now())
            self._note_status(done.problem, clock.utc_now())
            await self._publish()
        seconds = time.monotonic() - started
        metrics.ROUNDS.labels(done.outcome).inc()
        metrics.ROUND_SECONDS.observe(seconds)
        if done.symbols:
            log.info(
                "prices_updated",
                symbols=done.symbols,
                confirmed=done.confirmed,
                changed=done.changed,
                rejected=done.rejected,
                duration_ms=round(seconds * 1000),
                **_said_if_so(waiting=done.waiting, unpublished=done.unpublished, simulated=done.simulated),
            )
        return done

    async def _fetch_and_store(self, stop: asyncio.Event) -> Round:
        held = await queries.held_symbols(self._database)
        self._held = len(held)
        metrics.HELD_SYMBOLS.set(self._held)
        await self._recall(held)
        answers = await self._market.latest_trades(
            held, now=clock.utc_now(), seconds_max=ANSWERS_SECONDS_MAX, stop=stop
        )
        received_at = clock.utc_now()
        stored = await queries.store_trades(self._database, answers.trades, received_at)
        # From here on the changes are committed: whoever hears a tick finds it in the table.
        self._unpublished |= {tick.symbol: tick for tick in stored.changed}
        metrics.CHANGED.inc(len(stored.changed))
        if stored.confirmed:
            self._confirmed_at = received_at
            metrics.LAST_SUCCESS.set(received_at.timestamp())
        older = {
            trade.symbol: Rejection.OLDER for trade in answers.trades if trade.symbol not in stored.confirmed
        }
        rejected = {**answers.rejected, **older}
        self._say_rejected(rejected)
        problem = _in_words(answers)
        loud = any(isinstance(error, Unauthorized) for error in answers.problems)
        self._say_problem(problem, loud=loud, at=received_at)
        self._note_status(problem, received_at)
        await self._publish()
        return Round(
            outcome=_outcome(held, answers),
            symbols=len(held),
            confirmed=len(stored.confirmed),
            changed=len(stored.changed),
            rejected=len(rejected),
            waiting=answers.waiting,
            unpublished=len(self._unpublished),
            simulated=any(trade.feed == SIMULATED for trade in answers.trades),
            problem=problem,
        )

    async def _recall(self, held: list[str]) -> None:
        """Take all held prices as unpublished whenever the streams may lack some.

        So it is at the start, as the last process may have died before publishing, and when NATS is back.
        """
        found = self._bus.streams_found
        if found and found == self._streams_found:
            return
        cached = await queries.cached_prices(self._database, held)
        self._unpublished |= {symbol: price.tick for symbol, price in cached.items()}
        self._status_published = False
        self._streams_found = found
        if self._confirmed_at is None:
            self._confirmed_at = max((price.confirmed_at for price in cached.values()), default=None)

    # ---- publishing ------------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Publish what NATS has not acknowledged yet; what fails again waits for the next round."""
        try:
            async with asyncio.timeout(PUBLISH_SECONDS_MAX):
                await self._publish_status()
                for ticks in _batches(list(self._unpublished.values())):
                    failed = await self._bus.publish_all(map(_outgoing, ticks))
                    unacknowledged = {outgoing.subject for outgoing, _ in failed}
                    for tick in ticks:
                        if price_subject(tick.symbol) not in unacknowledged:
                            del self._unpublished[tick.symbol]
                    if failed:
                        break
        except TimeoutError:
            log.warning("publishing_cut_off", unpublished=len(self._unpublished))
        metrics.UNPUBLISHED.set(len(self._unpublished))

    async def _publish_status(self) -> None:
        if self._status and not self._status_published:
            self._status_published = not await self._bus.publish_all([Outgoing(FEED_STATUS, self._status)])

    def _note_status(self, problem: str | None, at: datetime) -> None:
        """Say `stale` when symbols are held and the feed has confirmed no price for a while."""
        fresh = self._confirmed_at is not None and is_price_fresh(self._confirmed_at, at)
        if fresh or self._held == 0:
            self._set_status(FeedState.POLLING, f"{self._held} symbols are held", at)
        else:
            self._set_status(FeedState.STALE, problem or "no held symbol has a usable price", at)

    def _set_status(self, state: FeedState, detail: str, at: datetime) -> None:
        if self._status is None or self._status.state is not state:
            self._status = FeedStatus(state=state, since=at, detail=detail)
            self._status_published = False
            log.info("feed_status", state=state, detail=detail)

    async def say_stopped(self) -> None:
        """Publish that no more prices come; once, as there is no later."""
        self._set_status(FeedState.STOPPED, "the price feeder was stopped", clock.utc_now())
        with suppress(TimeoutError):
            async with asyncio.timeout(BUS_SECONDS_MAX):
                await self._publish_status()

    # ---- saying ----------------------------------------------------------------------------------

    def _say_problem(self, problem: str | None, *, loud: bool, at: datetime) -> None:
        """Log a problem when it begins and when it is over; one that someone must see to, again and again."""
        changed = problem != self._problem
        if loud and (changed or self._said_loudly_at is None or at - self._said_loudly_at >= LOUD_EVERY):
            log.error("market_data_unauthorized", problem=problem)
            self._said_loudly_at = at
        elif changed and problem and not loud:
            log.warning("prices_not_updated", problem=problem)
        elif changed and not problem:
            log.info("prices_recovered")
        self._problem = problem

    def _say_rejected(self, rejected: Mapping[str, Rejection]) -> None:
        for reason, count in Counter(rejected.values()).items():
            metrics.REJECTED.labels(reason).inc(count)
        if rejected != self._rejected:
            shown = dict(islice(sorted(rejected.items()), REJECTED_SHOWN_MAX))
            log.warning("symbols_rejected", count=len(rejected), reasons=shown)
        self._rejected = rejected


def _outgoing(tick: PriceTick) -> Outgoing:
    """The message's id is the change's, so that the stream drops a second copy."""
    change = f"{symbol_token(tick.symbol)}.{tick.sequence}.{tick.received_at.timestamp():.6f}"
    return Outgoing(price_subject(tick.symbol), tick, change)


def _batches(ticks: list[PriceTick]) -> Iterator[list[PriceTick]]:
    for start in range(0, len(ticks), PUBLISH_BATCH_MAX):
        yield ticks[start : start + PUBLISH_BATCH_MAX]


def _in_words(answers: LastTrades) -> str | None:
    """Return the round's problems in words, each once."""
    return "; ".join(sorted({str(problem) for problem in answers.problems})) or None


def _outcome(held: list[str], answers: LastTrades) -> str:
    if not held:
        return "idle"
    if not answers.problems:
        return "ok"
    return "partial" if answers.trades else "failed"


def _said_if_so(**facts: object) -> dict[str, object]:
    return {name: fact for name, fact in facts.items() if fact}
