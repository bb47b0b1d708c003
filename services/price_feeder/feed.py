"""The loop, and one round: held symbols, their last trades, the cache, then the ticks of what changed.

What streams bring takes the same way into the cache and onto the bus, in batches.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from services.price_feeder import metrics, queries
from services.price_feeder.conflation import StreamedTrade
from services.price_feeder.failures import MarketDataError, Unauthorized
from services.price_feeder.frames import Withdrawal
from services.price_feeder.lease import Lease
from services.price_feeder.market_data import LastTrades, MarketData
from services.price_feeder.outbox import Outbox
from services.price_feeder.pace import Pace
from services.price_feeder.queries import CachedPrice, LeaseLost, Stored
from services.price_feeder.reports import Reports
from services.price_feeder.selection import Selection
from services.price_feeder.streaming import Streaming
from services.price_feeder.trades import (
    LastTrade,
    Rejection,
    streamed_last_trade,
    withdrawn_price,
)
from shared import clock, lifecycle, logs
from shared.bus import Bus
from shared.clock import Now
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.freshness import PRICE_FRESH_FOR, is_price_fresh
from shared.market_calendar import Calendar
from shared.market_hours import SIMULATED
from shared.messages import FeedState

ANSWERS_SECONDS_MAX = 9.0
"""What a round may wait for Alpaca: less than the usual interval, more than one request may take."""
STOP_SECONDS_MAX = 2.0
"""What a round that is under way may still take when the service is to stop."""
BUS_SECONDS_MAX = 2.0
"""What the first round waits for NATS."""
WITHDRAWAL_SETTLES = timedelta(seconds=30)
"""A withdrawn trade that the market still calls the last one after this time counts again."""

log = logs.get_logger()


@dataclass(frozen=True)
class Round:
    """What a round did, for the log."""

    outcome: str
    symbols: int = 0
    confirmed: int = 0
    changed: int = 0
    rejected: int = 0
    outside: int = 0
    """Of the confirmed ones, how many have had trades outside the session since, which do not count."""
    waiting: int = 0
    unpublished: int = 0
    simulated: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Refreshed:
    """What asking for some symbols brought; the problem is None when all requests were answered."""

    at: datetime
    confirmed: frozenset[str]
    changed: frozenset[str]
    rejected: Mapping[str, Rejection]
    problem: str | None


class _Withdrawn(NamedTuple):
    """That a cached trade does not count any more: whatever the market answers instead takes its place."""

    traded_at: datetime
    trade_id: object
    noted_at: datetime


async def run(feed: "Feed", interval: timedelta, over: asyncio.Event) -> None:
    """Take a round now and on every boundary of `interval`, and stream beside it, until `over` is set."""
    with suppress(TimeoutError):  # so that the first round can publish, but prices do not wait for NATS
        async with asyncio.timeout(BUS_SECONDS_MAX):
            await feed.bus.wait_until_ready(over)
    async with asyncio.TaskGroup() as tasks:
        beside = [tasks.create_task(feed.outbox.keep_publishing())]
        if feed.streaming:
            beside.append(tasks.create_task(feed.streaming.run(feed)))
        tasks.create_task(_cancel_when(over, beside))
        async for _ in clock.aligned_ticks(interval, over):
            await lifecycle.finish(feed.take_round(over), over, stop_seconds_max=STOP_SECONDS_MAX)
    await feed.say_ended()


async def _cancel_when(over: asyncio.Event, tasks: Iterable[asyncio.Task[None]]) -> None:
    """Close the streams as soon as the term is over, whatever a round is waiting for."""
    await over.wait()
    for task in tasks:
        task.cancel()


class Feed:
    """What the feeder knows during one term of its lease. The price cache holds all that must not be lost."""

    def __init__(
        self,
        database: Database,
        bus: Bus,
        market: MarketData,
        lease: Lease,
        *,
        calendar: Calendar | None = None,
        streaming: Streaming | None = None,
        closed_interval: timedelta = timedelta(0),
        now: Now = clock.utc_now,
    ) -> None:
        self.bus = bus
        self.outbox = Outbox(bus, lease)
        self.streaming = streaming
        self._now = now
        self._database = database
        self._market = market
        self._lease = lease
        self._calendar = calendar or Calendar()
        self._pace = Pace(market.feed, closed_interval)
        self._selection = Selection(database, streaming.symbols_max) if streaming else None
        self._reports = Reports()
        self._storing = asyncio.Lock()
        self._streams_found = 0
        self._held: list[str] | None = None
        self._confirmed_at: datetime | None = None
        self._problem: str | None = None
        self._withdrawn: dict[str, _Withdrawn] = {}
        self._trade_ids: dict[str, tuple[datetime, object]] = {}

    # ---- rounds ----------------------------------------------------------------------------------

    async def take_round(self, stop: asyncio.Event) -> Round:
        """Fetch, store, commit, publish. Survives the market, the database and the bus being away."""
        started = time.monotonic()
        try:
            done = await self._fetch_and_store(stop)
        except (DatabaseUnavailable, SchemaMissing) as error:
            done = Round("unstored", problem=f"database: {error}")
            advice = (
                "see the checks postgres and schema of /readyz; prices are stored again once they are well"
            )
            self._note_problem(done.problem, self._now(), advice=advice)
            await self.outbox.publish()
        except LeaseLost as error:
            self._lease.lose()
            done = Round("lost", problem=str(error))
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
                **_said_if_so(
                    outside=done.outside,
                    waiting=done.waiting,
                    unpublished=done.unpublished,
                    simulated=done.simulated,
                ),
            )
        return done

    async def _fetch_and_store(self, stop: asyncio.Event) -> Round:
        held = await queries.held_symbols(self._database)
        self._held = held
        metrics.HELD_SYMBOLS.set(len(held))
        self._forget_all_but(held)
        await self._recall(held)
        await self._follow(held)
        hours, began_at = self._calendar.hours, self._now()
        due = self._pace.due(held, hours, began_at)
        if held and not due:
            self._note_status(self._now())
            await self.outbox.publish()
            return Round("resting", unpublished=len(self.outbox))
        heard = self.streaming.streamed if self.streaming else frozenset()
        answers = await self._ask(due, stop)
        stored, rejected, outside, at = await self._store(answers)
        answered = {trade.symbol for trade in answers.trades}.union(answers.rejected)
        self._pace.note_answered(answered, hours, began_at)
        self._reports.say_rejected(rejected)
        if self.streaming:
            self.streaming.note_found(heard.intersection(tick.symbol for tick in stored.changed))
        problem = _in_words(answers)
        gravest = _gravest(answers)
        is_loud = isinstance(gravest, Unauthorized)
        self._note_problem(problem, at, advice=gravest.advice if gravest else "", loud=is_loud)
        self._reports.say_budget(answers.beyond_budget, at)
        metrics.WAITING.set(answers.waiting)
        self.outbox.confirm(stored.confirmed, at)
        await self.outbox.publish()
        return Round(
            outcome=_outcome(held, answers),
            symbols=len(due),
            confirmed=len(stored.confirmed),
            changed=len(stored.changed),
            rejected=len(rejected),
            outside=outside,
            waiting=answers.waiting,
            unpublished=len(self.outbox),
            simulated=any(trade.feed == SIMULATED for trade in answers.trades),
            problem=problem,
        )

    async def refresh(self, symbols: Iterable[str], stop: asyncio.Event | None = None) -> Refreshed:
        """Ask for the last trades of these symbols now, within the budget, store and publish what they change.

        Safe beside rounds and streams. Raises DatabaseUnavailable, SchemaMissing or LeaseLost; what the market does
        is in the answer.
        """
        answers = await self._ask(list(symbols), stop or asyncio.Event())
        stored, rejected, _, at = await self._store(answers)
        self.outbox.confirm(stored.confirmed, at)
        self.outbox.wake()
        changed = frozenset(tick.symbol for tick in stored.changed)
        return Refreshed(at, stored.confirmed, changed, rejected, _in_words(answers))

    def _forget_all_but(self, held: list[str]) -> None:
        """Keep what is known of trades bounded by what is held, give or take."""
        if len(self._trade_ids) > 2 * len(held):
            self._trade_ids = {
                symbol: self._trade_ids[symbol] for symbol in held if symbol in self._trade_ids
            }
        if self._withdrawn:
            self._withdrawn = {
                symbol: self._withdrawn[symbol] for symbol in held if symbol in self._withdrawn
            }

    async def _recall(self, held: list[str]) -> None:
        """Take all held prices as unpublished whenever the streams may lack some.

        So it is at the start of a term, as the last holder may have died before publishing, and when NATS is back.
        """
        found = self.bus.streams_found
        if found and found == self._streams_found:
            return
        cached = await queries.cached_prices(self._database, held)
        self.outbox.add(price.tick for price in cached.values())
        self.outbox.repeat_status()
        self._streams_found = found
        if self._confirmed_at is None:
            self._confirmed_at = max((price.confirmed_at for price in cached.values()), default=None)

    async def _follow(self, held: list[str]) -> None:
        """Let the streams carry what is held now; without a count they carry what they did."""
        if self.streaming and self._selection:
            with suppress(DatabaseUnavailable):  # if it was not the count alone, the round will say so
                self.streaming.follow(await self._selection.choose(held))

    # ---- the way into the cache ------------------------------------------------------------------

    async def _ask(self, symbols: list[str], stop: asyncio.Event) -> LastTrades:
        answers = await self._market.latest_trades(
            symbols, now=self._now(), seconds_max=ANSWERS_SECONDS_MAX, stop=stop
        )
        if any(trade.feed == SIMULATED and self._pace.is_bound(trade.symbol) for trade in answers.trades):
            self._pace.feed = SIMULATED
        return answers

    async def _store(self, answers: LastTrades) -> tuple[Stored, dict[str, Rejection], int, datetime]:
        """Store what Alpaca answered.

        Returns what that did, every rejection, how many prices were confirmed by trades outside the session, and when
        the answers were received.
        """
        async with self._storing:
            trades, standing, behind = await self._of_sessions(answers.trades)
            at = self._now()
            withdrawn = {symbol: mark.traded_at for symbol, mark in self._withdrawn.items()}
            stored = await queries.store_trades(
                self._database, self._lease.term, [*trades, *standing], at, withdrawn=withdrawn
            )
            self._take_stored(stored, trades, at)
            self._settle_withdrawn(stored, trades, at)
        metrics.OUTSIDE.inc(len(standing))
        streamed = self.streaming.streamed if self.streaming else frozenset()
        older = {
            trade.symbol: Rejection.OLDER
            for trade in trades
            if trade.symbol not in stored.confirmed and trade.symbol not in streamed  # the stream was quicker
        }
        rejected = {**answers.rejected, **dict.fromkeys(behind, Rejection.OUTSIDE_SESSION), **older}
        return stored, rejected, len(standing), at

    async def store_streamed(self, batch: Mapping[str, StreamedTrade]) -> bool:
        """Store a batch of streamed trades and let it be published; return False when that may be possible later."""
        judged = [streamed_last_trade(symbol, trade) for symbol, trade in batch.items()]
        if not self._lease.holds():
            return True
        try:
            async with self._storing:
                trades, _, _ = await self._of_sessions(
                    [trade for trade in judged if not isinstance(trade, Rejection)]
                )
                at = self._now()
                stored = await queries.store_trades(
                    self._database, self._lease.term, trades, at, in_order=True
                )
                self._take_stored(stored, trades, at)
        except (DatabaseUnavailable, SchemaMissing):  # the next round says so
            metrics.FLUSHES.labels("unstored").inc()
            return False
        except LeaseLost:
            metrics.FLUSHES.labels("lost").inc()
            self._lease.lose()
            return True
        metrics.FLUSHES.labels("stored").inc()
        self.outbox.wake()
        return True

    def _take_stored(self, stored: Stored, trades: Iterable[LastTrade], at: datetime) -> None:
        """Take in what is committed: from here on whoever hears a tick finds it in the table."""
        self.outbox.add(stored.changed)
        metrics.CHANGED.inc(len(stored.changed))
        changed = {tick.symbol for tick in stored.changed}
        for symbol in changed:
            self._withdrawn.pop(symbol, None)
            self._trade_ids.pop(symbol, None)
        for trade in trades:
            # Of trades of one instant the cached one is the one that changed the price.
            known = self._trade_ids.get(trade.symbol)
            if trade.symbol in stored.confirmed and (known is None or known[0] != trade.traded_at):
                self._trade_ids[trade.symbol] = trade.traded_at, trade.trade_id
        if stored.confirmed:
            self._confirmed_at = at
            metrics.LAST_SUCCESS.set(at.timestamp())

    def _settle_withdrawn(self, stored: Stored, trades: Iterable[LastTrade], at: datetime) -> None:
        """Forget that cached trades were withdrawn for which the market answers that they are the last.

        At once when it names another trade than the withdrawn one; after a while else, as what the market is asked for
        may lag behind what it streams.
        """
        for trade in trades if self._withdrawn else ():
            mark = self._withdrawn.get(trade.symbol)
            if mark is None or trade.symbol not in stored.confirmed:
                continue
            is_another = trade.trade_id is not None and trade.trade_id != mark.trade_id
            if is_another or at - mark.noted_at >= WITHDRAWAL_SETTLES:
                del self._withdrawn[trade.symbol]

    async def _of_sessions(
        self, trades: list[LastTrade]
    ) -> tuple[list[LastTrade], list[LastTrade], list[str]]:
        """Divide trades into those that count, and those outside the session where the session's last price is there.

        Of the latter, returns the cached trades instead: that the venue's last trade is outside the session shows that
        they still are the session's last, and storing them again confirms them. Symbols whose price was not confirmed
        when the session ended come last: trades after the cached one may have been missed.
        """
        hours = self._calendar.hours
        doubtful = [
            trade.symbol
            for trade in trades
            if trade.symbol not in self._withdrawn
            and self._pace.is_bound(trade.symbol)
            and trade.feed != SIMULATED
            and not hours.sets_price(
                trade.traded_at, trade.traded_at, is_closing_print=trade.is_closing_print
            )
        ]
        if not doubtful:
            return trades, [], []
        cached = await queries.cached_prices(self._database, doubtful)
        counting, standing, behind = [], [], []
        for trade in trades:
            price = cached.get(trade.symbol)
            if (
                price is None
                or price.tick.feed == SIMULATED
                or price.tick.traded_at >= trade.traded_at
                or hours.sets_price(trade.traded_at, price.tick.traded_at)
            ):
                counting.append(trade)
            elif price.confirmed_at > hours.last_session(trade.traded_at).closes_at - PRICE_FRESH_FOR:
                tick = price.tick
                standing.append(LastTrade(tick.symbol, tick.price, tick.traded_at, tick.feed))
            else:
                behind.append(trade.symbol)
        return counting, standing, behind

    # ---- what streams bring besides trades -------------------------------------------------------

    async def withdraw(self, withdrawals: Sequence[Withdrawal]) -> set[str] | None:
        """Note which cached or waiting trades do not count any more; return the symbols to ask for instead.

        Returns None when the cache cannot be read: then nothing is noted.
        """
        assert self.streaming is not None
        try:
            async with self._storing:
                cached = await queries.cached_prices(self._database, [each.symbol for each in withdrawals])
        except (DatabaseUnavailable, SchemaMissing):
            return None
        conflation = self.streaming.conflation
        at = self._now()
        to_ask = set()
        for withdrawal in withdrawals:
            symbol = withdrawal.symbol
            if conflation.withdraw(symbol, withdrawal.trade_id):
                to_ask.add(symbol)
            price = cached.get(symbol)
            if price and _concerns(withdrawal, price, self._trade_ids.get(symbol)):
                self._withdrawn[symbol] = _Withdrawn(price.tick.traded_at, withdrawal.trade_id, at)
                conflation.forget(symbol)
                to_ask.add(symbol)
                metrics.WITHDRAWALS.inc()
                log.info("trade_withdrawn", symbol=symbol, price=str(price.tick.price))
        return to_ask

    async def fill_gap(self, symbols: Iterable[str]) -> None:
        """Ask for these symbols; what fails is done by the next round."""
        try:
            await self.refresh(sorted(symbols))
        except (DatabaseUnavailable, SchemaMissing):
            pass
        except LeaseLost:
            self._lease.lose()

    # ---- status ----------------------------------------------------------------------------------

    @property
    def problem(self) -> str | None:
        """Why the last round did not bring all prices, in words."""
        return self._problem

    @property
    def budget_problem(self) -> str | None:
        """That the budget of requests does not suffice, in words."""
        return self._reports.budget_problem

    @property
    def confirmed_at(self) -> datetime | None:
        """When the feed last confirmed a price, this or a former term's."""
        return self._confirmed_at

    def note_streams(self) -> None:
        """Say what is streamed, and what state that makes, at once; the first round of a term says it first."""
        if self.outbox.status is None:
            return
        self._note_status(self._now())
        self.outbox.wake()

    def _note_problem(
        self, problem: str | None, at: datetime, *, advice: str = "", loud: bool = False
    ) -> None:
        self._problem = problem
        self._reports.say_problem(problem, advice=advice, loud=loud, at=at)
        self._note_status(at)

    def _note_status(self, at: datetime) -> None:
        """Say `stale` when symbols are held and the feed has confirmed no price for a while."""
        held = self._held or []
        streamed = len(self.streaming.streamed.intersection(held)) if self.streaming else 0
        polled = len(held) - streamed
        metrics.POLLED_SYMBOLS.set(polled)
        fresh = self._confirmed_at is not None and is_price_fresh(self._confirmed_at, at)
        if held and all(map(self._pace.is_bound, held)) and not self._calendar.hours.session_at(at):
            opens_at = self._calendar.hours.next_session(at).opens_at
            state, detail = FeedState.MARKET_CLOSED, f"the market opens at {opens_at:%Y-%m-%dT%H:%M:%SZ}"
        elif not fresh and self._held != []:
            state, detail = FeedState.STALE, self._problem or "no held symbol has a usable price"
        elif streamed and self.streaming and self.streaming.is_whole:
            state, detail = FeedState.LIVE, f"{streamed} symbols are streamed, {polled} polled"
        else:
            away = [f"{name} {problem}" for name, problem in self._stream_states().items()]
            state, detail = FeedState.POLLING, "; ".join([f"{len(held)} symbols are held", *away])
        self.outbox.set_status(state, detail, at, streamed=streamed, polled=polled)

    def _stream_states(self) -> dict[str, str]:
        return self.streaming.states if self.streaming else {}

    async def say_ended(self) -> None:
        """Publish that no more prices come from here; once, and only while nobody else can have the lease."""
        state, detail = FeedState.STOPPED, "the price feeder was stopped"
        if self._lease.has_just_run_out():
            state, detail = FeedState.STALE, "the database does not answer: nobody feeds prices"
        self.outbox.set_status(state, detail, self._now(), streamed=0, polled=0)
        await self.outbox.publish_last_status()


def _concerns(withdrawal: Withdrawal, cached: CachedPrice, known: tuple[datetime, object] | None) -> bool:
    """Tell whether a withdrawn trade is the cached one: by its price, and its id (with its time) if that is known."""
    if withdrawn_price(withdrawal.price) != cached.tick.price:
        return False  # exchanges count their trades each for itself
    if known is None or known[0] != cached.tick.traded_at or known[1] is None:
        return True
    return known[1] == withdrawal.trade_id


def _in_words(answers: LastTrades) -> str | None:
    """Return the round's problems in words, each once."""
    return "; ".join(sorted({str(problem) for problem in answers.problems})) or None


def _gravest(answers: LastTrades) -> MarketDataError | None:
    """Return the problem that somebody must see to, else the first one."""
    loud = (problem for problem in answers.problems if isinstance(problem, Unauthorized))
    return next(loud, answers.problems[0] if answers.problems else None)


def _outcome(held: list[str], answers: LastTrades) -> str:
    if not held:
        return "idle"
    if not answers.problems:
        return "ok"
    return "partial" if answers.trades else "failed"


def _said_if_so(**facts: object) -> dict[str, object]:
    return {name: fact for name, fact in facts.items() if fact}
