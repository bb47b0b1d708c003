"""Price feeders that die, freeze and stand by."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import NamedTuple

import nats

from services.market_simulator.instants import rfc3339
from services.market_simulator.market import Trade
from services.price_feeder.queries import LEASE
from shared.clock import utc_now
from shared.messages import PRICES, price_subject
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.rows.row import (
    Row,
    arm,
    confirmed_at,
    control,
    deaths,
    died_since,
    metric,
    seconds_until,
    session,
    tampered_when_armed,
)
from tests.faults.signs import GONE, Sign
from tests.faults.system import MARKET_SEED, System
from tests.faults.truth import Market, traded_at
from tests.waiting import eventually

TAKEOVER_SECONDS_MAX = 15.0
HEALED_SECONDS_MAX = TAKEOVER_SECONDS_MAX + 1.0
"""A standby takes over, and its first round publishes what the one before did not."""
POLLED_SECONDS = 5.0
"""So long it is counted who polls: rounds are a second apart."""
ROUNDS_MIN = 2
"""In that time, on a slow machine too."""
UNCOUNTED_MAX = 3
"""Requests that the market has counted and the feeder not: those of a round that is under way, and the calendar's."""
REQUESTS = 'price_feeder_requests_total{outcome="ok"}'


class Term(NamedTuple):
    """A term of the lease, as the database has it."""

    number: int
    holder: str
    """Host, process id, and a word of chance."""


class Price(NamedTuple):
    """A price, in the table or on the bus."""

    sequence: int
    price: Decimal
    traded_at: datetime


async def lease_holder(system: System) -> Service:
    """Return the feeder that has the lease."""

    async def holder() -> Service | None:
        for feeder in system.services["price_feeder"]:
            if await metric(feeder, "price_feeder_lease_held") == 1:
                return feeder
        return None

    found = await eventually(holder, timeout=20)
    assert found is not None
    return found


async def change_lease_holder(system: System) -> Service:
    """Stop the feeder that has the lease, as an operator does; return the one that has it then."""
    old = await lease_holder(system)
    await old.terminate()
    new = await lease_holder(system)
    await old.wait_until_ready()
    return new


# ---- 4: two of everything ------------------------------------------------------------------------


async def _standby(system: System, _: Life) -> str:
    seen = []
    for what in ("killed", "frozen"):
        leader = await lease_holder(system)
        before = await _term(system)
        if what == "frozen":
            leader.freeze()
        else:
            leader.kill()
        seconds = await _seconds_to_takeover(system, before)
        new = _feeder_of(system, await _term(system))
        assert what == "killed" or new is not leader, f"{leader.name} is frozen, and has the lease"
        leader.thaw()
        await leader.wait_until_ready()
        requests = await _requests_of_one(system)
        seen.append(
            f"{leader.name} {what}, a new term of {new.name} has prices after {seconds:.1f} s, "
            f"and it alone polls: {requests:g} requests in {POLLED_SECONDS:g} s"
        )
    return "; ".join(seen)


async def _term(system: System) -> Term:
    async with session(system) as connection:
        row = await connection.fetchrow("SELECT term, holder FROM leases WHERE name = $1", LEASE)
    assert row is not None
    return Term(row["term"], row["holder"])


def _feeder_of(system: System, term: Term) -> Service:
    pid = int(term.holder.rsplit(":", 2)[1])
    for feeder in system.services["price_feeder"]:
        if pid in feeder.pids():
            return feeder
    raise AssertionError(f"{term.holder} has the lease, and is no feeder of ours")


async def _seconds_to_takeover(system: System, before: Term) -> float:
    """Wait until a price is confirmed in a later term; return how long that takes from now.

    The time of the confirmation tells it from a write that was under way when the old term's feeder was struck.
    """
    since = utc_now()

    async def has_taken_over() -> bool:
        term = await _term(system)
        return term.number > before.number and await confirmed_at(system) > since

    seconds = await seconds_until(has_taken_over, 2 * TAKEOVER_SECONDS_MAX)
    assert seconds <= TAKEOVER_SECONDS_MAX, f"taken over after {seconds:.1f} s"
    return seconds


async def _requests_of_one(system: System) -> float:
    """See for a while that one feeder polls, and nobody else asks the market; return how many requests it sent."""
    await eventually(partial(_is_one_leader, system), timeout=20)
    feeders = system.services["price_feeder"]
    holder = _feeder_of(system, await _term(system))
    before = {feeder.name: await metric(feeder, REQUESTS) for feeder in feeders}
    market_before = (await control(system, "GET", "status"))["requests"]
    await asyncio.sleep(POLLED_SECONDS)
    market = (await control(system, "GET", "status"))["requests"] - market_before
    sent = {feeder.name: await metric(feeder, REQUESTS) - before[feeder.name] for feeder in feeders}
    requests = sent.pop(holder.name)
    assert requests >= ROUNDS_MIN, f"{holder.name} has the lease and sent {requests:g} requests"
    assert not any(sent.values()), f"{holder.name} has the lease, and polled has {sent} as well"
    assert market <= requests + UNCOUNTED_MAX, (
        f"the market was asked {market} times, {requests:g} by the holder"
    )
    return requests


