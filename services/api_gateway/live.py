"""The portfolios that are being watched, kept up to date by what is heard.

Ticks come from the bus and change values here, in memory. The database is asked when somebody begins to watch, when it
notifies that cash or positions have changed, and when something may have been missed.
"""

import asyncio
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Literal, Protocol

from prometheus_client import Gauge
from pydantic import ValidationError

from services.api_gateway import problems, queries, replica
from services.api_gateway.admission import Admission
from services.api_gateway.doubts import Doubts
from services.api_gateway.queries import Source
from services.api_gateway.valuation import Holdings, Portfolio, Quote, market_text
from shared import health, logs
from shared.clock import Now, utc_now, wait_for_stop
from shared.database import DatabaseUnavailable, SchemaMissing
from shared.freshness import market_moment, price_status
from shared.market_calendar import Calendar
from shared.messages import (
    ALL_PRICES,
    BIGINT_MAX,
    PRICES_CONFIRMED,
    PricesConfirmed,
    PriceTick,
    price_subject,
)

SUBJECTS = (ALL_PRICES, PRICES_CONFIRMED)
"""What `Live` is to hear on the bus."""
CHANNEL = "portfolios"
"""Where the database notifies which portfolios have changed."""

LOOK_SECONDS = 1.0
"""How often it is looked whether time alone has changed something: a price is stale, the market opens."""
UNWATCHED_SECONDS_MAX = 60.0
"""How long a portfolio is kept up to date after its last watcher has gone, so that it may resume."""
UNHEARD_SECONDS = 2.0
"""How often prices are read from the database while the bus is not heard."""
SILENT_SECONDS_MAX = 30.0
"""When no tick and no confirmation was heard for so long, the feeder may be cut off from the bus, or rest."""
SILENT_READ_SECONDS = 5.0
"""How often prices are read from the database then: one statement for all symbols."""
CHECK_SECONDS = 60.0
"""How often prices are read though all is heard: for what the bus does not promise, and for who may not be believed."""
FUTURE_MAX = timedelta(seconds=10)
"""How far a sender's clock may be ahead. What is further ahead is not taken, and what the table has is read instead."""
SEQUENCE_JUMP_MAX = 1000
"""So many changes of a symbol cannot all have been missed while everything is heard."""
RETRY_SECONDS = 1.0
READINGS_AT_ONCE_MAX = 4
ENDING_SLICE_SECONDS = 0.05

EndReason = Literal["token_expired", "user_deactivated", "user_unknown", "going_away"]

log = logs.get_logger()
portfolios_watched = Gauge("gateway_portfolios_watched", "Portfolios that are kept up to date for watchers")


class Watcher(Protocol):
    """Somebody who watches a portfolio; every method is called in the event loop and is quick."""

    def wake(self) -> None:
        """Learn that the portfolio has changed."""

    def pass_second(self, now: datetime) -> None:
        """Learn that a second has passed."""

    def end(self, reason: EndReason) -> None:
        """Learn that there is nothing more to be seen."""


class Watched:
    """A user's portfolio, once it is read, and who watches it."""

    __slots__ = ("is_behind", "portfolio", "reading", "subject", "unwatched_since", "visitors", "watchers")

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.portfolio: Portfolio | None = None
        self.is_behind = True
        """Something has changed that was not read yet."""
        self.reading = asyncio.Lock()
        self.visitors = 0
        """Who waits for it to be read."""
        self.watchers: set[Watcher] = set()
        self.unwatched_since = time.monotonic()

    def wake(self) -> None:
        for watcher in self.watchers:
            watcher.wake()

    def end(self, reason: EndReason) -> None:
        for watcher in tuple(self.watchers):
            watcher.end(reason)


