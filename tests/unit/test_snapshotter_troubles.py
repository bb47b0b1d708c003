"""What the snapshotter says of its troubles in /readyz."""

from datetime import timedelta

from services.snapshotter.troubles import Troubles
from shared.health import Degraded

MINUTE = timedelta(minutes=1)


async def test_nothing_is_said_when_nothing_is_wrong() -> None:
    assert await Troubles(MINUTE).check() is None


async def test_what_lasts_is_said_until_it_ends_and_once_for_all_that_wait_alike() -> None:
    troubles = Troubles(MINUTE)
    first, second = troubles.number(), troubles.number()
    for key in (first, second):
        troubles.begin(key, "a slot waits: PostgreSQL is away")
    troubles.begin("history", "the history is not kept up")
    said = await troubles.check()
    assert said == "a slot waits: PostgreSQL is away; the history is not kept up"
    assert isinstance(said, Degraded)  # the service is ready all the same
    troubles.end("history")
    troubles.end(first)
    assert await troubles.check() == "a slot waits: PostgreSQL is away"
    troubles.end(second)
    troubles.end(second)
    assert await troubles.check() is None


async def test_what_happened_is_said_for_two_intervals_the_last_of_each_kind() -> None:
    now = 1000.0
    troubles = Troubles(timedelta(minutes=5), clock=lambda: now)
    troubles.happened("skipped", "slot 1 was skipped")
    now += 300
    troubles.happened("missed", "slot 2 was not announced")
    assert await troubles.check() == "slot 1 was skipped; slot 2 was not announced"
    now += 299
    troubles.happened("missed", "slot 3 was not announced")
    assert await troubles.check() == "slot 1 was skipped; slot 3 was not announced"
    now += 2
    assert await troubles.check() == "slot 3 was not announced"
    now += 600
    assert await troubles.check() is None


async def test_short_intervals_are_remembered_for_a_minute() -> None:
    now = 0.0
    troubles = Troubles(timedelta(seconds=1), clock=lambda: now)
    troubles.happened("skipped", "slot 1 was skipped")
    now += 59
    assert await troubles.check() == "slot 1 was skipped"
    now += 2
    assert await troubles.check() is None


async def test_line_stays_short() -> None:
    troubles = Troubles(MINUTE)
    for number in range(8):
        troubles.begin(number, f"trouble {number}")
    assert await troubles.check() == "trouble 0; trouble 1; trouble 2; trouble 3; trouble 4; and 3 more"
