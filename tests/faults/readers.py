"""Clients of the gateways who check every answer to the cent, and every refusal for its manners."""

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

import aiohttp

from tests.faults.links import Link
from tests.faults.parts import Part, Spell
from tests.faults.population import UNKNOWN_SYMBOL, User
from tests.faults.system import MARKET_SEED, POSTGRES, System
from tests.faults.truth import Market, market_value

DEADLINE_SECONDS = 5.0
"""Of the gateway; its default."""
LATE_SECONDS_MAX = 2.0
"""What a busy machine may add to it."""
GIVE_UP_SECONDS = 2 * (DEADLINE_SECONDS + LATE_SECONDS_MAX)
"""When a reader gives up: clearly after the last answer that is in time, so that a late one is seen to be late."""
PAUSE_SECONDS = 0.05
RECOVERY_SECONDS_MAX = 3.0
"""After the last fault has healed nobody must be refused for longer."""
PATHS = (
    *["/api/portfolio/current"] * 3,
    "/api/portfolio/performance?timeframe=1D",
)
OVERLOAD_RECOVERY_SECONDS_MAX = 5.0
"""Nor after the last of an overload."""
CHART_POINTS_MAX = 20_000
CHART_POINTS_EACH = 2
"""The last ones of a chart, of which a snapshot has just made one."""
REFUSALS = frozenset({429, 503})


@dataclass(frozen=True)
class Asked:
    """A request that got no answer, or a refusal."""

    gateway: str
    began_at: float
    ended_at: float
    problem: str
    was_connected: bool = True
    """False when the connection was refused: then nothing was asked yet."""


@dataclass(frozen=True)
class Point:
    """What a chart showed of a user."""

    user_id: int
    bucket_at: datetime
    value: Decimal


@dataclass
class Readers:
    """Those who read, and what they found; times are of `time.monotonic`."""

    system: System
    token_seconds: int = 60
    """How long the readers' tokens are good."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that were not right, in words."""
    unanswered: list[Asked] = field(default_factory=list)
    refused: list[Asked] = field(default_factory=list)
    slowest_seconds: float = 0.0
    """Of the requests that nothing was in the way of: neither their gateway was struck nor the link to it."""
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=CHART_POINTS_MAX))
    """To be compared with the snapshots in the end."""
    _newest: dict[str, datetime] = field(default_factory=dict)
    _market: Market = field(default_factory=lambda: Market(MARKET_SEED))

    async def run(self, readers: int, stop: asyncio.Event, seed: int) -> None:
        """Read with so many clients at once until `stop`."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(readers):
                tasks.create_task(self._read(random.Random(seed + number), stop))

    async def _read(self, chance: random.Random, stop: asyncio.Event) -> None:
        timeout = aiohttp.ClientTimeout(total=GIVE_UP_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while not stop.is_set():
                user = chance.choice(self.system.population.active)
                gateway = chance.choice(list(self.system.gateway_ports))
                await self.ask(http, gateway, user, chance.choice(PATHS))
                await asyncio.sleep(PAUSE_SECONDS)

    async def ask(self, http: aiohttp.ClientSession, gateway: str, user: User, path: str) -> Asked | None:
        """Ask one gateway for a user's portfolio, and judge the answer; return what went wrong on the way."""
        port = self.system.gateway_ports[gateway]
        token = self.system.token(user.subject, lasts_seconds=self.token_seconds)
        floors = {symbol: self._newest[symbol] for symbol in user.shares if symbol in self._newest}
        began_at = time.monotonic()
        try:
            async with http.get(
                f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {token}"}
            ) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
            was_connected = not isinstance(error, aiohttp.ClientConnectorError)
            failed = Asked(gateway, began_at, time.monotonic(), problem, was_connected)
            self.unanswered.append(failed)
            self.counts["unanswered"] += 1
            if isinstance(error, TimeoutError):
                self._took(failed)
            return failed
        ended_at = time.monotonic()
        self.counts[str(answer.status)] += 1
        if self._took(Asked(gateway, began_at, ended_at, "")) > DEADLINE_SECONDS + LATE_SECONDS_MAX:
            self.wrong.append(f"{path} of {user.subject}: {answer.status} after {ended_at - began_at:.1f} s")
        if answer.status in REFUSALS:
            self.refused.append(Asked(gateway, began_at, ended_at, title(text)))
            self.wrong += ill_mannered(answer.status, answer.headers.get("Retry-After"), text)
            return self.refused[-1]
        if answer.status != 200:
            self.wrong.append(f"{path} of {user.subject}: {answer.status} {text[:200]}")
            return None
        body = json.loads(text, parse_float=Decimal, parse_int=Decimal)
        if path.startswith("/api/portfolio/current"):
            found = self._judge_current(body, user, user.orders_between(began_at, ended_at), floors)
        else:
            found = judge_chart(body, user)
            self.points += points_of(body, user)
        self.wrong += [f"{path} of {user.subject}: {each}" for each in found]
        return None

    def _took(self, asked: Asked) -> float:
        """Note how long a request took, and return it; 0 when something was in its way."""
        if is_disturbed(way_to(self.system, asked.gateway), asked):
            return 0.0
        seconds = asked.ended_at - asked.began_at
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        return seconds

    def _judge_current(
        self, body: Any, user: User, orders: range, floors: Mapping[str, datetime]
    ) -> list[str]:
        found = judge_portfolio(body, user, orders) + judge_prices(body, self._market, floors)
        raise_floors(self._newest, body)
        return found

    @contextmanager
    def overloaded(self) -> Iterator[None]:
        """Expect refusals of all gateways while the block runs, and for a moment after it."""
        spell = Spell("overloaded", time.monotonic())
        for gateway in self.system.gateway_ports:
            self.system.part(gateway).overloads.append(spell)
        try:
            yield
        finally:
            spell.ended_at = time.monotonic()

    def unexcused(self) -> list[str]:
        """Return which requests went wrong though nothing was the matter with what they needed."""
        return unexcused(self.system, self.unanswered, self.refused)


