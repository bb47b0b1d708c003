"""The checker: what must be there at the end, counted, and compared with what is."""

import asyncio
import json
import math
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import nats
import psutil

from services.snapshotter.snapshots import CONSUMER
from shared.clock import last_boundary
from shared.messages import PRICES, TIMER, price_subject
from tests.faults import audit
from tests.faults.links import kind_of
from tests.faults.parts import KILLED, NOT_STOPPED, STOPPING, End, Service
from tests.faults.population import UNKNOWN_SYMBOL, Population, User
from tests.faults.readers import Point, Readers
from tests.faults.system import MARKET_SEED, SHARDS, SLOT, System
from tests.faults.truth import Market, market_value
from tests.waiting import eventually

Row = asyncpg.Record | Mapping[str, Any]
Steady = Callable[[datetime], float]

QUIET_SECONDS_MAX = 90.0
"""Within so long after the last fault all that is due must be done."""
SAID_MAX = 5
"""Findings of a kind that are told in full."""
EARLY_SECONDS_MAX = 1.0
"""By so much a slot may be taken before its time: by the clock of a replica that had to read it from PostgreSQL."""
COMMIT_SECONDS_MAX = 3.0
"""After so long a price that was written is committed, and seen by all, unless PostgreSQL was struck meanwhile."""
MORE_MAX = {
    "tasks": (1.0, 4.0),
    "threads": (1.0, 2.0),
    "files": (1.0, 12.0),
    "connections": (1.0, 9.0),
    "in_use": (1.0, 2.0),
    "memory_mb": (1.35, 20.0),
}
"""What a process that has been through everything may use when all is quiet: so many times what the replica of its
kind that used most did when it was new, and so much more.
"""
FEEDER_TASKS = 24
"""More that a price feeder has when it leads and its streams are carried, which may begin after all are ready."""
USAGE_SECONDS_MAX = 15.0
"""Within which a service that runs must say what it uses."""

_SNAPSHOTS = """
SELECT timestamp, user_id, total_value, cash_balance, investment_value, unpriced_positions
FROM portfolio_snapshots
WHERE timestamp BETWEEN $1 AND $2
"""
_DETAILS = """
SELECT timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share
FROM position_snapshots
WHERE timestamp BETWEEN $1 AND $2
"""
_OTHERS = """
SELECT timestamp, user_id
FROM portfolio_snapshots
WHERE timestamp NOT BETWEEN $1 AND $2
"""
_ORPHANS = """
SELECT timestamp, user_id, count(*)
FROM position_snapshots AS detail
WHERE NOT EXISTS (
    SELECT FROM portfolio_snapshots AS parent
    WHERE parent.user_id = detail.user_id AND parent.timestamp = detail.timestamp
)
GROUP BY timestamp, user_id
ORDER BY timestamp, user_id
"""
_VALUES = """
SELECT timestamp, user_id, total_value
FROM portfolio_snapshots
WHERE timestamp >= $1
"""
_HOLDINGS = """
SELECT users.id, cash_balance, ticker, shares
FROM users
LEFT JOIN positions ON positions.user_id = users.id
"""
_OPEN_CONNECTIONS = """
SELECT application_name, count(*)
FROM pg_stat_activity
WHERE backend_type = 'client backend'
GROUP BY application_name
"""
SETTLE_SECONDS_MAX = 5.0
"""Within which the bus has what the table has, when all is quiet."""
CHART_BUCKET = timedelta(minutes=5)
"""Of the charts that readers ask for."""
LISTENERS = "api_gateway_listens"
"""The name of the one connection of a gateway that is in no pool."""


@dataclass(frozen=True)
class Detail:
    ticker: str
    shares: Decimal
    current_value: Decimal
    price_per_share: Decimal


@dataclass(frozen=True)
class Snapshot:
    """A stored portfolio snapshot with its positions."""

    at: datetime
    user_id: int
    total_value: Decimal
    cash_balance: Decimal
    investment_value: Decimal
    unpriced_positions: int
    details: tuple[Detail, ...]