class Live:
    """All watched portfolios. Hears the bus; `run` does what takes time."""

    def __init__(
        self, database: Source, calendar: Calendar, admission: Admission, *, now: Now = utc_now
    ) -> None:
        """Judge times by `now`, which all replicas should have alike."""
        self.now = now
        self._database = database
        self._admission = admission
        self._calendar = calendar
        self._moment = market_moment(calendar.hours, now())
        self._market = market_text(self._moment)
        self._by_subject: dict[str, Watched] = {}
        self._by_user: dict[int, Watched] = {}
        self._holders: dict[str, set[Watched]] = {}
        self._quotes: dict[str, Quote] = {}
        self._quotes_by_price_subject: dict[str, Quote] = {}
        self._unread: set[str] = set()
        """Symbols that are heard already, but whose prices of before could not be read yet."""
        self._quotes_are_behind = False
        self._is_heard = False
        self._is_doubtful = False
        """Something was heard that was not believed."""
        self._doubts = Doubts()
        self._heard_at = time.monotonic()
        self._prices_read_at = time.monotonic()
        self._readings = 0
        self._wanted = asyncio.Event()
        self._watching_symbols = asyncio.Lock()
        portfolios_watched.set_function(lambda: len(self._by_user))

    # ---- watching --------------------------------------------------------------------------------

    async def watch(self, subject: str) -> Watched:
        """Return the user's portfolio, up to date; `add` a watcher to it soon.

        Raises Problem for a user who has none and when it cannot be read soon, DatabaseUnavailable.
        """
        while True:
            watched = self._by_subject.setdefault(subject, Watched(subject))
            watched.visitors += 1
            try:
                async with watched.reading:
                    if self._by_subject.get(subject) is watched:  # else it has just come to its end
                        if watched.is_behind:
                            with self._admission.place():
                                await self._read_holdings(watched)
                        return watched
            finally:
                watched.visitors -= 1
                watched.unwatched_since = time.monotonic()

    def add(self, watched: Watched, watcher: Watcher) -> None:
        """Let the watcher see the portfolio until it is removed."""
        watched.watchers.add(watcher)
        if watched.is_behind:
            self._wanted.set()
        if self._by_subject.get(watched.subject) is not watched:  # it has just come to its end
            watcher.end("going_away")

    def remove(self, watched: Watched, watcher: Watcher) -> None:
        watched.watchers.discard(watcher)
        watched.unwatched_since = time.monotonic()

    async def end_over(self, seconds: float, at_once: asyncio.Event) -> None:
        """End what is watched little by little, so that not all come to another gateway in the same moment.

        Takes that long in any case, unless `at_once` is set: then nobody is ended by it any more.
        """
        watchers = [watcher for watched in self._by_subject.values() for watcher in watched.watchers]
        slices = max(int(seconds / ENDING_SLICE_SECONDS), 1)
        for number in range(slices):
            for watcher in watchers[number::slices]:
                watcher.end("going_away")
            if await wait_for_stop(at_once, seconds / slices):
                return

    async def end(self, _: object) -> None:
        """End all watching, as the gateway stops."""
        for watched in tuple(self._by_subject.values()):
            watched.end("going_away")

    # ---- hearing the bus -------------------------------------------------------------------------

    def heard(self, subject: str, payload: bytes) -> None:
        self._heard_at = time.monotonic()
        quote = self._quotes_by_price_subject.get(subject)
        try:
            if quote is not None:
                tick = PriceTick.model_validate_json(payload)
                if tick.symbol == quote.symbol:
                    self._hear_tick(quote, tick)
                else:
                    self._doubt(subject, "it is about another symbol")
            elif subject == PRICES_CONFIRMED:
                confirmed = PricesConfirmed.model_validate_json(payload)
                if confirmed.confirmed_at <= self.now() + FUTURE_MAX:
                    self._confirm(confirmed)
                else:
                    self._doubt(subject, "confirmed_at is in the future")
        except ValidationError as error:
            self._doubts.add_malformed(subject, payload, error)
            self._is_doubtful = True

    def interrupted(self) -> None:
        self._is_heard = False
        self._read_prices_soon()

    def resumed(self) -> None:
        self._is_heard = True
        self._read_prices_soon()

    def _doubt(self, subject: str, reason: str) -> None:
        """Do not believe a message, and read soon what the table has."""
        self._doubts.add(subject, reason)
        self._is_doubtful = True

    def _hear_tick(self, quote: Quote, tick: PriceTick) -> None:
        jump_max = BIGINT_MAX if quote.symbol in self._unread else SEQUENCE_JUMP_MAX
        if tick.received_at > self.now() + FUTURE_MAX:
            self._doubt(price_subject(tick.symbol), "received_at is in the future")
        elif tick.sequence > quote.sequence + jump_max:
            self._doubt(price_subject(tick.symbol), "its sequence is far ahead of the last one")
        elif tick.sequence > quote.sequence:
            self._price(quote, tick, tick.received_at)
        elif quote.received_at is not None and tick.received_at > quote.received_at:
            self._read_prices_soon()  # its row was deleted, and numbers have begun anew: the table knows

    def _price(self, quote: Quote, tick: PriceTick, confirmed_at: datetime) -> None:
        quote.take(tick, confirmed_at)
        quote.status = price_status(quote.symbol, quote.feed, confirmed_at, self._moment)
        self._touch(quote.symbol)

    def _confirm(self, confirmed: PricesConfirmed) -> None:
        for symbol in confirmed.symbols:
            quote = self._quotes.get(symbol)
            if quote is not None:
                self._confirm_quote(quote, confirmed.confirmed_at)

    def _confirm_quote(self, quote: Quote, confirmed_at: datetime) -> None:
        if quote.confirmed_at is not None:
            quote.confirmed_at = max(quote.confirmed_at, confirmed_at)
            self._judge(quote)

    def _judge(self, quote: Quote) -> None:
        """Say whether the price is live still, or again."""
        if quote.confirmed_at is not None:
            status = price_status(quote.symbol, quote.feed, quote.confirmed_at, self._moment)
            if status is not quote.status:
                quote.status = status
                self._touch(quote.symbol)

    def _touch(self, symbol: str) -> None:
        for watched in self._holders.get(symbol, ()):
            assert watched.portfolio is not None
            watched.portfolio.touch(symbol)
            watched.wake()

    # ---- hearing the database ----------------------------------------------------------------------

    def changed(self, user_id: int | None) -> None:
        """Learn that cash or positions of a user have changed, or perhaps of anybody."""
        if user_id is None:
            concerned = list(self._by_user.values())
        else:
            concerned = [self._by_user[user_id]] if user_id in self._by_user else []
        for watched in concerned:
            watched.is_behind = True
        if concerned:
            self._wanted.set()

    # ---- reading ---------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Look at the time, and read what has changed, until `stop` is set."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_every_second(stop))
            tasks.create_task(self._read_what_changes(stop))
            await stop.wait()
            self._wanted.set()

    async def _read_what_changes(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._wanted.clear()
            is_all_read = await self._read_prices_again()
            behind = [watched for watched in self._by_user.values() if watched.is_behind and watched.watchers]
            for start in range(0, len(behind), READINGS_AT_ONCE_MAX):
                if stop.is_set():
                    return
                read = await asyncio.gather(
                    *map(self._read_again, behind[start : start + READINGS_AT_ONCE_MAX])
                )
                is_all_read = is_all_read and all(read)
            if is_all_read:
                await self._wanted.wait()
            else:  # said by the readiness check, and by who asks
                await wait_for_stop(stop, RETRY_SECONDS)

    async def _read_prices_again(self) -> bool:
        """Read the prices of all watched symbols if some may have been missed; tell whether that went well."""
        if not self._quotes_are_behind:
            return True
        self._quotes_are_behind = self._is_doubtful = False
        self._prices_read_at = time.monotonic()
        try:
            await self._read_prices(self._quotes)
        except (DatabaseUnavailable, SchemaMissing):
            self._quotes_are_behind = True
            return False
        return True

    async def _read_again(self, watched: Watched) -> bool:
        """Read what a user holds by now; tell whether that went well."""
        async with watched.reading:
            try:
                if watched.is_behind:
                    await self._read_holdings(watched)
            except (DatabaseUnavailable, SchemaMissing):
                return False
            except problems.Problem as problem:
                is_gone = problem.kind is problems.USER_UNKNOWN
                watched.end("user_unknown" if is_gone else "user_deactivated")
                self._forget(watched)
        return True

    async def _read_holdings(self, watched: Watched) -> None:
        """Read what the user holds; raises Problem when there is nobody to hold it."""
        watched.is_behind = False  # what changes from here on may not be read
        self._readings += 1
        try:
            holdings = await self._holdings(watched.subject)
            await self._watch_symbols([holding.ticker for holding in holdings.positions])
            self._hold(watched, holdings)
        except BaseException:
            watched.is_behind = True
            raise
        finally:
            self._readings -= 1
        watched.wake()

    async def _holdings(self, subject: str) -> Holdings:
        source = replica.showing(self._database, time.monotonic())
        found = await queries.holdings(source, subject)
        if found is None:
            raise problems.user_unknown()
        if not found.is_active:
            raise problems.user_deactivated()
        return found

    def _hold(self, watched: Watched, holdings: Holdings) -> None:
        self._let_go(watched)
        portfolio = watched.portfolio
        if portfolio is None or portfolio.holdings.user_id != holdings.user_id:
            watched.portfolio = Portfolio(holdings, self._quotes, self._market)
        else:
            portfolio.hold(holdings, self._quotes)
        self._by_user[holdings.user_id] = watched
        for holding in holdings.positions:
            self._holders.setdefault(holding.ticker, set()).add(watched)

    def _let_go(self, watched: Watched) -> None:
        if watched.portfolio is not None:
            holdings = watched.portfolio.holdings
            if self._by_user.get(holdings.user_id) is watched:
                del self._by_user[holdings.user_id]
            for holding in holdings.positions:
                self._holders[holding.ticker].discard(watched)

    def _forget(self, watched: Watched) -> None:
        self._let_go(watched)
        if self._by_subject.get(watched.subject) is watched:
            del self._by_subject[watched.subject]

    async def _watch_symbols(self, symbols: list[str]) -> None:
        """Hear these symbols from now on, and read the prices that came before."""
        async with self._watching_symbols:  # so that nobody goes on while another reads the same prices
            new = [symbol for symbol in symbols if symbol not in self._quotes]
            for symbol in new:
                self._quotes[symbol] = self._quotes_by_price_subject[price_subject(symbol)] = Quote(symbol)
            self._unread.update(new)
            unread = self._unread.intersection(symbols)
            if unread:
                await self._read_prices(unread)

    def _read_prices_soon(self) -> None:
        self._quotes_are_behind = True
        self._wanted.set()

    async def _read_prices(self, symbols: Iterable[str]) -> None:
        """Take the cached prices, where none newer was heard."""
        known = {
            symbol: (self._quotes[symbol].sequence, self._quotes[symbol].confirmed_at) for symbol in symbols
        }
        source = replica.showing(self._database, time.monotonic())
        found = {price.symbol: price for price in await queries.prices(source, list(known))}
        self._unread.difference_update(known)
        for symbol, (sequence, confirmed_at) in known.items():
            quote, price = self._quotes.get(symbol), found.get(symbol)
            if quote is None:
                continue
            if price is None:
                if quote.price is not None and quote.sequence == sequence:
                    quote.drop()
                    self._touch(symbol)
            elif quote.sequence == sequence and quote.received_at != price.received_at:
                self._price(quote, price, price.confirmed_at)  # nothing was heard meanwhile: so it is
            elif quote.sequence == sequence and quote.confirmed_at == confirmed_at:
                quote.confirmed_at = price.confirmed_at  # nor here: what was heard before is in the table
                self._judge(quote)
            else:
                self._confirm_quote(quote, price.confirmed_at)

    # ---- time ------------------------------------------------------------------------------------

    async def _look_every_second(self, stop: asyncio.Event) -> None:
        while not await wait_for_stop(stop, LOOK_SECONDS):
            self.look(self.now())

    def look(self, now: datetime) -> None:
        """Bring to light what time has changed, and forget what nobody watches."""
        self._moment = market_moment(self._calendar.hours, now)
        market = market_text(self._moment)
        if market != self._market:
            self._market = market
            for watched in self._by_user.values():
                assert watched.portfolio is not None
                watched.portfolio.tell_market(market)
                watched.wake()
        for quote in self._quotes.values():
            self._judge(quote)
        at = time.monotonic()
        if self._quotes and at - self._prices_read_at >= self._pause_seconds(at):
            self._read_prices_soon()
        unwatched_since_min = at - UNWATCHED_SECONDS_MAX
        for watched in tuple(self._by_subject.values()):
            for watcher in tuple(watched.watchers):
                watcher.pass_second(now)
            is_over = watched.portfolio is None or watched.unwatched_since < unwatched_since_min
            if is_over and not watched.watchers and not watched.visitors:
                self._forget(watched)
        if not self._readings:
            for symbol in [symbol for symbol in self._quotes if not self._holders.get(symbol)]:
                self._holders.pop(symbol, None)
                self._unread.discard(symbol)
                del self._quotes[symbol], self._quotes_by_price_subject[price_subject(symbol)]

    def _pause_seconds(self, at: float) -> float:
        """Return after what time prices are read again."""
        if not self._is_heard or self._is_doubtful:
            return UNHEARD_SECONDS
        return SILENT_READ_SECONDS if at - self._heard_at > SILENT_SECONDS_MAX else CHECK_SECONDS


class Notifications:
    """Hears the database for `Live`."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.are_heard = False

    def notified(self, payload: str) -> None:
        self._live.changed(int(payload) if payload else None)

    def interrupted(self) -> None:
        self.are_heard = False

    def resumed(self) -> None:
        self.are_heard = True
        self._live.changed(None)

    async def check(self) -> str | None:
        """Say for readiness whether changes of positions are heard; streams show the last known ones without."""
        return None if self.are_heard else health.Degraded("changes of positions and cash are not heard")