# ---- what nobody is to blame for -----------------------------------------------------------------


def way_to(system: System, gateway: str) -> list[Part | Link]:
    """Return what an answer comes from and through."""
    return [system.part(gateway), *(link for link in system.links if link.target == gateway)]


def needs_of_a_read(system: System, gateway: str) -> list[Part | Link]:
    """Return what a gateway needs to answer. Nothing else is: not NATS, nor any other service."""
    links = [link for link in system.links if (link.source, link.target) == (gateway, POSTGRES)]
    return [system.part(gateway), *system.postgres_servers, *links]


def unexcused(system: System, unanswered: Sequence[Asked], refused: Sequence[Asked]) -> list[str]:
    """Return what went wrong though nothing was the matter with what it needed, then or just before."""
    found = [
        f"{asked.gateway} gave no answer ({asked.problem})"
        for asked in unanswered
        if not is_disturbed(way_to(system, asked.gateway), asked)
    ]
    found += [
        f"{asked.gateway} refused without need ({asked.problem})"
        for asked in refused
        if not is_disturbed(needs_of_a_read(system, asked.gateway), asked)
        and not was_overloaded(system.part(asked.gateway), asked)
    ]
    return found


def was_overloaded(gateway: Part, asked: Asked) -> bool:
    return any(
        spell.overlaps(asked.began_at, asked.ended_at, after_seconds=OVERLOAD_RECOVERY_SECONDS_MAX)
        for spell in gateway.overloads
    )


def is_disturbed(parts: Iterable[Part | Link], asked: Asked) -> bool:
    return any(
        spell.overlaps(asked.began_at, asked.ended_at, after_seconds=RECOVERY_SECONDS_MAX)
        for part in parts
        for spell in part.spells
    )


# ---- answers -------------------------------------------------------------------------------------


