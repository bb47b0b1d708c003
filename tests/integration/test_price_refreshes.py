"""Fresh prices on request: real PostgreSQL and NATS, and prices from a hand-written Alpaca."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import nats
import pytest
from prometheus_client import Counter
from structlog.testing import capture_logs

from services.price_feeder import queries, refreshes
from services.price_feeder.feed import Refreshed
from services.price_feeder.lease import Lease
from services.price_feeder.queries import LeaseLost
from services.price_feeder.refreshes import Rounds
from services.price_feeder.trades import Rejection
from shared.bus import Bus, Refused, Unanswered
from shared.clock import utc_now
from shared.database import Database
from shared.messages import (
    PRICES_CONFIRMED,
    REFRESH_REQUESTED,
    PricesConfirmed,
    PricesRefreshed,
    PriceTick,
    RefreshRequested,
    price_subject,
)
from tests.factories import create_user, set_price
from tests.integration.fake_alpaca import STOCKS, FakeAlpaca, hangs, running_fake, trade
from tests.integration.leases import held_lease
from tests.integration.responders import feeder
from tests.waiting import eventually

AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.fixture
async def alpaca() -> AsyncIterator[FakeAlpaca]:
    async with running_fake() as fake:
        yield fake


@pytest.fixture
async def lease(database: Database) -> AsyncIterator[Lease]:
    async with held_lease(database) as held:
        yield held


async def ask(bus: Bus, user_id: int, at: datetime | None = None) -> PricesRefreshed:
    """Ask until somebody is there."""
    message = RefreshRequested(user_id=user_id, requested_at=at or utc_now())

    async def answer() -> PricesRefreshed | None:
        try:
            return await bus.request(REFRESH_REQUESTED, message, PricesRefreshed, timeout_seconds=8)
        except Unanswered:
            return None

    found = await eventually(answer)
    assert found is not None
    return found


async def refusal(bus: Bus, user_id: int, at: datetime | None = None) -> tuple[int, int | None]:
    with pytest.raises(Refused) as refused:
        await ask(bus, user_id, at)
    return refused.value.code, refused.value.retry_after_seconds


@contextmanager
def counted(counter: Counter, outcome: str, times: int) -> Iterator[None]:
    child = counter.labels(outcome)
    before = child._value.get()
    yield
    assert child._value.get() - before == times


# ---- end to end ----------------------------------------------------------------------------------


async def test_a_users_prices_are_asked_for_stored_and_counted(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease
) -> None:
    user_id = await create_user(
        database,
        positions={
            "AAPL": ("1", "1"),
            "MSFT": ("1", "1"),
            "NONE": ("1", "1"),
            "SOLD": ("0", "0"),
            "BTC/USD": ("1", "1"),
        },
    )
    await create_user(database, "other", positions={"TSLA": ("1", "1")})
    await set_price(database, "AAPL", "170", traded_at=AT - SECOND, age=timedelta(hours=1))
    await set_price(database, "MSFT", "410", traded_at=AT, age=timedelta(hours=1))
    alpaca.trades = {
        "AAPL": trade("175.5", "2026-03-02T15:00:00Z"),
        "MSFT": trade("410", "2026-03-02T15:00:00Z"),
        "BTC/USD": trade("60000.25", "2026-03-02T15:00:00Z"),
        "TSLA": trade("1"),
    }
    before = utc_now()
    with capture_logs() as logged, counted(refreshes.requests_handled, "refreshed", 1):
        async with feeder(database, bus, alpaca, lease):
            reply = await ask(bus, user_id)
    # AAPL and BTC/USD have another price, MSFT the same, NONE is unknown to the market
    assert (reply.symbols, reply.confirmed, reply.changed, reply.rejected) == (4, 3, 2, 1)
    assert before <= reply.refreshed_at <= utc_now()
    assert sorted(symbol for asked in alpaca.asked for symbol in asked.symbols) == [
        "AAPL",
        "BTC/USD",
        "MSFT",
        "NONE",
    ]
    cached = await queries.cached_prices(database, ["AAPL", "MSFT", "BTC/USD", "TSLA"])
    assert {symbol: price.tick.price for symbol, price in cached.items()} == {
        "AAPL": Decimal("175.5000"),
        "MSFT": Decimal("410.0000"),
        "BTC/USD": Decimal("60000.2500"),
    }
    assert {price.confirmed_at for price in cached.values()} == {reply.refreshed_at}
    (line,) = [line for line in logged if line["event"] == "prices_refreshed"]
    assert (line["user_id"], line["symbols"], line["changed"]) == (user_id, 4, 2)


async def test_what_changed_and_what_is_confirmed_is_published(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease, nats_url: str
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.trades = {"AAPL": trade("175.5", "2026-03-02T15:00:00Z")}
    client = await nats.connect(nats_url)
    ticks = await client.subscribe(price_subject("AAPL"))
    confirmations = await client.subscribe(PRICES_CONFIRMED)
    async with feeder(database, bus, alpaca, lease):
        await ask(bus, user_id)
        tick = PriceTick.model_validate_json((await ticks.next_msg(timeout=5)).data)
        confirmed = PricesConfirmed.model_validate_json((await confirmations.next_msg(timeout=5)).data)
    await client.close()
    assert (tick.price, confirmed.symbols) == (Decimal("175.5"), ("AAPL",))


async def test_user_without_positions_asks_the_market_nothing(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease
) -> None:
    user_id = await create_user(database, cash="1")
    async with feeder(database, bus, alpaca, lease):
        reply = await ask(bus, user_id)
    assert (reply.symbols, reply.confirmed, alpaca.asked) == (0, 0, [])


async def test_cooldown_unknown_and_deactivated_users_and_wrong_times_are_refused(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    deactivated = await create_user(database, "deactivated", active=False)
    alpaca.trades = {"AAPL": trade("175.5")}
    async with feeder(database, bus, alpaca, lease):
        at = utc_now() - 5 * SECOND
        with counted(refreshes.requests_handled, "refused", 4):
            await ask(bus, user_id, at)
            assert await refusal(bus, user_id, at + 2 * SECOND) == (429, 28)
            assert await refusal(bus, deactivated) == (403, None)
            assert await refusal(bus, deactivated + 1) == (404, None)
            assert await refusal(bus, user_id, at - 20 * SECOND) == (400, None)
    assert len(alpaca.asked) == 1


async def test_of_ten_requests_at_once_one_is_granted(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.trades = {"AAPL": trade("175.5")}
    at = utc_now()
    async with feeder(database, bus, alpaca, lease):
        outcomes = await asyncio.gather(
            *(ask(bus, user_id, at + number * timedelta(microseconds=1)) for number in range(10)),
            return_exceptions=True,
        )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["PricesRefreshed"] + ["Refused"] * 9
    assert len(alpaca.asked) == 1


async def test_market_that_does_not_answer_is_said_so_in_time(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.faults_by_path = {STOCKS: hangs}
    with counted(refreshes.requests_handled, "failed", 1):
        async with feeder(database, bus, alpaca, lease):
            async with asyncio.timeout(refreshes.MARKET_SECONDS_MAX + 2):
                assert await refusal(bus, user_id) == (503, 30)


async def test_feeder_that_has_lost_the_lease_writes_nothing(
    database: Database, bus: Bus, alpaca: FakeAlpaca, lease: Lease
) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "1")})
    alpaca.trades = {"AAPL": trade("175.5")}
    async with feeder(database, bus, alpaca, lease):
        await database.fetch("UPDATE leases SET holder = 'another', term = term + 1")
        assert await refusal(bus, user_id) == (503, 30)  # the database says so
        lease.lose()
        assert await refusal(bus, user_id) == (503, 2)  # it knows so itself
    assert await queries.cached_price(database, "AAPL") is None


async def test_only_a_feeder_that_leads_is_asked(bus: Bus) -> None:
    with pytest.raises(Unanswered, match="nobody answers"):
        await bus.request(
            REFRESH_REQUESTED,
            RefreshRequested(user_id=1, requested_at=utc_now()),
            PricesRefreshed,
            timeout_seconds=5,
        )


# ---- rounds --------------------------------------------------------------------------------------


class Market:
    """Confirms all that it is asked for; answers when it is let."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fails_with: Exception | None = None

    async def refresh(self, symbols: Sequence[str], ended: asyncio.Event) -> Refreshed:
        self.asked.append(list(symbols))
        await self.may_answer.wait()
        if self.fails_with:
            raise self.fails_with
        return Refreshed(AT, frozenset(symbols), frozenset(), dict[str, Rejection](), None)

    async def is_asked(self, times: int) -> None:
        async def is_asked() -> bool:
            return len(self.asked) == times

        await eventually(is_asked)


