"""Charts that are kept: how long, for whom, and how they travel. On a real database, and on NATS where it matters."""

import asyncio
import gzip
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

import aiohttp
import pytest

from local.servers import nats_server
from services.api_gateway import queries
from services.api_gateway.admission import Admission
from services.api_gateway.charts import REQUESTED_MAX, Asked, Charts, News
from services.api_gateway.performance import Timeframe
from services.api_gateway.problems import Problem
from services.api_gateway.responses import Performance
from shared.bus import Bus, Outgoing
from shared.clock import last_boundary, utc_now
from shared.database import Connection, Database, DatabaseUnavailable
from shared.messages import (
    REQUESTED_SNAPSHOT_TAKEN,
    SNAPSHOTS_TAKEN,
    PriceTick,
    SnapshotsTaken,
    SnapshotTaken,
    price_subject,
)
from tests.factories import add_snapshot, create_user, set_position, set_price
from tests.gateway import Answer, Gateway, bearer, running
from tests.metrics import sample
from tests.waiting import eventually

T = TypeVar("T")
CHART = "/api/portfolio/performance"
CURRENT = "/api/portfolio/current"
NOW = datetime(2026, 6, 1, 12, 2, tzinfo=UTC)
MEGABYTE = 1024 * 1024
LIVE = Asked("demo", Timeframe.ONE_DAY)


