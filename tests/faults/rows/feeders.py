"""Price feeders that die, freeze and stand by."""

import asyncio
from functools import partial
from typing import NamedTuple

from services.price_feeder.queries import LEASE
from shared.clock import utc_now
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.rows.row import (
    Row,
    armed_to_die,
    confirmed_at,
    control,
    metric,
    seconds_to_prices,
    seconds_until,
    session,
    tampered_when_armed,
)
from tests.faults.signs import GONE, Sign
from tests.faults.system import System
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


async def _before_publishing(system: System, _: Life) -> str:
    """The one that has the lease kills itself with SIGKILL after a commit, before publishing."""
    leader = await lease_holder(system)
    died = await armed_to_die(system, "price_feeder")
    assert died is leader, f"{died.name} died, and {leader.name} had the lease"
    seconds = await seconds_to_prices(system, HEALED_SECONDS_MAX)
    return f"{died.name} died, prices again {seconds:.1f} s later; the checker compares table and bus"


TAKEN_OVER = (Sign(GONE, "price_feeder_lease_held", "lease_acquired"),)
ROWS = (
    Row(
        4, "two of everything", "the feeder with the lease is killed, then frozen", _standby, signs=TAKEN_OVER
    ),
    Row(
        6,
        "feeder dies between cache write and publish",
        "SIGKILL between the two",
        _before_publishing,
        tampered_when_armed("price_feeder", "die_before_publishing"),
        signs=TAKEN_OVER,
    ),
)
