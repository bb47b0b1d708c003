"""What users ask for by hand, through the real gateway, bus, snapshotter and feeder. Numbers are worked by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest

from services.api_gateway.responses import RefreshedPrices, TakenSnapshot
from services.snapshotter import queries
from shared.bus import Bus, Refused
from shared.clock import utc_now
from shared.database import Database
from shared.messages import (
    REFRESH_REQUESTED,
    SNAPSHOT_REQUESTED,
    Message,
    SnapshotRequested,
    SnapshotTaken,
)
from shared.requests import Answer as Responder
from tests.factories import create_user, set_price
from tests.gateway import Answer, Gateway, bearer, running
from tests.integration.fake_alpaca import FakeAlpaca, running_fake, trade
from tests.integration.leases import held_lease
from tests.integration.responders import SNAPSHOT_COOLDOWN, feeder, snapshotter
from tests.waiting import eventually

SNAPSHOTS = "/api/portfolio/snapshots"
PRICES = "/api/portfolio/refresh-prices"
CHART = "/api/portfolio/performance"
CURRENT = "/api/portfolio/current"


@pytest.fixture
async def gateway(database_url: str, bus: Bus) -> AsyncIterator[Gateway]:
    async with running(database_url, bus=bus) as started:
        yield started


@pytest.fixture
async def alpaca() -> AsyncIterator[FakeAlpaca]:
    async with running_fake() as fake:
        yield fake


async def post(gateway: Gateway, path: str, subject: str = "demo") -> Answer:
    return await gateway.ask("POST", path, headers=bearer(subject))


async def answered(gateway: Gateway, path: str, subject: str = "demo") -> Answer:
    """Ask until somebody is there to do the work."""

    async def is_answered() -> Answer | None:
        answer = await post(gateway, path, subject)
        if answer.status == 503:
            assert "answers" in answer.problem().detail  # nobody does, yet
            return None
        return answer

    found = await eventually(is_answered)
    assert found is not None
    return found


@asynccontextmanager
async def serving(bus: Bus, subject: str, answer: Responder) -> AsyncIterator[None]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bus.serve(subject, answer, stop))
        yield
        stop.set()


async def points(gateway: Gateway, subject: str = "demo") -> list[Decimal]:
    return [point["value"] for point in (await gateway.get(CHART, subject)).json()["data_points"]]


# ---- snapshots -----------------------------------------------------------------------------------


async def test_snapshot_is_taken_and_answered_with_exact_amounts(
    database: Database, database_url: str, bus: Bus, gateway: Gateway
) -> None:
    user_id = await create_user(
        database, cash="5000.50", positions={"AAPL": ("100", "15000"), "NONE": ("1", "1")}
    )
    await set_price(database, "AAPL", "175.10", feed="simulated")
    before = utc_now()
    async with snapshotter(database_url, bus):
        answer = await answered(gateway, SNAPSHOTS)
    assert (answer.status, answer.headers["Content-Type"]) == (201, "application/json")
    assert "Location" not in answer.headers
    TakenSnapshot.model_validate(answer.json())
    row = await database.fetch_row("SELECT * FROM portfolio_snapshots")
    assert row is not None
    assert (row["user_id"], row["total_value"]) == (user_id, Decimal("22510.50"))
    assert before <= row["timestamp"] <= utc_now()
    # 100 at 175.10 are 17,510.00
    assert answer.text == (
        f'{{"timestamp":"{timestamp_of(row["timestamp"].isoformat())}","total_value":22510.50,'
        '"cash_balance":5000.50,"investment_value":17510.00,"unpriced_positions":1,"partial":true,"simulated":true}'
    )


def timestamp_of(text: str) -> str:
    date_and_time = text.removesuffix("+00:00")
    return (date_and_time.rstrip("0") if "." in date_and_time else date_and_time) + "Z"


async def test_snapshot_is_a_point_of_the_next_chart_at_once(
    database: Database, database_url: str, bus: Bus, gateway: Gateway
) -> None:
    await create_user(database, cash="5")
    await create_user(database, "other", cash="6")
    async with snapshotter(database_url, bus):
        assert await points(gateway) == []
        assert (await answered(gateway, SNAPSHOTS)).status == 201
        assert await points(gateway) == [Decimal("5.00")]
        assert await points(gateway, "other") == []


async def test_other_gateways_hear_of_it(
    database: Database, database_url: str, bus: Bus, gateway: Gateway
) -> None:
    await create_user(database, cash="5")
    async with running(database_url, bus=bus) as other, snapshotter(database_url, bus):
        assert await points(other) == []
        await answered(gateway, SNAPSHOTS)

        async def has_it() -> bool:
            return await points(other) == [Decimal("5.00")]

        await eventually(has_it, timeout=5)  # without the bus it would be a minute


async def test_second_one_must_wait(
    database: Database, database_url: str, bus: Bus, gateway: Gateway
) -> None:
    await create_user(database, cash="5")
    async with snapshotter(database_url, bus):
        await answered(gateway, SNAPSHOTS)
        answer = await post(gateway, SNAPSHOTS)
    assert (answer.status, answer.problem().type) == (429, "urn:foliotick:problem:too-many-requests")
    assert 55 <= int(answer.headers["Retry-After"]) <= 60
    assert f"in {answer.headers['Retry-After']} s" in answer.problem().detail


async def test_of_ten_at_once_one_is_granted(
    database: Database, database_url: str, bus: Bus, gateway: Gateway
) -> None:
    await create_user(database, cash="5")
    await create_user(database, "other", cash="6")
    async with snapshotter(database_url, bus, replicas=2):
        await answered(gateway, SNAPSHOTS, "other")
        answers = await asyncio.gather(*(post(gateway, SNAPSHOTS) for _ in range(10)))
    assert sorted(answer.status for answer in answers) == [201] + [429] * 9
    assert await database.fetch_value("SELECT count(*) FROM portfolio_snapshots") == 2


async def test_snapshotter_that_dies_between_commit_and_answer_is_made_up_for(
    database: Database, database_url: str, bus: Bus, gateway: Gateway
) -> None:
    await create_user(database, positions={"AAPL": ("2", "1")})
    await set_price(database, "AAPL", "10")
    has_died, deaths = asyncio.Event(), 0

    async def dies(payload: bytes) -> Message:
        nonlocal deaths
        request = SnapshotRequested.model_validate_json(payload)
        await queries.take_requested_snapshot(
            database, request.user_id, request.requested_at, SNAPSHOT_COOLDOWN
        )
        await set_price(database, "AAPL", "99")
        deaths += 1
        has_died.set()
        await asyncio.Event().wait()
        raise AssertionError

    dying = asyncio.create_task(served_until(bus, dies, has_died))
    asking = asyncio.create_task(answered(gateway, SNAPSHOTS))
    await has_died.wait()
    async with snapshotter(database_url, bus):
        answer = await asking
    assert (answer.status, answer.json()["total_value"], deaths) == (201, Decimal("20.00"), 1)
    assert await database.fetch_value("SELECT count(*) FROM portfolio_snapshots") == 1
    await dying


async def served_until(bus: Bus, answer: Responder, stop: asyncio.Event) -> None:
    """Serve, and fall silent once `stop` is set."""
    await bus.serve(SNAPSHOT_REQUESTED, answer, stop, answer_seconds_max=60)


async def test_nobody_who_takes_snapshots_is_said_so_at_once(database: Database, gateway: Gateway) -> None:
    await create_user(database)
    async with asyncio.timeout(2):
        answer = await post(gateway, SNAPSHOTS)
    assert (answer.status, answer.problem().type) == (503, "urn:foliotick:problem:snapshotter-unavailable")
    assert "SNAPSHOT_ENABLED" in answer.problem().detail
    assert answer.headers["Retry-After"] == "2"


async def test_snapshotter_that_is_silent_is_not_waited_for_beyond_the_deadline(
    database: Database, database_url: str, bus: Bus
) -> None:
    await create_user(database)
    is_asked, asked = asyncio.Event(), 0

    async def silent(_: bytes) -> Message:
        nonlocal asked
        asked += 1
        is_asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        running(database_url, bus=bus, request_timeout_seconds=1) as gateway,
        serving(bus, SNAPSHOT_REQUESTED, silent),
    ):

        async def is_unavailable() -> bool:
            answer = await post(gateway, SNAPSHOTS)
            assert answer.problem().type == "urn:foliotick:problem:snapshotter-unavailable"
            return is_asked.is_set()

        await eventually(is_unavailable)
    assert asked >= 2  # the same request once more


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        (Refused(404, "there is no such user"), (404, "user-unknown", None)),
        (Refused(403, "the user is deactivated"), (403, "user-deactivated", None)),
        (Refused(429, "granted once in 60 s", 17), (429, "too-many-requests", "17")),
        (Refused(503, "snapshots cannot be stored now", 7), (503, "snapshotter-unavailable", "7")),
        (Refused(400, "requested_at is away"), (503, "snapshotter-unavailable", "2")),
        (Refused(500, "the request failed"), (503, "snapshotter-unavailable", "2")),
    ],
)
async def test_refusal_of_the_snapshotter_is_passed_on(
    database: Database, bus: Bus, gateway: Gateway, refused: Refused, expected: tuple[int, str, str | None]
) -> None:
    await create_user(database)
    is_asked = asyncio.Event()

    async def refuses(_: bytes) -> Message:
        is_asked.set()
        raise refused

    async with serving(bus, SNAPSHOT_REQUESTED, refuses):

        async def is_refused() -> Answer | None:
            answer = await post(gateway, SNAPSHOTS)
            return answer if is_asked.is_set() else None

        answer = await eventually(is_refused)
        assert answer is not None
    kind = answer.problem().type.removeprefix("urn:foliotick:problem:")
    assert (answer.status, kind, answer.headers.get("Retry-After")) == expected


async def test_user_deleted_meanwhile_is_unknown(
    database: Database, database_url: str, bus: Bus, gateway: Gateway
) -> None:
    user_id = await create_user(database, cash="5")
    async with snapshotter(database_url, bus):
        await create_user(database, "other")
        await answered(gateway, SNAPSHOTS, "other")
        with pytest.raises(Refused, match="no such user"):
            await bus.request(
                SNAPSHOT_REQUESTED,
                SnapshotRequested(user_id=user_id + 1000, requested_at=utc_now()),
                SnapshotTaken,
                timeout_seconds=5,
            )
        await database.fetch("DELETE FROM users WHERE id = $1", user_id)
        assert (await post(gateway, SNAPSHOTS)).problem().type == "urn:foliotick:problem:user-unknown"


# ---- prices --------------------------------------------------------------------------------------


async def test_prices_are_refreshed_and_current_has_them(
    database: Database, bus: Bus, gateway: Gateway, alpaca: FakeAlpaca
) -> None:
    await create_user(database, positions={"AAPL": ("2", "1"), "NONE": ("1", "1")})
    await set_price(
        database, "AAPL", "10", feed="iex", traded_at=utc_now().replace(year=2026, month=1, day=5)
    )
    alpaca.trades = {"AAPL": trade("175.25", "2026-03-02T15:00:00Z")}
    before = utc_now()
    async with held_lease(database) as lease, feeder(database, bus, alpaca, lease):
        answer = await answered(gateway, PRICES)
        assert (await gateway.get(CURRENT)).json()["investment_value"] == Decimal("350.50")
        second = await post(gateway, PRICES)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    refreshed = RefreshedPrices.model_validate(answer.json())
    assert (refreshed.symbols, refreshed.confirmed, refreshed.changed, refreshed.rejected) == (2, 1, 1, 1)
    assert refreshed.refreshed_at >= timestamp_of(before.isoformat())[:19]
    assert (second.status, second.problem().type) == (429, "urn:foliotick:problem:too-many-requests")
    assert 25 <= int(second.headers["Retry-After"]) <= 30


async def test_prices_and_snapshots_wait_for_themselves_alone(
    database: Database, database_url: str, bus: Bus, gateway: Gateway, alpaca: FakeAlpaca
) -> None:
    await create_user(database, positions={"AAPL": ("2", "1")})
    alpaca.trades = {"AAPL": trade("175.25")}
    async with (
        held_lease(database) as lease,
        feeder(database, bus, alpaca, lease),
        snapshotter(database_url, bus),
    ):
        assert (await answered(gateway, PRICES)).status == 200
        taken = await answered(gateway, SNAPSHOTS)
    assert (taken.status, taken.json()["total_value"]) == (201, Decimal("350.50"))


async def test_no_feeder_is_said_so_at_once(database: Database, gateway: Gateway) -> None:
    await create_user(database)
    async with asyncio.timeout(2):
        answer = await post(gateway, PRICES)
    assert (answer.status, answer.problem().type) == (503, "urn:foliotick:problem:feeder-unavailable")
    assert answer.headers["Retry-After"] == "2"


async def test_market_in_trouble_is_no_fault_of_the_user(
    database: Database, bus: Bus, gateway: Gateway
) -> None:
    await create_user(database)
    is_asked = asyncio.Event()

    async def refuses(_: bytes) -> Message:
        is_asked.set()
        raise Refused(503, "no price came: away", 30)

    async with serving(bus, REFRESH_REQUESTED, refuses):

        async def is_refused() -> Answer | None:
            answer = await post(gateway, PRICES)
            return answer if is_asked.is_set() else None

        answer = await eventually(is_refused)
        assert answer is not None
    assert answer.problem().type == "urn:foliotick:problem:feeder-unavailable"
    assert answer.headers["Retry-After"] == "30"


# ---- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SNAPSHOTS, PRICES])
async def test_who_may_not_ask_is_told_why(database: Database, gateway: Gateway, path: str) -> None:
    await create_user(database)
    await create_user(database, "deactivated", active=False)
    kinds = [
        (await gateway.ask("POST", path)).problem().type,
        (await post(gateway, path, "nobody")).problem().type,
        (await post(gateway, path, "deactivated")).problem().type,
        (await post(gateway, f"{path}?user=1")).problem().type,
        (await gateway.get(path)).problem().type,
        (await gateway.ask("POST", path, headers=bearer(), data=b"x" * 2000)).problem().type,
    ]
    assert kinds == [
        f"urn:foliotick:problem:{name}"
        for name in (
            "token-missing",
            "user-unknown",
            "user-deactivated",
            "unexpected-parameter",
            "method-not-allowed",
            "body-too-large",
        )
    ]


@pytest.mark.parametrize("path", [SNAPSHOTS, PRICES])
async def test_without_the_bus_nothing_is_asked(database: Database, database_url: str, path: str) -> None:
    await create_user(database)
    async with running(database_url) as gateway:
        answer = await post(gateway, path)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