async def _is_one_leader(system: System) -> bool:
    held = [await metric(feeder, "price_feeder_lease_held") for feeder in system.services["price_feeder"]]
    return sum(held) == 1


# ---- 6: stored and not published -----------------------------------------------------------------


async def _before_publishing(system: System, _: Life) -> str:
    """The one that has the lease kills itself with SIGKILL after a commit, before publishing.

    What it had not published must be the last trade of a symbol that trades no more: any newer one would heal that.
    """
    symbol = system.population.ordering[0].ordered_symbol
    leader = await lease_holder(system)
    async with _pinned(system, symbol) as last:
        old = await eventually(partial(_agreed, system, symbol, last))
        assert old is not None
        trade = await eventually(partial(_trade_after, symbol, last))
        assert trade is not None
        before = deaths(system, "price_feeder")
        arm(system, symbol)
        await _pin(system, symbol, trade)
        died = await died_since(system, "price_feeder", before)
        assert died is leader, f"{died.name} died, and {leader.name} had the lease"
        stored, published = await _stored(system, symbol), await _published(system, symbol)
        expected = Price(old.sequence + 1, trade.price, traded_at(trade))
        assert stored == expected, f"{symbol} is {stored} in the table, and not {expected}"
        assert published == old, f"{symbol} is {published} on the bus though it died before"

        async def is_published() -> bool:
            return await _published(system, symbol) == stored

        seconds = await seconds_until(is_published, 2 * HEALED_SECONDS_MAX)
        assert seconds <= HEALED_SECONDS_MAX, f"published after {seconds:.1f} s"
        assert await _stored(system, symbol) == stored, f"{symbol} has traded meanwhile"
    return (
        f"{died.name} died when change {stored.sequence} of {symbol} was in the table and {old.sequence} on the bus; "
        f"published {seconds:.1f} s later"
    )


@asynccontextmanager
async def _pinned(system: System, symbol: str) -> AsyncIterator[Trade]:
    """Let a symbol trade no more while the block runs: the market's last trade of it, which is yielded, stays so."""

    async def pin_last() -> Trade | None:
        trade = _last_trade(symbol)
        await _pin(system, symbol, trade)
        return trade if _last_trade(symbol) == trade else None  # else there was a newer one just before

    try:
        last = await eventually(pin_last)
        assert last is not None
        yield last
    finally:
        await control(system, "DELETE", f"prices?symbols={symbol}")


async def _pin(system: System, symbol: str, trade: Trade) -> None:
    """Make a trade the last one. It is one of the market's own, so that its price is true."""
    await control(system, "PUT", "prices", {symbol: {"price": str(trade.price), "at": rfc3339(trade.at_ns)}})


def _last_trade(symbol: str) -> Trade:
    return Market(MARKET_SEED).latest_trade(symbol, utc_now())


async def _trade_after(symbol: str, trade: Trade) -> Trade | None:
    last = _last_trade(symbol)
    return last if last.at_ns > trade.at_ns else None


async def _agreed(system: System, symbol: str, trade: Trade) -> Price | None:
    """Return a symbol's price if it is that of a trade, in the table and on the bus."""
    stored = await _stored(system, symbol)
    is_trade = stored.traded_at == traded_at(trade)
    return stored if is_trade and stored == await _published(system, symbol) else None


async def _stored(system: System, symbol: str) -> Price:
    async with session(system) as connection:
        row = await connection.fetchrow(
            "SELECT sequence, price, traded_at FROM asset_prices WHERE symbol = $1", symbol
        )
    assert row is not None
    return Price(row["sequence"], row["price"], row["traded_at"])


async def _published(system: System, symbol: str) -> Price:
    client = await nats.connect(system.nats_urls)
    try:
        message = await client.jetstream().get_last_msg(PRICES.name, price_subject(symbol))
    finally:
        await client.close()
    tick = json.loads(message.data or b"")
    return Price(tick["sequence"], Decimal(tick["price"]), datetime.fromisoformat(tick["traded_at"]))


TAKEN_OVER = (Sign(GONE, "price_feeder_lease_held", "lease_acquired"),)
ROWS = (
    Row(
        4, "two of everything", "the feeder with the lease is killed, then frozen", _standby, signs=TAKEN_OVER
    ),
    Row(
        6,
        "feeder dies between cache write and publish",
        "SIGKILL between the two, with the last trade of a symbol that trades no more",
        _before_publishing,
        tampered_when_armed("price_feeder", "die_before_publishing"),
        signs=TAKEN_OVER,
    ),
)