@dataclass
class Verdict:
    """What was counted, and what is wrong."""

    counts: dict[str, object] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.wrong

    def add(self, kind: str, found: Sequence[str]) -> None:
        """Take in findings of a kind."""
        self.wrong += [f"{kind}: {each}" for each in found[:SAID_MAX]]
        if len(found) > SAID_MAX:
            self.wrong.append(f"{kind}: and {len(found) - SAID_MAX} more")

    def __str__(self) -> str:
        counted = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        return "\n".join([counted, *self.wrong])


async def check(
    system: System,
    readers: Readers,
    first: datetime,
    last: datetime,
    *,
    used: Mapping[str, "Usage"] | None = None,
) -> Verdict:
    """Wait until all slots from `first` to `last` are done, and compare everything with what must be there."""
    verdict = Verdict()
    slots = [first + number * SLOT for number in range((last - first) // SLOT + 1)]
    connection = await asyncpg.connect(system.database_url)
    try:
        try:
            await eventually(lambda: _is_quiet(system, last), timeout=QUIET_SECONDS_MAX, every=0.1)
        except AssertionError:
            verdict.wrong.append(f"not quiet within {QUIET_SECONDS_MAX:g} s")
        snapshots = await _snapshots(connection, first, last)
        verdict.counts["slots"] = len(slots)
        verdict.counts["snapshots"] = len(snapshots)
        verdict.counts["of"] = len(slots) * len(system.population.active)
        verdict.add("due", not_once(snapshots, slots, system.population.active))
        others = await connection.fetch(_OTHERS, first, last)
        verdict.add("due", never_due(others, earliest_slot(system), system.now(), system.population.active))
        verdict.add("orphan", await orphans(connection))
        verdict.add("snapshot", incomplete(snapshots, system.population, steadily(system)))
        verdict.add("prices of a slot", torn(snapshots))
        verdict.counts["chart points"] = len(readers.points)
        if readers.points:
            earliest = min(point.bucket_at for point in readers.points)
            verdict.add("chart", uncharted(readers.points, await connection.fetch(_VALUES, earliest)))
        prices = await connection.fetch(audit.PRICES)
        verdict.counts["prices stored"] = len(prices)
        verdict.add("price", untrue(prices))
        verdict.add("price", outdated(snapshots, replaced_at(prices), postgres_was_struck(system)))
        went_back = await connection.fetch(audit.WENT_BACK)
        verdict.add("price went back", [str(dict(row)) for row in went_back])
        verdict.counts["orders"] = system.population.orders_committed
        verdict.add("order", lost_orders(await connection.fetch(_HOLDINGS), system.population))
        verdict.add("bus", await unlike_the_bus(connection, system.nats_urls))
    finally:
        await connection.close()
    verdict.counts["answers"] = dict(sorted(readers.counts.items()))
    verdict.counts["slowest"] = f"{readers.slowest_seconds:.1f} s"
    verdict.add("answer", readers.wrong)
    verdict.add("request", readers.unexcused())
    verdict.add("end", ended_otherwise(system))
    if used is not None:
        verdict.add("leak", await grown(system, used))
    return verdict


async def _is_quiet(system: System, last: datetime) -> bool:
    """Tell whether nothing that was asked for is left to be done, up to the slot `last`."""
    client = await nats.connect(system.nats_urls)
    try:
        info = await client.jetstream().consumer_info(TIMER.name, CONSUMER)
        newest = await client.jetstream().get_last_msg(TIMER.name, TIMER.subjects[0])
    finally:
        await client.close()
    announced = datetime.fromisoformat(json.loads(newest.data or b"")["scheduled_at"])
    return announced > last and not info.num_ack_pending and not info.num_pending


# ---- snapshots -----------------------------------------------------------------------------------


async def _snapshots(
    connection: "asyncpg.Connection[asyncpg.Record]", first: datetime, last: datetime
) -> list[Snapshot]:
    details: dict[tuple[datetime, int], list[Detail]] = defaultdict(list)
    for row in await connection.fetch(_DETAILS, first, last):
        details[row["timestamp"], row["user_id"]].append(
            Detail(row["ticker"], row["shares"], row["current_value"], row["price_per_share"])
        )
    return [
        Snapshot(
            row["timestamp"],
            row["user_id"],
            row["total_value"],
            row["cash_balance"],
            row["investment_value"],
            row["unpriced_positions"],
            tuple(details[row["timestamp"], row["user_id"]]),
        )
        for row in await connection.fetch(_SNAPSHOTS, first, last)
    ]


def earliest_slot(system: System) -> datetime:
    """Return the first slot that any snapshotter may have taken: the one that was under way when it was started."""
    started_at = min(service.spells[0].began_at for service in system.services["snapshotter"])
    return last_boundary(system.now() - timedelta(seconds=time.monotonic() - started_at), SLOT)


def never_due(stored: Iterable[Row], earliest: datetime, now: datetime, active: Iterable[User]) -> list[str]:
    """Return which snapshots are of no slot between the earliest one and now, or of nobody whose turn it was."""
    users = {user.id for user in active}
    latest = now + timedelta(seconds=EARLY_SECONDS_MAX)
    return [
        f"a snapshot at {at:%Y-%m-%d %H:%M:%S.%f} of user {user} that was not due"
        for at, user in sorted((row["timestamp"], row["user_id"]) for row in stored)
        if user not in users or at != last_boundary(at, SLOT) or not earliest <= at <= latest
    ]


async def orphans(connection: "asyncpg.Connection[asyncpg.Record]") -> list[str]:
    """Return which stored positions belong to no snapshot."""
    return [
        f"{row['count']} positions at {row['timestamp']:%Y-%m-%d %H:%M:%S.%f} of user {row['user_id']}"
        for row in await connection.fetch(_ORPHANS)
    ]


def not_once(snapshots: Iterable[Snapshot], slots: Iterable[datetime], active: Iterable[User]) -> list[str]:
    """Return which due (slot, user) has no snapshot, or more than one, and which was never due."""
    stored = Counter((snapshot.at, snapshot.user_id) for snapshot in snapshots)
    due = {(slot, user.id) for slot in slots for user in active}
    found = [f"no snapshot of slot {at:%H:%M:%S} and user {user}" for at, user in sorted(due - stored.keys())]
    found += [
        f"{count} snapshots of slot {at:%H:%M:%S} and user {user}"
        for (at, user), count in sorted(stored.items())
        if count > 1
    ]
    found += [
        f"a snapshot at {at:%H:%M:%S.%f} of user {user} that was not due"
        for at, user in sorted(stored.keys() - due)
    ]
    return found


def uncharted(points: Iterable[Point], values: Iterable[Row]) -> list[str]:
    """Return which points of charts are the value of no snapshot of their user in their bucket."""
    known = {
        Point(row["user_id"], last_boundary(row["timestamp"], CHART_BUCKET), row["total_value"])
        for row in values
    }
    return [
        f"{point.value} of user {point.user_id} at {point.bucket_at:%H:%M}, and no snapshot has it"
        for point in sorted(set(points) - known, key=lambda point: (point.bucket_at, point.user_id))
    ]


def incomplete(snapshots: Iterable[Snapshot], population: Population, steady: Steady) -> list[str]:
    """Return which snapshots have not exactly the positions of their user, or do not add up.

    What was ordered before the slot must be in it; what was ordered later may be, for a slot can be taken late.
    """
    users = {user.id: user for user in population.users}
    found = []
    for snapshot in snapshots:
        if snapshot.user_id not in users:  # it was not due, and that is said
            continue
        user = users[snapshot.user_id]
        name = f"{snapshot.at:%H:%M:%S} of {user.subject}"
        held = {detail.ticker: detail.shares for detail in snapshot.details}
        unpriced = user.shares.keys() & {UNKNOWN_SYMBOL}
        held |= {symbol: user.shares[symbol] for symbol in unpriced}
        if snapshot.unpriced_positions != len(unpriced) or len(held) != len(snapshot.details) + len(unpriced):
            found.append(f"{name}: {snapshot.unpriced_positions} positions without a price, {sorted(held)}")
        orders = user.orders_between(steady(snapshot.at) - EARLY_SECONDS_MAX, math.inf)
        if not any((snapshot.cash_balance, held) == user.holdings(number) for number in orders):
            found.append(f"{name}: cash {snapshot.cash_balance} and {held} after no order in {orders}")
        for detail in snapshot.details:
            if detail.current_value != market_value(detail.shares, detail.price_per_share):
                found.append(f"{name}: {detail}")
        invested = sum((detail.current_value for detail in snapshot.details), Decimal(0))
        if snapshot.investment_value != invested or snapshot.total_value != invested + snapshot.cash_balance:
            found.append(f"{name}: {snapshot.total_value} of {snapshot.investment_value}, not {invested}")
    return found


def torn(snapshots: Iterable[Snapshot]) -> list[str]:
    """Return which slots have more prices of a symbol than shards: a shard is valued from one view of the data."""
    prices: dict[tuple[datetime, str], set[Decimal]] = defaultdict(set)
    for snapshot in snapshots:
        for detail in snapshot.details:
            prices[snapshot.at, detail.ticker].add(detail.price_per_share)
    return [
        f"{ticker} in slot {at:%H:%M:%S}: {sorted(several)}"
        for (at, ticker), several in sorted(prices.items())
        if len(several) > SHARDS
    ]


def untrue(stored: Iterable[Row]) -> list[str]:
    """Return which stored prices the market never had."""
    market = Market(MARKET_SEED)
    return [
        f"{row['symbol']} at {row['price']} as of {row['traded_at']}"
        for row in stored
        if market.price_of(row["symbol"], row["traded_at"]) != row["price"]
    ]


def replaced_at(stored: Iterable[Row]) -> dict[tuple[str, Decimal], datetime | None]:
    """Return when each price of a symbol was replaced by another, the last time; None while it is in the table."""
    found: dict[tuple[str, Decimal], datetime | None] = {}
    last: dict[str, Decimal] = {}
    for row in sorted(stored, key=lambda row: row["written_at"]):
        symbol, price = row["symbol"], row["price"]
        if symbol in last:
            found[symbol, last[symbol]] = row["written_at"]
        found[symbol, price] = None
        last[symbol] = price
    return found


def outdated(
    snapshots: Iterable[Snapshot],
    replaced: Mapping[tuple[str, Decimal], datetime | None],
    was_struck: Callable[[datetime, datetime], bool],
) -> list[str]:
    """Return which prices of snapshots were never in the table, or not any more when their slot began.

    A slot that is taken late has later prices, never earlier ones. `was_struck` tells whether something between two
    moments may have held up the commit of the price that replaced it.
    """
    found = []
    used = {
        (snapshot.at, detail.ticker, detail.price_per_share)
        for snapshot in snapshots
        for detail in snapshot.details
    }
    for at, symbol, price in sorted(used):
        if (symbol, price) not in replaced:
            found.append(f"{symbol} at {price} in slot {at:%H:%M:%S}: it was never stored")
            continue
        until = replaced[symbol, price]
        if until is None or at - until <= timedelta(seconds=COMMIT_SECONDS_MAX) or was_struck(until, at):
            continue
        seconds = (at - until).total_seconds()
        found.append(f"{symbol} at {price} in slot {at:%H:%M:%S}: it was replaced {seconds:.1f} s before")
    return found


def postgres_was_struck(system: System) -> Callable[[datetime, datetime], bool]:
    """Return what tells whether PostgreSQL was struck between two moments."""
    steady = steadily(system)
    spells = [spell for server in system.postgres_servers for spell in server.spells]
    return lambda since, until: any(spell.overlaps(steady(since), steady(until)) for spell in spells)


def steadily(system: System) -> Steady:
    """Return what turns a moment of the system into one of `time.monotonic`, by which orders and spells are noted."""
    now, steady_now = system.now(), time.monotonic()
    return lambda at: steady_now - (now - at).total_seconds()


# ---- orders, bus, processes ----------------------------------------------------------------------


def lost_orders(rows: Iterable[Row], population: Population) -> list[str]:
    """Return whose portfolio lacks an order that was acknowledged."""
    cash: dict[object, object] = {}
    held: dict[object, dict[object, object]] = defaultdict(dict)
    for row in rows:
        cash[row["id"]] = row["cash_balance"]
        if row["ticker"] is not None:
            held[row["id"]][row["ticker"]] = row["shares"]
    found = []
    for user in population.users:
        committed = [order.number for order in user.orders if order.committed_at is not None]
        possible = range(max(committed, default=0), len(user.orders) + 1)
        if not any((cash[user.id], held[user.id]) == user.holdings(number) for number in possible):
            found.append(f"{user.subject} has {cash[user.id]}, after no order in {possible}")
    return found


async def unlike_the_bus(
    connection: "asyncpg.Connection[asyncpg.Record]",
    nats_urls: list[str],
    *,
    seconds_max: float = SETTLE_SECONDS_MAX,
) -> list[str]:
    """Return which last prices on the bus are not those in the table, after some time to settle."""
    client = await nats.connect(nats_urls)
    js = client.jetstream()

    async def differing() -> list[str]:
        found = []
        for row in await connection.fetch("SELECT symbol, price, sequence FROM asset_prices"):
            try:
                message = await js.get_last_msg(PRICES.name, price_subject(row["symbol"]))
                tick = json.loads(message.data or b"{}")
            except nats.js.errors.NotFoundError:
                tick = {"price": None, "sequence": None}
            if (tick["price"] and Decimal(tick["price"]), tick["sequence"]) != (
                row["price"],
                row["sequence"],
            ):
                found.append(f"{row['symbol']} is {dict(row)} in the table and {tick} on the bus")
        return found

    until = time.monotonic() + seconds_max
    try:
        while True:  # prices go on moving: a difference is one when it stays
            found = await differing()
            if not found or time.monotonic() > until:
                return found
            await asyncio.sleep(0.25)
    finally:
        await client.close()


def ended_otherwise(system: System) -> list[str]:
    """Return which services ended otherwise than by SIGKILL when they were killed, or with 0 when asked to stop.

    Of servers, and of the market, only which had to be killed because they did not stop.
    """
    found = [
        f"{part.name} was {NOT_STOPPED}"
        for part in (*system.servers, system.market)
        for end in part.ends
        if NOT_STOPPED in end.after
    ]
    for replicas in system.services.values():
        # Of replicas that are to kill themselves at some point it befalls the first to come there, once.
        deaths_left = int(any(service.kills_itself for service in replicas))
        for service in replicas:
            for end in service.ends:
                if _is_lawful(end):
                    continue
                if end.code == -signal.SIGKILL and NOT_STOPPED not in end.after and deaths_left:
                    deaths_left -= 1
                    continue
                found.append(f"{service.name} {_in_words(end)}: {service.last_error()}")
    return found


def _is_lawful(end: End) -> bool:
    if NOT_STOPPED in end.after:
        return False
    return (KILLED in end.after and end.code == -signal.SIGKILL) or (STOPPING in end.after and end.code == 0)


def _in_words(end: End) -> str:
    if NOT_STOPPED in end.after:
        return f"was {NOT_STOPPED}"
    struck = f" after it was {', '.join(sorted(end.after))}" if end.after else " by itself"
    return f"ended with {end.code}{struck}"


@dataclass(frozen=True)
class Usage:
    """What a process uses."""

    tasks: int
    threads: int
    files: int
    connections: int
    """To PostgreSQL."""
    in_use: int
    """Of these, what pools have lent and not got back."""
    memory_mb: float


async def usage(system: System, *, seconds_max: float = USAGE_SECONDS_MAX) -> dict[str, Usage]:
    """Return what each service uses now, by its name; raises AssertionError for one that does not say."""

    async def said(service: Service) -> Usage:
        async def is_said() -> Usage | None:
            return await usage_of(service)

        try:
            found = await eventually(is_said, timeout=seconds_max, every=0.2)
        except AssertionError:
            raise AssertionError(f"{service.name} does not say what it uses") from None
        assert found is not None
        return found

    services = system.all_services
    found = await asyncio.gather(*map(said, services))
    return {service.name: used for service, used in zip(services, found, strict=True)}


async def usage_of(service: Service) -> Usage | None:
    """Return what a service uses now; None when it does not say."""
    status, text = await service.ask("metrics")
    connections = _samples(text, "database_connections")
    try:
        process = psutil.Process(service.pids()[0])
        return (
            Usage(
                tasks=int(sum(_samples(text, "foliotick_tasks").values())),
                threads=process.num_threads(),
                files=process.num_fds(),
                connections=int(sum(connections.values())),
                in_use=int(sum(count for labels, count in connections.items() if 'state="in_use"' in labels)),
                memory_mb=process.memory_info().rss / 1e6,
            )
            if status == 200
            else None
        )
    except (IndexError, psutil.NoSuchProcess):  # it has ended meanwhile
        return None


def _samples(text: str, metric: str) -> dict[str, float]:
    """Return the samples of a metric by their labels."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.partition("{")[0] == metric:
            found[name.removeprefix(metric)] = float(value)
    return found


async def grown(system: System, before: Mapping[str, Usage]) -> list[str]:
    """Return which services use more than they did, and what was left behind."""
    before = of_any_replica(system, before)
    found: list[str] = []
    for _ in range(10):  # what is under way just now is no leak
        found = [
            each
            for service in system.all_services
            for each in more_than(service.name, before[service.name], await usage_of(service))
        ]
        if not found:
            break
        await asyncio.sleep(1)
    connection = await asyncpg.connect(system.database_url)
    try:
        await eventually(lambda: _are_allowed(connection, system), timeout=30)
    except AssertionError as error:
        found.append(f"connections to PostgreSQL that no service may have: {error.__cause__ or error}")
    finally:
        await connection.close()
    return found + await asyncio.to_thread(left_behind, system)


def of_any_replica(system: System, used: Mapping[str, Usage]) -> dict[str, Usage]:
    """Return for each service the most that any of its replicas used: one that stood by may lead by now."""
    most = {}
    for replicas in system.services.values():
        known = [used[service.name] for service in replicas if service.name in used]
        for service in replicas if known else ():
            most[service.name] = Usage(
                *(max(getattr(each, name.name) for each in known) for name in fields(Usage))
            )
    return most


def more_than(name: str, before: Usage, now: Usage | None) -> list[str]:
    """Return of what a service uses more than it may, by what it used before."""
    if now is None:
        return [f"{name} does not say what it uses"]
    found = []
    for what, (times, more) in MORE_MAX.items():
        most = getattr(before, what) * times + more
        if what == "tasks" and kind_of(name) == "price_feeder":
            most += FEEDER_TASKS
        if getattr(now, what) > most:
            found.append(f"{name}: {getattr(now, what):.0f} {what}, {getattr(before, what):.0f} before")
    return found


def left_behind(system: System) -> list[str]:
    """Return which processes of a service run besides those that are known; whose child they are does not matter.

    A service has none but its own: what it, or one that died, has started shows by what it inherited.
    """
    known = {pid for part in system.parts for pid in part.pids()[:1]}
    return [f"process {pid}" for pid in psutil.pids() if pid not in known and _is_of(pid, system)]


def _is_of(pid: int, system: System) -> bool:
    """Tell whether a process is a service of this system."""
    try:
        return psutil.Process(pid).environ().get("JWT_SECRET") == system.jwt_secret
    except psutil.Error:
        return False


async def _are_allowed(connection: "asyncpg.Connection[asyncpg.Record]", system: System) -> bool:
    """Check that no name has more connections open than all pools of that name may have together."""
    allowed = {
        "": 1,  # of this process
        LISTENERS: len(system.services["api_gateway"]),
    } | await _pools(system)
    open_now = {row["application_name"]: row["count"] for row in await connection.fetch(_OPEN_CONNECTIONS)}
    too_many = beyond(open_now, allowed)
    assert not too_many, "; ".join(too_many)
    return True


async def _pools(system: System) -> dict[str, int]:
    """Return how many connections the pools of all services may have, by the name that PostgreSQL knows them by."""
    allowed: Counter[str] = Counter()
    for service in system.all_services:
        _, text = await service.ask("metrics")
        for labels, most in _samples(text, "database_connections_max").items():
            allowed[labels.removeprefix('{pool="').removesuffix('"}')] += int(most)
    return dict(allowed)


def beyond(open_now: Mapping[str, int], allowed: Mapping[str, int]) -> list[str]:
    """Return who has more connections than are allowed."""
    return [
        f"{name or 'somebody'} has {count}, of {allowed.get(name, 0)}"
        for name, count in sorted(open_now.items())
        if count > allowed.get(name, 0)
    ]