def judge_portfolio(body: Any, user: User, orders: range) -> list[str]:
    """Return what is wrong with an answer of `/current`, whose reader may have seen these orders."""
    found = []
    positions = {each["ticker"]: each for each in body["positions"]}
    unpriced = {each["ticker"] for each in body["unpriced"]}
    if unpriced != user.shares.keys() & {UNKNOWN_SYMBOL}:
        found.append(f"without a price are {sorted(unpriced)}")
    held = {each["ticker"]: each["shares"] for each in (*body["positions"], *body["unpriced"])}
    if not any((body["cash_balance"], held) == user.holdings(number) for number in orders):
        found.append(f"holdings of no order in {orders}: {body['cash_balance']} and {held}")
    for ticker, position in positions.items():
        if position["current_value"] != market_value(position["shares"], position["price_per_share"]):
            found.append(f"value of {ticker}: {position}")
    invested = sum((each["current_value"] for each in positions.values()), Decimal(0))
    if body["investment_value"] != invested:
        found.append(f"investment value {body['investment_value']} instead of {invested}")
    if body["total_value"] != invested + body["cash_balance"]:
        found.append(f"total value {body['total_value']} instead of {invested + body['cash_balance']}")
    return found


def judge_prices(body: Any, market: Market, floors: Mapping[str, datetime]) -> list[str]:
    """Return which prices the market did not have at their time, and which are older than what was seen before."""
    found = []
    for position in body["positions"]:
        symbol, as_of = position["ticker"], _as_of(position)
        price = market.price_of(symbol, as_of)
        if price != position["price_per_share"]:
            found.append(f"{symbol} at {position['price_per_share']} as of {as_of}: it was {price}")
        if symbol in floors and as_of < floors[symbol]:
            found.append(f"{symbol} as of {as_of} after one of {floors[symbol]} was seen")
    return found


def raise_floors(floors: MutableMapping[str, datetime], body: Any) -> None:
    """Note of which trades the prices are: no older one is to be seen any more."""
    for position in body["positions"]:
        symbol, as_of = position["ticker"], _as_of(position)
        floors[symbol] = max(as_of, floors.get(symbol, as_of))


def _as_of(position: Any) -> datetime:
    return datetime.fromisoformat(position["price_as_of"])


def judge_chart(body: Any, user: User) -> list[str]:
    """Return what is wrong with an answer of `/performance` in itself."""
    found = []
    points = body["data_points"]
    at = [point["timestamp"] for point in points]
    if at != sorted(set(at)):
        found.append(f"points not in the order of time: {at}")
    if body["data_available"] != bool(points):
        found.append(f"data_available is {body['data_available']} with {len(points)} points")
    if points and body["start_value"] != points[0]["value"]:
        found.append(f"start value {body['start_value']}, first point {points[0]}")
    if points and body["profit_loss"] != body["current_value"] - body["start_value"]:
        found.append(f"profit {body['profit_loss']} of {body['start_value']} to {body['current_value']}")
    partial = UNKNOWN_SYMBOL in user.shares
    if any(bool(point.get("partial")) != partial for point in points):
        found.append("a point hides that a position had no price, or says so without reason")
    return found


def points_of(body: Any, user: User) -> list[Point]:
    """Return the last points of a chart."""
    return [
        Point(user.id, datetime.fromisoformat(point["timestamp"]), point["value"])
        for point in body["data_points"][-CHART_POINTS_EACH:]
    ]


def ill_mannered(status: int, retry_after: str | None, text: str) -> list[str]:
    """Return what is wrong with a refusal: it must be a problem of ours that says when to try again."""
    if rude := without_retry_after(status, retry_after):
        return rude
    try:
        body = json.loads(text)
        if str(body["type"]).startswith("urn:foliotick:problem:") and body["status"] == status:
            return []
    except (ValueError, KeyError, TypeError):
        pass
    return [f"{status} is no problem of ours: {text[:200]}"]


def without_retry_after(status: int, retry_after: str | None) -> list[str]:
    return [] if (retry_after or "").isdigit() else [f"{status} with {retry_after} for Retry-After"]


def title(text: str) -> str:
    try:
        return str(json.loads(text)["title"])
    except (ValueError, KeyError, TypeError):
        return text[:100]
