"""Who is let in and who is refused, with a clock of the test's own and numbers worked by hand."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from services.api_gateway import episodes, refusals, user_rates
from services.api_gateway.admission import Admission, Place
from services.api_gateway.problems import Kind, Problem
from services.api_gateway.refusals import Bucket, Holding
from services.api_gateway.user_rates import UserRates
from shared.database import DatabaseUnavailable


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def admission(clock: Clock) -> AsyncIterator[Admission]:
    made = Admission(10, clock)
    yield made
    made.overload.end()


def taken(admission: Admission, wanted: int = 10_000) -> list[Place]:
    """Take places until one is refused, or so many."""
    places: list[Place] = []
    while len(places) < wanted:
        try:
            places.append(admission.place())
        except Problem:
            break
    return places


def learn(admission: Admission, clock: Clock, seconds: float, times: int = 300) -> None:
    """Let readings of that length follow each other, each alone."""
    for _ in range(times):
        with admission.place():
            clock.now += seconds


def refusal(admission: Admission) -> Kind:
    with pytest.raises(Problem) as refused:
        admission.place()
    assert refused.value.headers["Retry-After"] == "2"
    return refused.value.kind


# ---- admission -----------------------------------------------------------------------------------


async def test_as_many_wait_as_are_answered_in_a_tenth_of_a_second(
    admission: Admission, clock: Clock
) -> None:
    learn(admission, clock, 0.001)
    first = admission.place()
    clock.now += 1  # it is no burst any more
    assert len(taken(admission)) == pytest.approx(99, abs=1)  # and the first one: 100 places of 1 ms
    assert refusal(admission).name == "overloaded"
    first.leave(None)


async def test_slow_readings_leave_room_for_those_that_are_asked_at_once(
    admission: Admission, clock: Clock
) -> None:
    learn(admission, clock, 2.0)
    places = [admission.place()]
    clock.now += 1
    places += taken(admission)
    assert len(places) == 10
    for place in places:
        place.leave(None)
    assert len(taken(admission, 64)) == 64  # a few are let in at any time, once nobody waits


async def test_burst_is_let_in_up_to_its_bound(admission: Admission) -> None:
    assert len(taken(admission)) == 256


async def test_readings_that_end_make_room_at_once(admission: Admission, clock: Clock) -> None:
    places = taken(admission)
    clock.now += 0.4
    assert refusal(admission).name == "overloaded"
    for place in places:
        place.leave(None)  # 0.4 s for the first alone, and less than a millisecond each for the last ones
    with admission.place():
        pass


async def test_refusal_names_the_database_while_it_answers_nobody(admission: Admission, clock: Clock) -> None:
    places = taken(admission, 256)
    clock.now += 3
    places.pop().leave(DatabaseUnavailable("away"))
    assert refusal(admission).name == "database-unavailable"
    assert await admission.check() is None  # the check of the database says it
    places.pop().leave(None)
    assert refusal(admission).name == "overloaded"


async def test_overload_is_said_when_it_begins_and_ends_and_meanwhile(
    admission: Admission,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(episodes, "CALM_SECONDS", 0.05)
    assert await admission.check() is None
    taken(admission)
    refusal(admission)
    assert (await admission.check() or "").startswith("overloaded, requests refused: 2 in 0 s; start another")
    async with asyncio.timeout(5):
        while admission.overload.is_on:  # noqa: ASYNC110  # it ends by itself
            await asyncio.sleep(0.01)
    assert await admission.check() is None
    said = capsys.readouterr().out
    assert (said.count("overload_began"), said.count("overload_ended"), said.count("advice")) == (1, 1, 1)


# ---- users ---------------------------------------------------------------------------------------


def wait_of(rates: UserRates, subject: str) -> int:
    """Return the seconds that the user is told to wait, 0 when he is served."""
    try:
        rates.check(subject)
    except Problem as problem:
        return int(problem.headers["Retry-After"])
    return 0


@pytest.fixture
async def rates(clock: Clock) -> AsyncIterator[UserRates]:
    made = UserRates(0.5, 3, clock)  # one in two seconds, three at once
    yield made
    made.episode.end()


async def test_user_gets_his_burst_and_then_his_rate(rates: UserRates, clock: Clock) -> None:
    assert [wait_of(rates, "demo") for _ in range(4)] == [0, 0, 0, 2]
    with pytest.raises(Problem, match=r"too-many-requests: A user may ask 0\.5 times a second"):
        rates.check("demo")
    clock.now += 1.5
    assert wait_of(rates, "demo") == 1
    clock.now += 0.5
    assert [wait_of(rates, "demo") for _ in range(2)] == [0, 2]
    clock.now += 3600
    assert [wait_of(rates, "demo") for _ in range(4)] == [0, 0, 0, 2]


async def test_greedy_user_takes_nothing_from_another(rates: UserRates) -> None:
    for _ in range(100):
        wait_of(rates, "greedy")
    assert wait_of(rates, "modest") == 0
    note = await rates.check_readiness()
    assert note is not None
    assert note.startswith("users over USER_REQUESTS_PER_SECOND, requests refused: 97 ")


async def test_without_a_rate_any_number_is_served() -> None:
    unlimited = UserRates(0, 1)
    assert not any(wait_of(unlimited, "demo") for _ in range(1000))


async def test_buckets_are_kept_for_so_many_users_and_no_more(
    rates: UserRates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_rates, "USERS_MAX", 2)
    for _ in range(4):
        wait_of(rates, "demo")
    assert wait_of(rates, "alice") == 0
    assert wait_of(rates, "demo") == 2  # still known, and now the latest
    assert wait_of(rates, "bob") == 0
    assert wait_of(rates, "demo") == 2
    assert len(rates._buckets) == 2


# ---- refusals ------------------------------------------------------------------------------------


@dataclass
class Request:
    transport: object = "a connection"


def test_bucket_is_full_again_after_its_time() -> None:
    bucket = Bucket(per_second=4, burst=2)
    assert [bucket.take(10), bucket.take(10), bucket.take(10)] == [0, 0, 0.25]
    assert bucket.take(10.2) == pytest.approx(0.05)
    assert bucket.take(10.25) == 0
    assert [bucket.take(99), bucket.take(99), bucket.take(99)] == [0, 0, 0.25]


async def test_refusals_beyond_the_rate_leave_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PER_SECOND", 50)
    holding = Holding(seconds_max=60)
    held = []
    for _ in range(70):
        if holding.is_to_be_held():
            held.append(asyncio.ensure_future(holding.hold(Request())))
            await asyncio.sleep(0)
    assert 18 <= len(held) <= 20  # 50 leave at once, and one or two in the time that this takes
    done, _ = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
    assert done == {held[0]}
    async with asyncio.timeout(10):
        await asyncio.gather(*held)


async def test_nobody_is_held_back_for_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PER_SECOND", 0.001)
    holding = Holding(seconds_max=0.2)
    async with asyncio.timeout(10):
        await asyncio.gather(*(holding.hold(Request()) for _ in range(200)))


async def test_nothing_is_held_back_any_more_once_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PER_SECOND", 0.001)
    holding = Holding(seconds_max=3600)
    waiting = [asyncio.ensure_future(holding.hold(Request())) for _ in range(3)]
    await asyncio.sleep(0)
    assert holding.is_to_be_held()
    holding.release()
    async with asyncio.timeout(10):
        await asyncio.gather(*waiting)
    assert not holding.is_to_be_held()


async def test_nobody_waits_behind_clients_that_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PER_SECOND", 0.001)
    holding = Holding(seconds_max=3600)
    gone = [asyncio.ensure_future(holding.hold(Request(None))) for _ in range(100)]
    stayed = asyncio.ensure_future(holding.hold(Request()))
    async with asyncio.timeout(10):
        await asyncio.gather(*gone)
    assert not stayed.done()
    holding.release()
    await stayed
