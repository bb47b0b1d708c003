"""Price feeders that die, freeze and stand by."""

import time
from datetime import datetime
from functools import partial
from pathlib import Path

from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.rows.row import Row, metric, seconds_until, session
from tests.faults.system import Options, System
from tests.faults.tampered import ONCE, runner
from tests.waiting import eventually

TAKEOVER_SECONDS_MAX = 15.0
HEALED_SECONDS_MAX = TAKEOVER_SECONDS_MAX + 1.0
"""A standby takes over, and its first round publishes what the one before did not."""


async def leading_feeder(system: System) -> Service:
    """Return the feeder that has the lease."""

    async def holder() -> Service | None:
        for feeder in system.services["price_feeder"]:
            if await metric(feeder, "price_feeder_lease_held") == 1:
                return feeder
        return None

    found = await eventually(holder, timeout=20)
    assert found is not None
    return found


async def _is_one_leader(system: System) -> bool:
    held = [await metric(feeder, "price_feeder_lease_held") for feeder in system.services["price_feeder"]]
    return sum(held) == 1


async def confirmed_at(system: System) -> datetime:
    """Return when a price was last confirmed."""
    async with session(system) as connection:
        at: datetime = await connection.fetchval("SELECT max(updated_at) FROM asset_prices")
    return at


async def _seconds_without_prices(system: System) -> float:
    """Wait until a price is confirmed that was not yet; return how long that takes."""
    before = await confirmed_at(system)

    async def is_confirmed() -> bool:
        return await confirmed_at(system) > before

    return await seconds_until(is_confirmed, 2 * TAKEOVER_SECONDS_MAX)


async def _standby(system: System, _: Life) -> str:
    seen = []
    for what in ("killed", "frozen"):
        leader = await leading_feeder(system)
        if what == "frozen":
            leader.freeze()
        else:
            leader.kill()
        seconds = await _seconds_without_prices(system)
        assert seconds <= TAKEOVER_SECONDS_MAX, f"{seconds:.1f} s without prices after it was {what}"
        new = await leading_feeder(system)
        assert what == "killed" or new is not leader
        leader.thaw()
        await leader.wait_until_ready()
        await eventually(partial(_is_one_leader, system))
        seen.append(f"{leader.name} {what}, prices again after {seconds:.1f} s")
    return "; ".join(seen)


def _dies_before_publishing(folder: Path) -> Options:
    return Options(
        wrapper={"price_feeder": runner("price_feeder", "die_before_publishing")},
        environment={ONCE: str(folder / "died")},
    )


async def _before_publishing(system: System, _: Life) -> str:
    """The one that had the lease has killed itself with SIGKILL after a commit, before publishing."""
    feeders = system.services["price_feeder"]

    async def has_died() -> bool:
        return any(-9 in each.exit_codes for each in feeders)

    await eventually(has_died, timeout=20)
    began = time.monotonic()
    await leading_feeder(system)
    seconds = await _seconds_without_prices(system)
    assert time.monotonic() - began <= HEALED_SECONDS_MAX, f"{time.monotonic() - began:.1f} s"
    return f"prices again {seconds:.1f} s later; the checker compares table and bus"


ROWS = (
    Row(4, "two of everything", "the feeder with the lease is killed, then frozen", _standby),
    Row(
        6,
        "feeder dies between cache write and publish",
        "SIGKILL between the two",
        _before_publishing,
        _dies_before_publishing,
    ),
)
