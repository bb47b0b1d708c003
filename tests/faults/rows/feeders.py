"""Price feeders that die, freeze and stand by."""

from functools import partial

from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.rows.row import Row, armed_to_die, metric, seconds_to_prices, tampered_when_armed
from tests.faults.signs import GONE, Sign
from tests.faults.system import System
from tests.waiting import eventually

TAKEOVER_SECONDS_MAX = 15.0
HEALED_SECONDS_MAX = TAKEOVER_SECONDS_MAX + 1.0
"""A standby takes over, and its first round publishes what the one before did not."""


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


async def _is_one_leader(system: System) -> bool:
    held = [await metric(feeder, "price_feeder_lease_held") for feeder in system.services["price_feeder"]]
    return sum(held) == 1


async def _standby(system: System, _: Life) -> str:
    seen = []
    for what in ("killed", "frozen"):
        leader = await lease_holder(system)
        if what == "frozen":
            leader.freeze()
        else:
            leader.kill()
        seconds = await seconds_to_prices(system, TAKEOVER_SECONDS_MAX)
        new = await lease_holder(system)
        assert what == "killed" or new is not leader
        leader.thaw()
        await leader.wait_until_ready()
        await eventually(partial(_is_one_leader, system))
        seen.append(f"{leader.name} {what}, prices again after {seconds:.1f} s")
    return "; ".join(seen)


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
