"""Many waits on one timer."""

import asyncio
import time

from shared.deadlines import Deadlines
from tests.waiting import eventually


async def test_waits_expire_in_order_and_not_before_their_time() -> None:
    expired: list[tuple[str, float]] = []
    started = time.monotonic()
    deadlines: Deadlines[str] = Deadlines(0.1, lambda key: expired.append((key, time.monotonic() - started)))
    for key in ("first", "second", "third"):
        deadlines.start(key)

    async def all_have_expired() -> bool:
        return len(expired) == 3

    await eventually(all_have_expired)
    assert [key for key, _ in expired] == ["first", "second", "third"]
    assert min(after for _, after in expired) >= 0.1


async def test_ended_wait_does_not_expire_and_the_later_ones_still_do() -> None:
    expired: list[str] = []
    deadlines: Deadlines[str] = Deadlines(0.05, expired.append)
    deadlines.start("ended")
    deadlines.start("kept")
    assert deadlines.end("ended")
    assert not deadlines.end("ended")

    async def one_has_expired() -> bool:
        return bool(expired)

    await eventually(one_has_expired)
    assert expired == ["kept"]
    assert not deadlines.end("kept")


async def test_waits_can_all_be_made_shorter_and_none_longer() -> None:
    expired: list[tuple[str, float]] = []
    started = time.monotonic()
    deadlines: Deadlines[str] = Deadlines(60, lambda key: expired.append((key, time.monotonic() - started)))
    deadlines.start("first")
    deadlines.start("second")
    deadlines.end_within(0.1)
    deadlines.start("later")
    deadlines.end_within(30)

    async def three_have_expired() -> bool:
        return len(expired) == 3

    await eventually(three_have_expired)
    assert [key for key, _ in expired] == ["first", "second", "later"]
    assert min(after for _, after in expired) >= 0.1
    deadlines.end_within(0)
    deadlines.start("too late")

    async def fourth_has_expired() -> bool:
        return len(expired) == 4

    await eventually(fourth_has_expired)


async def test_wait_begun_after_all_others_ended_expires_too() -> None:
    expired = asyncio.Event()
    deadlines: Deadlines[str] = Deadlines(0.05, lambda _: expired.set())
    deadlines.start("a")
    deadlines.end("a")
    await asyncio.wait(
        {asyncio.ensure_future(expired.wait())}, timeout=0.1
    )  # the timer of "a" has looked by now
    assert not expired.is_set()
    deadlines.start("b")
    async with asyncio.timeout(5):
        await expired.wait()


async def test_expired_key_can_be_started_again_by_what_it_expires_to() -> None:
    times: list[float] = []

    def again(key: str) -> None:
        times.append(time.monotonic())
        if len(times) < 3:
            deadlines.start(key)

    deadlines: Deadlines[str] = Deadlines(0.03, again)
    deadlines.start("a")

    async def three_times() -> bool:
        return len(times) == 3

    await eventually(three_times)
    assert times[1] - times[0] >= 0.03
    assert times[2] - times[1] >= 0.03
