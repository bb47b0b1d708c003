"""Clients of the portfolio stream, who go on elsewhere when theirs is lost, and must end with what `/current` says.

What a stream shows is judged like an answer, but for its age: while something is struck it may be of a while ago. It
never goes back, though, and is not behind for long when nothing is the matter.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

import aiohttp

from tests.faults.parts import STOPPING
from tests.faults.population import User
from tests.faults.readers import (
    GIVE_UP_SECONDS,
    RECOVERY_SECONDS_MAX,
    REFUSALS,
    Asked,
    ill_mannered,
    is_disturbed,
    judge_portfolio,
    judge_prices,
    needs_of_a_read,
    raise_floors,
    title,
    unexcused,
    was_overloaded,
    way_to,
    without_retry_after,
)
from tests.faults.system import MARKET_SEED, System
from tests.faults.truth import Market
from tests.streams import PATH, Event, Stream, of_sse, of_websocket

PAUSE_SECONDS = 0.3
SILENCE_SECONDS_MAX = 20.0
"""Longer than a heartbeat takes to come: then the stream is given up."""
CLOSE_SECONDS_MAX = 2.0
BEHIND_SECONDS_MAX = 10.0
"""An order that was acknowledged so long ago must be shown, unless something was struck since, or just before."""
AGREEMENT_SECONDS_MAX = 15.0
TOKEN_SECONDS = 86_400
"""A stream lasts as long as its token; by the clock of a gateway, which may be an hour ahead."""
TRANSPORTS = SSE, WEBSOCKET = "sse", "websocket"
_COMPARED = ("ticker", "shares", "price_per_share", "current_value")


@dataclass
class Seen:
    """The newest that a gateway has shown to somebody."""

    order: int = 0
    prices: dict[str, datetime] = field(default_factory=dict)


@dataclass
class Watcher:
    """One who watches a portfolio, by one stream after the other."""

    user: User
    transport: str
    shown: dict[str, Any] = field(default_factory=dict)
    last_id: str = ""
    seen: dict[str, Seen] = field(default_factory=lambda: defaultdict(Seen))
    """By gateway: another one may be a moment behind."""


class NotOpened(Exception):
    """The answer was not a stream."""

    def __init__(self, status: int, text: str, problems: list[str]) -> None:
        super().__init__(f"{status} {text[:200]}")
        self.status = status
        self.text = text
        self.problems = problems
        """What is wrong with it, even where a refusal is none."""


@dataclass
class Watchers:
    """Those who watch, one stream each; what each shows is judged whenever it changes."""

    system: System
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[Asked] = field(default_factory=list)
    """Streams that broke off, or could not be opened; since they were last heard of."""
    refused: list[Asked] = field(default_factory=list)
    agreement_seconds_max: float = AGREEMENT_SECONDS_MAX
    _market: Market = field(default_factory=lambda: Market(MARKET_SEED))

    async def run(self, watchers: int, stop: asyncio.Event, seed: int) -> None:
        """Watch so many portfolios, those with orders first, until `stop`; nothing may be struck any more by then."""
        chance = random.Random(seed)
        population = self.system.population
        rest = [user for user in population.active if user not in population.ordering]
        chosen = [*population.ordering, *chance.sample(rest, len(rest))][:watchers]
        those = [Watcher(user, TRANSPORTS[number % len(TRANSPORTS)]) for number, user in enumerate(chosen)]
        watching = [asyncio.create_task(self._watch(each, random.Random(seed))) for each in those]
        await stop.wait()
        self.wrong += await self._disagreeing(those)
        for task in watching:
            task.cancel()
        for outcome in await asyncio.gather(*watching, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                raise outcome if isinstance(outcome, BaseException) else AssertionError("ended by itself")
        self.wrong += self.unexcused()

    def unexcused(self) -> list[str]:
        """Return which streams were lost or refused though nothing was the matter with what they needed."""
        return unexcused(self.system, self.lost, self.refused)

    async def _watch(self, watcher: Watcher, chance: random.Random) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout()) as http:
            while True:
                await self.follow(http, chance.choice(list(self.system.gateway_ports)), watcher)
                await asyncio.sleep(PAUSE_SECONDS)

    async def follow(self, http: aiohttp.ClientSession, gateway: str, watcher: Watcher) -> None:
        """Follow one stream to its end, and judge what it shows and how it ends."""
        heard_at = time.monotonic()
        try:
            async with self._opened(http, gateway, watcher) as stream:
                self.counts[watcher.transport] += 1
                stream.shown = watcher.shown  # one that is resumed goes on from what was shown
                while True:
                    async with asyncio.timeout(SILENCE_SECONDS_MAX):
                        event = await stream.next()
                    self.counts[event.name] += 1
                    if event.name == "end":
                        self._say(watcher, event, self._judge_end(gateway, event.data["reason"], heard_at))
                        return
                    heard_at = time.monotonic()
                    self._say(watcher, event, self._judge(gateway, watcher, event, stream))
        except NotOpened as answer:
            if answer.status in REFUSALS:
                self.counts["refused"] += 1
                self.refused.append(Asked(gateway, heard_at, time.monotonic(), title(answer.text)))
            self.wrong += [f"stream of {watcher.user.subject}: {each}" for each in answer.problems]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.counts["lost"] += 1
            problem = f"stream: {type(error).__name__}: {error}"
            self.lost.append(Asked(gateway, heard_at, time.monotonic(), problem))

    @asynccontextmanager
    async def _opened(
        self, http: aiohttp.ClientSession, gateway: str, watcher: Watcher
    ) -> AsyncIterator[Stream]:
        """Open a stream; raises NotOpened when there is another answer."""
        url = f"http://127.0.0.1:{self.system.gateway_ports[gateway]}{PATH}"
        token = self.system.token(watcher.user.subject, lasts_seconds=TOKEN_SECONDS)
        headers = {"Authorization": f"Bearer {token}", "Last-Event-ID": watcher.last_id}
        opened = _sse(http, url, headers) if watcher.transport == SSE else _websocket(http, url, headers)
        async with opened as stream:
            yield stream

    # ---- judgement -------------------------------------------------------------------------------

    def _say(self, watcher: Watcher, event: Event, found: list[str]) -> None:
        self.wrong += [f"stream of {watcher.user.subject}, {event.name}: {each}" for each in found]

    def _judge(self, gateway: str, watcher: Watcher, event: Event, stream: Stream) -> list[str]:
        """Return what is wrong with what is shown now; a heartbeat says that there is nothing newer."""
        if not stream.shown:
            return ["nothing was shown before"]
        if event.id:
            watcher.shown, watcher.last_id = stream.shown, event.id
        user, seen = watcher.user, watcher.seen[gateway]
        orders = self._orders(gateway, user, time.monotonic())
        found = judge_portfolio(stream.shown, user, range(max(orders.start, seen.order), orders.stop))
        found += judge_prices(stream.shown, self._market, seen.prices)
        if not found:
            seen.order = max(seen.order, int(user.cash - stream.shown["cash_balance"]))
        raise_floors(seen.prices, stream.shown)
        return found

    def _orders(self, gateway: str, user: User, at: float) -> range:
        """Return after which orders a stream may show the portfolio now."""
        lately = Asked(gateway, at - BEHIND_SECONDS_MAX, at, "")
        needed = [*needs_of_a_read(self.system, gateway), *way_to(self.system, gateway)]
        may_be_behind = is_disturbed(needed, lately) or was_overloaded(self.system.part(gateway), lately)
        return user.orders_between(-math.inf if may_be_behind else lately.began_at, at)

    def _judge_end(self, gateway: str, reason: str, heard_at: float) -> list[str]:
        """Return what is wrong with the end of a stream: only a gateway that is to stop may end one."""
        at = time.monotonic()
        is_stopping = any(
            spell.why == STOPPING and spell.overlaps(heard_at, at, after_seconds=RECOVERY_SECONDS_MAX)
            for spell in self.system.part(gateway).spells
        )
        if reason == "going_away" and is_stopping:
            return []
        return [f"{gateway} ended it without need: {reason}"]

    # ---- agreement -------------------------------------------------------------------------------

    async def _disagreeing(self, watchers: list[Watcher]) -> list[str]:
        """Return who is shown something else than `/current` answers, though there was time to settle."""
        until = time.monotonic() + self.agreement_seconds_max
        waiting = list(watchers)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
            while waiting and time.monotonic() < until:
                for watcher in tuple(waiting):
                    current = await self._current(http, watcher.user)
                    if current and watcher.shown and _essence(watcher.shown) == _essence(current):
                        waiting.remove(watcher)
                await asyncio.sleep(0.1)
        return [f"{watcher.user.subject} is shown {watcher.shown}" for watcher in waiting]

    async def _current(self, http: aiohttp.ClientSession, user: User) -> dict[str, Any] | None:
        port = next(iter(self.system.gateway_ports.values()))
        url = f"http://127.0.0.1:{port}/api/portfolio/current"
        token = self.system.token(user.subject, lasts_seconds=TOKEN_SECONDS)
        try:
            async with http.get(url, headers={"Authorization": f"Bearer {token}"}) as answer:
                text = await answer.text()
                return json.loads(text, parse_float=Decimal) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None


@asynccontextmanager
async def _sse(http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> AsyncIterator[Stream]:
    async with asyncio.timeout(GIVE_UP_SECONDS):
        response = await http.get(url, headers=headers)
    try:
        if response.status != 200:
            async with asyncio.timeout(GIVE_UP_SECONDS):
                text = await response.text()
            raise NotOpened(response.status, text, _problems(response.status, response.headers, text))
        if response.content_type != "text/event-stream":
            raise NotOpened(200, "", [f"it is {response.content_type}"])
        yield of_sse(response)
    finally:
        response.close()


@asynccontextmanager
async def _websocket(http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> AsyncIterator[Stream]:
    try:
        async with asyncio.timeout(GIVE_UP_SECONDS):
            socket = await http.ws_connect(
                url, headers=headers, timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS_MAX)
            )
    except aiohttp.WSServerHandshakeError as error:  # of whose answer the library keeps no text
        raise NotOpened(error.status, error.message, _problems(error.status, error.headers or {})) from error
    async with socket:
        yield of_websocket(socket)


def _problems(status: int, headers: Any, text: str | None = None) -> list[str]:
    """Return what is wrong with an answer that is no stream; with a refusal only its manners may be."""
    if status not in REFUSALS:
        return [f"{status} {text or ''}"[:200]]
    retry_after = headers.get("Retry-After")
    return (
        without_retry_after(status, retry_after) if text is None else ill_mannered(status, retry_after, text)
    )


def _essence(portfolio: dict[str, Any]) -> Any:
    positions = sorted(tuple(each[name] for name in _COMPARED) for each in portfolio["positions"])
    return portfolio["total_value"], portfolio["cash_balance"], positions