class Watched(Database):
    """A database that counts what it is asked; it can be slow, and it can be away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.asked: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.is_away = False

    async def fetch_row(self, statement: str, *args: object, timeout: float | None = None) -> Any:
        self.asked.append("live" if statement == queries.LIVE_VALUE else "chart")
        if self.is_away:
            raise DatabaseUnavailable("away")
        row = await self._database.fetch_row(statement, *args, timeout=timeout)
        await self.open.wait()  # the answer is on its way
        return row

    async def run(self, work: Callable[[Connection], Awaitable[T]], seconds_max: float = 0) -> T:
        raise AssertionError("a chart is read row by row")

    def taken(self) -> list[str]:
        """Return what was asked since the last call."""
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def watched(database: Database) -> Watched:
    return Watched(database)


@pytest.fixture
def news() -> News:
    """News that are complete."""
    heard = News()
    heard.resumed()
    return heard


@pytest.fixture
async def charts(watched: Watched, news: News) -> AsyncIterator[Charts]:
    made = new_charts(watched, news)
    yield made
    await made.close()


def new_charts(
    database: Database, news: News, *, bytes_max: int = MEGABYTE, seconds_max: float = 5
) -> Charts:
    return Charts(
        database,
        ZoneInfo("America/New_York"),
        news,
        Admission(4),
        bytes_max=bytes_max,
        reading_seconds_max=seconds_max,
    )


async def text(charts: Charts, now: datetime = NOW, asked: Asked = LIVE) -> str:
    """Return the answer at `now`, kept or read."""
    return (await charts.answer(asked, now)).body.decode()


async def current_value(charts: Charts, now: datetime = NOW, asked: Asked = LIVE) -> str:
    value: str = json.loads(await text(charts, now, asked), parse_float=str)["current_value"]
    return value


def values(answer: str) -> list[str]:
    return [point["value"] for point in json.loads(answer, parse_float=str)["data_points"]]


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def hear_tick(news: News) -> None:
    news.heard("prices.v1.equity.A", b"of no interest")


def hear_snapshots(news: News, shard: int = 0, shards: int = 1) -> None:
    taken = SnapshotsTaken(
        scheduled_at=NOW, shard=shard, shards=shards, portfolios=1, positions=1, unpriced=0
    )
    news.heard(SNAPSHOTS_TAKEN, taken.model_dump_json().encode())


def hear_requested(news: News, user_id: int) -> None:
    taken = SnapshotTaken(
        user_id=user_id,
        timestamp=NOW,
        total_value=Decimal(1),
        cash_balance=Decimal(1),
        investment_value=Decimal(0),
        unpriced_positions=0,
        simulated=False,
    )
    news.heard(REQUESTED_SNAPSHOT_TAKEN, taken.model_dump_json().encode())


# ---- how long a chart is kept --------------------------------------------------------------------


async def test_answer_is_served_again_without_the_database(
    database: Database, watched: Watched, charts: Charts
) -> None:
    user_id = await create_user(database, cash="5")
    await add_snapshot(database, user_id, NOW - timedelta(hours=1), "4")
    first = await charts.answer(LIVE, NOW)
    assert watched.taken() == ["chart"]
    assert values(first.body.decode()) == ["4.00"]
    assert charts.kept(LIVE, NOW + seconds(0.9)) is first
    assert await charts.answer(LIVE, NOW + seconds(0.9)) is first
    assert watched.taken() == []


async def test_after_a_second_the_live_value_is_read_again_and_the_points_are_not(
    database: Database, watched: Watched, charts: Charts
) -> None:
    await create_user(database, cash="5")
    await text(charts)
    await database.fetch("UPDATE users SET cash_balance = 6")
    watched.taken()
    assert await current_value(charts, NOW + seconds(0.999)) == "5.00"
    assert await current_value(charts, NOW + seconds(1)) == "6.00"
    assert watched.taken() == ["live"]


async def test_clock_that_was_set_back_ends_what_is_kept(
    database: Database, watched: Watched, charts: Charts
) -> None:
    await create_user(database)
    await text(charts)
    assert charts.kept(LIVE, NOW - seconds(0.001)) is None
    watched.taken()
    await text(charts, NOW - seconds(60))
    assert watched.taken() == ["chart"]


async def test_tick_makes_the_live_value_old_and_not_the_points(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    await create_user(database, positions={"A": ("2", "1")})
    await set_price(database, "A", "10")
    assert await current_value(charts) == "20.00"
    await set_price(database, "A", "11")
    watched.taken()
    assert await current_value(charts) == "20.00"
    hear_tick(news)
    assert await current_value(charts) == "22.00"
    assert watched.taken() == ["live"]


async def test_tick_heard_while_the_answer_was_read_counts(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    """The value was read before the price was committed, the tick heard before the answer was kept."""
    await create_user(database, positions={"A": ("2", "1")})
    await set_price(database, "A", "10")
    watched.open.clear()
    reading = asyncio.ensure_future(charts.answer(LIVE, NOW))
    await is_asked(watched, "chart")
    await database.fetch_value("SELECT pg_sleep(0.05)")  # the statement has surely been run by now
    await set_price(database, "A", "11")
    hear_tick(news)
    watched.open.set()
    assert '"current_value":20.00' in (await reading).body.decode()
    assert await current_value(charts) == "22.00"


@pytest.mark.parametrize(("shard_of_user", "asked"), [(True, ["chart"]), (False, ["live"])])
async def test_snapshots_of_the_users_shard_make_the_points_old_and_those_of_others_do_not(
    database: Database, watched: Watched, charts: Charts, news: News, *, shard_of_user: bool, asked: list[str]
) -> None:
    user_id = await create_user(database)
    await text(charts)
    await add_snapshot(database, user_id, NOW - timedelta(minutes=2), "7")
    watched.taken()
    hear_snapshots(news, (user_id + (0 if shard_of_user else 1)) % 3, 3)
    answer = await text(charts)
    assert watched.taken() == asked
    assert values(answer) == (["7.00"] if shard_of_user else [])


async def test_snapshot_on_request_makes_the_points_of_its_user_old_and_no_others(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    users = [await create_user(database, name) for name in ("demo", "other")]
    others = Asked("other", Timeframe.ONE_DAY)
    for asked in (LIVE, others):
        await charts.answer(asked, NOW)
    watched.taken()
    await add_snapshot(database, users[0], NOW, "7")
    hear_requested(news, users[0])
    assert values(await text(charts)) == ["7.00"]
    assert watched.taken() == ["chart"]
    await charts.answer(others, NOW)
    assert watched.taken() == ["live"]
    await add_snapshot(database, users[1], NOW, "8")
    charts.forget(users[1])  # as the gateway does that asked for it, before the bus tells
    assert values(await text(charts, asked=others)) == ["8.00"]


async def test_users_beyond_those_that_are_told_apart_count_for_everyone(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    user_id = await create_user(database)
    await charts.answer(LIVE, NOW)
    hear_requested(news, user_id)
    for number in range(REQUESTED_MAX - 1):
        hear_requested(news, user_id + 1 + number)
    announcement = news.announcements
    assert not news.has_snapshot_since(announcement - REQUESTED_MAX, user_id + REQUESTED_MAX)
    hear_requested(news, user_id + REQUESTED_MAX)  # the first one's has no place any more
    assert news.has_snapshot_since(announcement - REQUESTED_MAX, user_id)
    assert news.has_snapshot_since(announcement - REQUESTED_MAX, user_id + 1_000_000)
    assert not news.has_snapshot_since(announcement - REQUESTED_MAX + 1, user_id + 1_000_000)
    watched.taken()
    await charts.answer(LIVE, NOW)
    assert watched.taken() == ["chart"]


async def test_number_of_shards_may_change_between_two_slots(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    user_id = await create_user(database)
    for shards in (1, 4, 2):
        hear_snapshots(news, user_id % shards, shards)
        watched.taken()
        await text(charts)
        assert watched.taken() == ["chart"]
        for others in (2, 4):
            hear_snapshots(news, (user_id + 1) % others, others)
        await text(charts)
        assert watched.taken() == ["live"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b'{"scheduled_at":"2026-06-01T12:00:00Z","shard":0,"shards":0,"portfolios":1,"positions":1,"unpriced":0}',
        b'{"scheduled_at":"2026-06-01T12:00:00Z","shard":9,"shards":4,"portfolios":1,"positions":1,"unpriced":0}',
    ],
)
async def test_announcement_that_is_not_understood_counts_for_everyone(
    database: Database, watched: Watched, charts: Charts, news: News, payload: bytes
) -> None:
    await create_user(database)
    await text(charts)
    watched.taken()
    news.heard(SNAPSHOTS_TAKEN, payload)
    await text(charts)
    assert watched.taken() == ["chart"]


def test_news_remember_a_bounded_number_of_divisions() -> None:
    news = News()
    for shards in range(1, 1000):
        before = news.announcements
        hear_snapshots(news, 0, shards)
        assert news.has_snapshot_since(before, user_id=0)
    assert len(news._announced) <= 16


@pytest.mark.parametrize(
    ("asked", "last", "next_"),
    [
        (LIVE, NOW + seconds(179.9), NOW + seconds(180)),  # 12:05, the next bucket
        # New York's midnight is 04:00 UTC in summer.
        (
            Asked("demo", Timeframe.ALL),
            datetime(2026, 6, 2, 3, 59, 59, 900_000, tzinfo=UTC),
            datetime(2026, 6, 2, 4, tzinfo=UTC),
        ),
    ],
)
async def test_window_that_moves_on_ends_what_is_kept(
    database: Database, watched: Watched, charts: Charts, *, asked: Asked, last: datetime, next_: datetime
) -> None:
    user_id = await create_user(database)
    await text(charts, last, asked)
    assert charts.kept(asked, last + seconds(0.05)) is not None
    assert charts.kept(asked, next_) is None
    await add_snapshot(database, user_id, next_, "7")
    watched.taken()
    assert values(await text(charts, next_, asked)) == ["7.00"]
    assert watched.taken() == ["chart"]


async def test_points_are_kept_for_a_minute_while_the_bus_is_heard_and_for_a_second_while_it_is_not(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    await create_user(database)
    await text(charts)
    watched.taken()
    await text(charts, NOW + seconds(58.9))
    assert watched.taken() == ["live"]
    await text(charts, NOW + seconds(60))
    assert watched.taken() == ["chart"]
    news.interrupted()
    for second in (61, 62):
        await text(charts, NOW + seconds(second))
        assert watched.taken() == ["chart"]
    await text(charts, NOW + seconds(62.9))
    assert watched.taken() == []


async def test_everything_kept_is_dropped_when_the_bus_is_heard_again(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    await create_user(database)
    for happens in (news.interrupted, news.resumed):
        await text(charts)
        watched.taken()
        happens()
        assert charts.kept(LIVE, NOW) is None
        await text(charts)
        assert watched.taken() == ["chart"]


@pytest.mark.parametrize(
    ("statement", "status"),
    [("UPDATE users SET is_active = FALSE", 403), ("DELETE FROM users", 404)],
)
async def test_user_who_is_gone_is_served_no_longer_than_a_second(
    database: Database, charts: Charts, statement: str, status: int
) -> None:
    await create_user(database)
    closed = charts.asked("demo", Timeframe.ONE_DAY, NOW - timedelta(days=9))
    for asked in (LIVE, closed):
        await text(charts, NOW, asked)
    await database.fetch(statement)
    for asked in (LIVE, closed):
        await text(charts, NOW + seconds(0.9), asked)
        with pytest.raises(Problem) as refused:
            await charts.answer(asked, NOW + seconds(1))
        assert refused.value.kind.status == status
        assert charts.kept(asked, NOW + seconds(0.9)) is None


async def test_other_user_of_the_same_subject_gets_none_of_the_first_ones_points(
    database: Database, charts: Charts
) -> None:
    await add_snapshot(database, await create_user(database), NOW - timedelta(hours=1), "1")
    assert values(await text(charts)) == ["1.00"]
    await database.fetch("DELETE FROM users")
    await create_user(database)
    assert values(await text(charts, NOW + seconds(1))) == []


async def test_unknown_user_and_failure_are_not_kept(
    database: Database, watched: Watched, charts: Charts
) -> None:
    with pytest.raises(Problem):
        await charts.answer(LIVE, NOW)
    await create_user(database, cash="1")
    watched.is_away = True
    with pytest.raises(DatabaseUnavailable):
        await charts.answer(LIVE, NOW)
    watched.is_away = False
    assert await current_value(charts) == "1.00"


@pytest.mark.parametrize("seed", range(6))
async def test_any_answer_is_what_a_fresh_one_was_less_than_a_second_ago(
    database: Database, watched: Watched, charts: Charts, news: News, seed: int
) -> None:
    """Whatever happens in whatever order; and right after news it is a fresh one in all that they tell."""
    chance = random.Random(seed)
    user_id = await create_user(database, cash="0", positions={"A": ("1", "1")})
    await set_price(database, "A", "1")
    fresh = new_charts(database, News(), bytes_max=0)
    now, slots = NOW, {NOW}
    closed = charts.asked("demo", Timeframe.ONE_DAY, NOW - timedelta(minutes=1))
    for asked in (LIVE, closed):
        was_true: list[tuple[datetime, str]] = [(now, await text(fresh, now, asked))]
        for _ in range(60):
            now += seconds(chance.choice((0, 0, 0.1, 0.3, 0.6, 1.0, 2.0, 70, 400)))
            event = chance.choice(("tick", "position", "cash", "snapshot", "outage", "nothing", "nothing"))
            if event == "tick":
                await set_price(database, "A", str(chance.randint(1, 999)))
                hear_tick(news)
            elif event == "position":
                await set_position(database, user_id, "A", str(chance.randint(1, 9)))
            elif event == "cash":
                await database.fetch("UPDATE users SET cash_balance = cash_balance + 1")
            elif event == "snapshot":
                slot = last_boundary(now, timedelta(minutes=5))
                if slot not in slots:
                    slots.add(slot)
                    await add_snapshot(database, user_id, slot, str(chance.randint(1, 999)))
                    hear_snapshots(news, user_id % 2, 2)
            elif event == "outage":
                news.interrupted()
                news.resumed()
            truth = await text(fresh, now, asked)
            if event in ("tick", "snapshot", "outage"):
                was_true.clear()
            was_true.append((now, truth))
            ends = [*(at for at, _ in was_true[1:]), None]
            acceptable = {
                was for (_, was), end in zip(was_true, ends, strict=True) if not end or now - end < seconds(1)
            }
            assert await text(charts, now, asked) in acceptable, (seed, event, now)
    assert len(watched.asked) < 4 * 2 * 60 * 0.75  # something was served without being read
    await fresh.close()


# ---- one reading for all who ask -----------------------------------------------------------------


async def is_asked(watched: Watched, *asked: str) -> None:
    async def has_asked() -> bool:
        return watched.asked == list(asked)

    await eventually(has_asked)


async def test_a_thousand_at_once_reach_the_database_once(
    database: Database, watched: Watched, charts: Charts
) -> None:
    await create_user(database, cash="3")
    answers = await asyncio.gather(*(charts.answer(LIVE, NOW) for _ in range(1000)))
    assert watched.taken() == ["chart"]
    assert {id(answer) for answer in answers} == {id(answers[0])}


async def test_who_goes_away_takes_the_answer_from_nobody(
    database: Database, watched: Watched, charts: Charts
) -> None:
    await create_user(database)
    watched.open.clear()
    first, second = (asyncio.ensure_future(charts.answer(LIVE, NOW)) for _ in range(2))
    await is_asked(watched, "chart")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    watched.open.set()
    assert await second is charts.kept(LIVE, NOW)
    assert watched.taken() == ["chart"]


async def test_reading_goes_on_although_nobody_is_left(
    database: Database, watched: Watched, charts: Charts
) -> None:
    await create_user(database)
    watched.open.clear()
    asking = asyncio.ensure_future(charts.answer(LIVE, NOW))
    await is_asked(watched, "chart")
    asking.cancel()
    watched.open.set()

    async def is_kept() -> bool:
        return charts.kept(LIVE, NOW) is not None

    await eventually(is_kept)


async def test_failure_reaches_all_who_wait_and_the_next_one_asks_again(
    database: Database, watched: Watched, charts: Charts
) -> None:
    await create_user(database, cash="1")
    watched.is_away = True
    outcomes = await asyncio.gather(*(charts.answer(LIVE, NOW) for _ in range(100)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {DatabaseUnavailable}
    assert watched.taken() == ["chart"]
    watched.is_away = False
    assert await current_value(charts) == "1.00"


async def test_reading_has_an_end(database: Database, watched: Watched, news: News) -> None:
    await create_user(database)
    charts = new_charts(watched, news, seconds_max=0.1)
    watched.open.clear()
    outcomes = await asyncio.gather(*(charts.answer(LIVE, NOW) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TimeoutError] * 3
    watched.open.set()
    await text(charts)
    await charts.close()


async def test_who_asks_after_news_gets_an_answer_that_was_read_after_them(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    """However many ask and however much is heard meanwhile, there is one reading and then one more."""
    await create_user(database, positions={"A": ("1", "1")})
    await set_price(database, "A", "1")
    watched.open.clear()
    early = asyncio.ensure_future(charts.answer(LIVE, NOW))
    await is_asked(watched, "chart")
    await database.fetch_value("SELECT pg_sleep(0.05)")  # the statement has surely been run by now
    await set_price(database, "A", "2")
    late = []
    for _ in range(10):
        hear_tick(news)
        late += [asyncio.ensure_future(charts.answer(LIVE, NOW)) for _ in range(10)]
        await asyncio.sleep(0)
    watched.open.set()
    assert '"current_value":1.00' in (await early).body.decode()
    assert {(await one).body.decode().count('"current_value":2.00') for one in late} == {1}
    assert watched.taken() == ["chart", "live"]


async def test_what_is_being_read_ends_with_the_charts(
    database: Database, watched: Watched, charts: Charts
) -> None:
    await create_user(database)
    watched.open.clear()
    asking = asyncio.ensure_future(charts.answer(LIVE, NOW))
    await is_asked(watched, "chart")
    await charts.close()
    (outcome,) = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)


# ---- how many ------------------------------------------------------------------------------------


async def test_memory_is_bounded_and_the_chart_not_looked_at_for_longest_goes(
    database: Database, watched: Watched, news: News
) -> None:
    users = [f"user{number}" for number in range(8)]
    for user in users:
        await create_user(database, user)
    charts = new_charts(watched, news, bytes_max=16 * 1024)  # 12 KB for live charts of some 2.6 KB
    before = sample("gateway_chart_cache_evictions_total")
    asked = [Asked(user, Timeframe.ONE_DAY) for user in users]
    for one in asked[:4]:
        await text(charts, NOW, one)
    assert charts.kept(asked[0], NOW) is not None  # looked at
    for one in asked[4:]:
        await text(charts, NOW, one)
        charts.kept(asked[0], NOW)
    kept = [user for user, one in zip(users, asked, strict=True) if charts.kept(one, NOW) is not None]
    assert kept == ["user0", "user5", "user6", "user7"]
    assert sample("gateway_chart_cache_evictions_total") == before + 4
    assert sample("gateway_chart_cache_entries") == 4
    assert sample("gateway_chart_cache_bytes") <= 12 * 1024
    await charts.close()


async def test_ranges_that_are_over_displace_no_live_chart(
    database: Database, watched: Watched, news: News
) -> None:
    await create_user(database)
    charts = new_charts(watched, news, bytes_max=32 * 1024)
    await text(charts)
    for days in range(1, 30):
        await text(charts, NOW, charts.asked("demo", Timeframe.ONE_DAY, NOW - timedelta(days=days)))
    assert charts.kept(LIVE, NOW) is not None
    await charts.close()


async def test_without_memory_nothing_is_kept(database: Database, watched: Watched, news: News) -> None:
    await create_user(database)
    charts = new_charts(watched, news, bytes_max=0)
    for _ in range(2):
        await text(charts)
    assert watched.taken() == ["chart"] * 2
    await charts.close()


async def test_hits_and_misses_are_counted_by_layer(database: Database, charts: Charts, news: News) -> None:
    await create_user(database)

    def counted() -> list[float]:
        return [
            sample(f"gateway_chart_cache_{what}_total", layer=layer)
            for what in ("hits", "misses")
            for layer in ("answer", "points")
        ]

    before = counted()
    await text(charts)  # reads both
    await text(charts)  # is kept
    hear_tick(news)
    await text(charts)  # its points are kept
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 1, 2, 1]


# ---- ranges that are over ------------------------------------------------------------------------


async def test_range_has_the_buckets_that_are_over_and_compares_its_first_point_with_its_last(
    database: Database, charts: Charts
) -> None:
    user_id = await create_user(database, cash="999")
    for at, total in (
        (datetime(2026, 5, 30, 9, 34, 59, tzinfo=UTC), "1"),  # before the range
        (datetime(2026, 5, 30, 9, 35, tzinfo=UTC), "100"),
        (datetime(2026, 5, 31, 9, 31, tzinfo=UTC), "110"),
        (datetime(2026, 5, 31, 9, 35, tzinfo=UTC), "2"),  # after it
    ):
        await add_snapshot(database, user_id, at, total)
    until = datetime(2026, 5, 31, 9, 37, 12, tzinfo=UTC)
    answer = await text(charts, NOW, charts.asked("demo", Timeframe.ONE_DAY, until))
    assert answer == (
        '{"timeframe":"1D","until":"2026-05-31T09:35:00Z","data_points":['
        '{"timestamp":"2026-05-30T09:35:00Z","value":100.00},{"timestamp":"2026-05-31T09:30:00Z","value":110.00}]'
        ',"start_value":100.00,"current_value":110.00,"profit_loss":10.00,"profit_loss_percent":10.00'
        ',"data_available":true,"simulated":false}'
    )


async def test_all_until_a_date_is_everything_before_it(database: Database, charts: Charts) -> None:
    user_id = await create_user(database)
    for day, total in ((1, "1"), (2, "2"), (3, "3")):
        await add_snapshot(database, user_id, datetime(2026, 3, day, 12, tzinfo=UTC), total)
    until = datetime(2026, 3, 3, 5, tzinfo=UTC)  # New York's midnight
    assert values(await text(charts, NOW, charts.asked("demo", Timeframe.ALL, until))) == ["1.00", "2.00"]
    assert values(await text(charts, NOW, charts.asked("demo", Timeframe.ALL, until - seconds(1)))) == [
        "1.00"
    ]


async def test_range_follows_snapshots_and_no_prices(
    database: Database, watched: Watched, charts: Charts, news: News
) -> None:
    await create_user(database)
    asked = charts.asked("demo", Timeframe.ONE_DAY, NOW)
    assert asked == charts.asked("demo", Timeframe.ONE_DAY, NOW - seconds(119))  # both until 12:00
    await text(charts, NOW, asked)
    watched.taken()
    hear_tick(news)
    await text(charts, NOW, asked)
    assert watched.taken() == []
    hear_snapshots(news)
    await text(charts, NOW, asked)
    assert watched.taken() == ["chart"]


@pytest.mark.parametrize(
    ("age", "cache_control"),
    [
        (timedelta(0), "private, no-cache"),
        (timedelta(hours=24) - seconds(1), "private, no-cache"),
        (timedelta(hours=24), "private, max-age=31536000, immutable"),
        (timedelta(days=400), "private, max-age=31536000, immutable"),
    ],
)
async def test_range_is_immutable_once_no_late_snapshot_can_fall_into_it(
    database: Database, charts: Charts, age: timedelta, cache_control: str
) -> None:
    await create_user(database)
    end = datetime(2026, 6, 1, 12, tzinfo=UTC)
    asked = charts.asked("demo", Timeframe.ONE_DAY, end)
    response = (await charts.answer(asked, end + age)).response(no_headers())
    assert response.headers["Cache-Control"] == cache_control


def no_headers() -> Any:
    from multidict import CIMultiDict, CIMultiDictProxy

    return CIMultiDictProxy(CIMultiDict())


# ---- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture
async def gateway(database_url: str, bus: Bus) -> AsyncIterator[Gateway]:
    async with running(database_url, bus=bus, cors_allowed_origins="https://app.example.com") as started:
        yield started


async def heard(gateway: Gateway, since: int) -> None:
    async def is_heard() -> bool:
        return gateway.news.changes > since

    await eventually(is_heard)


async def test_price_that_is_heard_is_in_the_chart_as_it_is_in_the_portfolio(
    database: Database, bus: Bus, gateway: Gateway
) -> None:
    await create_user(database, cash="1", positions={"A": ("3", "1")})
    for price, total in (("0.125", "1.38"), ("7.5", "23.50")):
        changes = gateway.news.changes
        await set_price(database, "A", price)
        tick = PriceTick(
            symbol="A",
            price=Decimal(price),
            traded_at=utc_now(),
            received_at=utc_now(),
            feed="iex",
            sequence=1,
        )
        await bus.publish(Outgoing(price_subject("A"), tick))
        await heard(gateway, changes)
        chart = (await gateway.get(CHART)).json()
        assert str(chart["current_value"]) == total
        assert chart["current_value"] == (await gateway.get(CURRENT)).json()["total_value"]


async def test_snapshot_that_is_announced_is_in_the_chart(
    database: Database, bus: Bus, gateway: Gateway
) -> None:
    user_id = await create_user(database)
    assert (await gateway.get(CHART)).json()["data_points"] == []
    slot = last_boundary(utc_now(), timedelta(minutes=5)) - timedelta(minutes=5)
    await add_snapshot(database, user_id, slot, "7")
    changes = gateway.news.changes
    taken = SnapshotsTaken(
        scheduled_at=slot, shard=user_id % 2, shards=2, portfolios=1, positions=0, unpriced=0
    )
    await bus.publish(Outgoing(SNAPSHOTS_TAKEN, taken))
    await heard(gateway, changes)
    assert [str(point["value"]) for point in (await gateway.get(CHART)).json()["data_points"]] == ["7.00"]


async def test_chart_without_nats_is_never_older_than_a_second(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    user_id = await create_user(database)
    with nats_server(tmp_path / "nats") as server:
        async with Bus(server.url, name="tests") as bus, running(database_url, bus=bus) as gateway:
            assert (await gateway.get(CHART)).json()["data_points"] == []
            server.process.kill()
            server.process.wait()

            async def is_noticed() -> bool:
                return not gateway.news.are_complete

            await eventually(is_noticed)
            await add_snapshot(database, user_id, utc_now() - timedelta(minutes=6), "7")

            async def is_shown() -> bool:
                return len((await gateway.get(CHART)).json()["data_points"]) == 1

            await eventually(is_shown, timeout=5)  # and not after the minute of the points


async def test_a_thousand_requests_at_once_are_one_reading(database: Database, gateway: Gateway) -> None:
    await create_user(database)
    before = sample("gateway_chart_cache_misses_total", layer="points")
    headers = bearer()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1000)) as session:
        many = Gateway(gateway.port, session)
        answers = await asyncio.gather(*(many.ask("GET", CHART, headers=headers) for _ in range(1000)))
    assert {answer.status for answer in answers} == {200}
    after = sample("gateway_chart_cache_misses_total", layer="points")
    assert after == before + 1


async def add_day(database: Database, user_id: int) -> None:
    """Fill the last day with a snapshot each five minutes."""
    last = last_boundary(utc_now(), timedelta(minutes=5))
    await database.fetch("SELECT make_history_partitions($1, $2)", last - timedelta(days=1), last, timeout=60)
    await database.fetch(
        """
        INSERT INTO portfolio_snapshots (user_id, timestamp, total_value, cash_balance, investment_value)
        SELECT $1, slot, 100, 100, 0 FROM generate_series($2::timestamptz, $3, interval '5 minutes') AS slot
        """,
        user_id,
        last - timedelta(days=1),
        last,
        timeout=60,
    )


async def ask_raw(
    gateway: Gateway, path: str = CHART, method: str = "GET", **headers: str
) -> tuple[aiohttp.ClientResponse, bytes]:
    """Ask with these headers and no others; return the body as it came."""
    async with aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=["Accept-Encoding"]) as session:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"http://127.0.0.1:{gateway.port}{path}"
        async with session.request(method, url, headers=bearer() | named) as response:
            return response, await response.read()


async def test_chart_travels_compressed_and_only_when_it_has_changed(
    database: Database, gateway: Gateway
) -> None:
    await add_day(database, await create_user(database))
    plain, body = await ask_raw(gateway)
    compressed, packed = await ask_raw(gateway, Accept_Encoding="gzip, deflate, br")
    assert len(json.loads(body)["data_points"]) == 288
    assert gzip.decompress(packed) == body
    assert len(packed) < len(body) / 5
    assert "Content-Encoding" not in plain.headers
    assert compressed.headers["Content-Encoding"] == "gzip"
    for response, sent in ((plain, body), (compressed, packed)):
        assert response.status == 200
        assert response.headers["Content-Length"] == str(len(sent))
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["Cache-Control"] == "private, no-cache"
        assert response.headers["Vary"] == "Accept-Encoding, Authorization, Origin"
    for tag_of, encoding in ((plain, "identity"), (compressed, "gzip")):
        tag = tag_of.headers["ETag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            response, sent = await ask_raw(
                gateway, Accept_Encoding=encoding, If_None_Match=known, Origin="https://app.example.com"
            )
            assert (response.status, sent) == (304, b"")
            assert response.headers["ETag"] == tag
            assert response.headers["Cache-Control"] == "private, no-cache"
            assert response.headers["Vary"] == "Accept-Encoding, Authorization, Origin"
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
            assert "ETag" in response.headers["Access-Control-Expose-Headers"]
            assert "Content-Type" not in response.headers
            assert "Content-Encoding" not in response.headers
            assert response.headers.get("Content-Length") is None
    other, _ = await ask_raw(gateway, Accept_Encoding="gzip", If_None_Match=plain.headers["ETag"])
    assert other.status == 200
    head, nothing = await ask_raw(gateway, method="HEAD", Accept_Encoding="gzip")
    assert (head.status, nothing) == (200, b"")
    assert head.headers["ETag"] == compressed.headers["ETag"]


async def test_entity_tag_changes_with_the_value_and_comes_back_with_it(
    database: Database, gateway: Gateway
) -> None:
    await create_user(database, cash="1")
    tags = []
    for cash in (1, 2, 1):
        await database.fetch("UPDATE users SET cash_balance = $1", cash)
        gateway.news.interrupted()  # so that it is read again at once
        tags.append((await gateway.get(CHART)).headers["ETag"])
    assert tags[0] == tags[2] != tags[1]


async def test_short_chart_is_not_compressed(database: Database, gateway: Gateway) -> None:
    await create_user(database)
    response, body = await ask_raw(gateway, Accept_Encoding="gzip")
    assert "Content-Encoding" not in response.headers
    assert json.loads(body)["data_available"] is False


@pytest.mark.parametrize(("positions", "is_compressed"), [(10, False), (100, True)])
async def test_current_portfolio_is_compressed_when_it_is_large(
    database: Database, gateway: Gateway, positions: int, is_compressed: bool
) -> None:
    await create_user(database, positions={f"S{number}": ("1", "1") for number in range(positions)})
    for number in range(positions):
        await set_price(database, f"S{number}", "1")
    plain, body = await ask_raw(gateway, CURRENT)
    response, sent = await ask_raw(gateway, CURRENT, Accept_Encoding="gzip")
    assert (response.headers.get("Content-Encoding") == "gzip") is is_compressed
    assert (gzip.decompress(sent) if is_compressed else sent) == body
    assert plain.headers["Vary"] == response.headers["Vary"] == "Accept-Encoding, Authorization, Origin"


@pytest.mark.parametrize("query", ["until=2026-03-02T14:32:00Z", "timeframe=1W&until=2026-03-02T14:32:00.5Z"])
async def test_range_of_the_past_says_that_it_never_changes(
    database: Database, gateway: Gateway, query: str
) -> None:
    await create_user(database, cash="5")
    answer = await gateway.get(f"{CHART}?{query}")
    data = answer.json()
    assert data["until"] == "2026-03-02T14:30:00Z"
    assert (data["current_value"], data["profit_loss"]) == (None, None)
    data["timeframe"] = Timeframe(data["timeframe"])
    Performance.model_validate(data)
    assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    known = bearer() | {"If-None-Match": answer.headers["ETag"]}
    again = await gateway.ask("GET", f"{CHART}?{query}", headers=known)
    assert again.status == 304
    assert again.headers["Cache-Control"] == "private, max-age=31536000, immutable"


@pytest.mark.parametrize(
    ("until", "end"),
    [
        ("2026-03-02T14:32:00Z", "2026-03-02T14:30:00Z"),
        ("2026-03-02t14:32:00z", "2026-03-02T14:30:00Z"),
        ("2026-03-02T14:32:00.123456Z", "2026-03-02T14:30:00Z"),
        ("2026-03-02T09:32:00-05:00", "2026-03-02T14:30:00Z"),
        ("2026-03-02T20:02:00%2B05:30", "2026-03-02T14:30:00Z"),
        ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00Z"),
    ],
)
async def test_end_of_a_range_is_any_instant_of_the_past(
    database: Database, gateway: Gateway, until: str, end: str
) -> None:
    await create_user(database)
    for timeframe in ("1D", "1W"):
        answer = await gateway.get(f"{CHART}?timeframe={timeframe}&until={until}")
        assert answer.json()["until"] == end


def tomorrow() -> date:
    return (utc_now() + timedelta(days=1)).date()


@pytest.mark.parametrize(
    "until",
    [
        "",
        "yesterday",
        "2026-03-02",
        "2026-03-02T14:32:00",  # no offset
        "2026-03-02T14:32:00+00:00",  # in a URL a + is a space
        "2026-03-02 14:32:00Z",
        "2026-03-02T14:32Z",
        "20260302T143200Z",
        "2026-W10-1T14:32:00Z",
        "2026-02-30T00:00:00Z",
        "2026-03-02T24:00:00Z",
        "2026-03-02T14:32:60Z",
        "2026-03-02T14:32:00%2B24:00",
        "2026-03-02T14:32:00.1234567Z",
        "1969-12-31T23:59:59Z",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00%2B14:00",
        "9999-12-31T23:59:59-14:00",
        f"{tomorrow()}T00:00:01Z",
        "1767225600",
        "%D9%A2%D9%A0%D9%A2%D9%A6-03-02T14:32:00Z",  # Arabic digits
        "2026-03-02T14:32:00Z%0A",
        "%00",
        "%FF",
    ],
)
async def test_end_that_is_none_is_refused_with_what_is_allowed(
    database: Database, gateway: Gateway, until: str
) -> None:
    await create_user(database)
    answer: Answer = await gateway.get(f"{CHART}?until={until}")
    assert answer.status == 400
    assert answer.problem().type == "urn:foliotick:problem:invalid-until"
    assert "1970-01-01T00:00:00Z" in answer.problem().allowed[0]


@pytest.mark.parametrize(
    "query", ["until=2026-03-02T14:32:00Z&until=2026-03-02T14:32:00Z", "until=2026-03-02T14:32:00Z&since=x"]
)
async def test_parameter_beside_the_end_is_refused(database: Database, gateway: Gateway, query: str) -> None:
    await create_user(database)
    answer = await gateway.get(f"{CHART}?{query}")
    assert answer.status == 400
    assert answer.problem().known == ["timeframe", "until"]