def always() -> bool:
    return True


async def test_who_asks_while_a_round_is_under_way_is_answered_by_one_more() -> None:
    market = Market()
    rounds = Rounds(market.refresh, always, requests_per_minute=100_000)
    market.may_answer.clear()
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(rounds.join(["A", "B"]))
        await market.is_asked(1)
        later = [tasks.create_task(rounds.join(symbols)) for symbols in (["B", "C"], ["C", "D"], ["B"])]
        await asyncio.sleep(0)
        market.may_answer.set()
    assert market.asked == [["A", "B"], ["B", "C", "D"]]
    assert first.result().confirmed == {"A", "B"}
    assert {task.result().confirmed for task in later} == {frozenset("BCD")}


async def test_round_whose_first_asker_has_gone_is_taken_by_the_next() -> None:
    market = Market()
    rounds = Rounds(market.refresh, always, requests_per_minute=100_000)
    market.may_answer.clear()
    async with asyncio.TaskGroup() as tasks:
        leaving = tasks.create_task(rounds.join(["A"]))
        staying = tasks.create_task(rounds.join(["A"]))
        await market.is_asked(1)
        leaving.cancel()
        await market.is_asked(2)
        market.may_answer.set()
    assert staying.result().confirmed == {"A"}


async def test_failure_of_a_round_is_that_of_all_who_asked() -> None:
    market = Market()
    rounds = Rounds(market.refresh, always, requests_per_minute=100_000)
    market.fails_with = LeaseLost("term 7 is over")
    outcomes = await asyncio.gather(rounds.join(["A"]), rounds.join(["B"]), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["term 7 is over"] * 2
    assert len(market.asked) == 1


async def test_rounds_take_a_quarter_of_the_requests_and_the_rest_is_refused() -> None:
    market = Market()
    rounds = Rounds(market.refresh, always, requests_per_minute=60)  # a quarter: one in four seconds
    rounds.check()
    await rounds.join([f"S{number}" for number in range(101)])  # two requests
    with pytest.raises(Refused) as refused:
        rounds.check()
    assert (refused.value.code, refused.value.retry_after_seconds) == (503, 8)


async def test_feeder_without_the_lease_takes_no_round() -> None:
    rounds = Rounds(Market().refresh, lambda: False, requests_per_minute=60)
    with pytest.raises(Refused, match="another price feeder"):
        rounds.check()
