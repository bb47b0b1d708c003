"""The checker is worth something: it says so when the product is broken, and when an answer is wrong by a cent."""

import asyncio
import os
import secrets
import signal
import subprocess
import time
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from local.servers import child_command
from local.settings import free_port
from services.snapshotter.queries import take_snapshots
from shared.bus import Bus
from shared.clock import last_boundary, next_boundary, utc_now
from shared.database import Database
from tests.factories import create_user, set_price
from tests.faults import checker, mix, population, system, truth
from tests.faults import readers as readers_of
from tests.faults.checker import Detail, Snapshot, Usage, Verdict
from tests.faults.parts import FROZEN, KILLED, NOT_STOPPED, STOPPING, End, Nats, Postgres, Service, Spell
from tests.faults.population import Order, User
from tests.faults.readers import Asked, Point, Readers, judge_chart, judge_portfolio
from tests.faults.system import Options
from tests.faults.tampered import runner
from tests.streams import trade
from tests.waiting import eventually

SEED = 3
AT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)


def kinds(verdict: Verdict) -> set[str]:
    return {each.partition(":")[0] for each in verdict.wrong}


# ---- a broken product ----------------------------------------------------------------------------


async def test_lost_deduplication_lost_positions_and_older_prices_are_found(tmp_path: Path) -> None:
    options = Options(
        wrapper={
            "snapshotter": runner("snapshotter", "no_dedup", "lost_details"),
            "price_feeder": runner("price_feeder", "no_newer_wins"),
        },
        environment={"PRICE_STREAM_ENABLED": "false"},
    )
    async with system.running(tmp_path, population.drawn(20, SEED), options) as running:
        connection = await asyncpg.connect(running.postgres.url)
        await connection.execute("ALTER TABLE portfolio_snapshots DROP CONSTRAINT portfolio_snapshots_pkey")
        await connection.close()
        async with mix.lively(running, SEED, readers=1) as life:
            fault = {"kind": "out_of_order", "age_seconds": 60, "times": 3}
            async with running.http.post(
                f"{running.market.health_url}/simulator/faults", json=fault
            ) as answer:
                assert answer.status == 201
            await _until(utc_now() + 3 * system.SLOT)
        verdict = await life.verdict(running)
    assert {"due", "snapshot", "price went back"} <= kinds(verdict)
    assert any("2 snapshots of slot" in each for each in verdict.wrong)


async def test_acknowledging_before_the_commit_is_found(tmp_path: Path) -> None:
    options = Options(wrapper={"snapshotter": runner("snapshotter", "ack_first")}, replicas=1)
    async with system.running(tmp_path, population.drawn(20, SEED), options) as running:
        (snapshotter,) = running.services["snapshotter"]
        async with mix.lively(running, SEED, readers=1) as life:
            for number in range(
                1, 5
            ):  # between acknowledgement and commit, at one of these moments at the latest
                await _until(next_boundary(utc_now(), system.SLOT) + number * timedelta(seconds=0.1))
                snapshotter.kill()
                await snapshotter.wait_until_ready()
        verdict = await life.verdict(running)
    assert kinds(verdict) == {"due"}
    assert any("no snapshot of slot" in each for each in verdict.wrong)


async def _until(at: datetime) -> None:
    await asyncio.sleep((at - utc_now()).total_seconds())


# ---- a wrong answer ------------------------------------------------------------------------------


def portfolio() -> dict[str, object]:
    """Return the answer of one who holds 2.5 AAPL at 10.25, 5 of what has no price, and 100 dollars less one order."""
    return {
        "cash_balance": Decimal("99.00"),
        "positions": [
            {
                "ticker": "AAPL",
                "shares": Decimal("2.5"),
                "price_per_share": Decimal("10.25"),
                "current_value": Decimal("25.63"),  # 25.625, half away from zero
            }
        ],
        "unpriced": [{"ticker": "NOPE", "shares": Decimal(5)}],
        "investment_value": Decimal("25.63"),
        "total_value": Decimal("124.63"),
    }


USER = User("user", Decimal("100.00"), {"AAPL": Decimal("1.5"), "NOPE": Decimal(5)})


def test_right_portfolio_has_nothing_wrong_with_it() -> None:
    assert judge_portfolio(portfolio(), USER, range(3)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"total_value": Decimal("124.62")}, "total value"),
        ({"investment_value": Decimal("25.62"), "total_value": Decimal("124.62")}, "investment value"),
        ({"cash_balance": Decimal("98.00"), "total_value": Decimal("123.63")}, "holdings of no order"),
        ({"unpriced": []}, "without a price"),
        (
            {"positions": [], "investment_value": Decimal(0), "total_value": Decimal("99.00")},
            "holdings of no order",
        ),
    ],
)
def test_what_is_wrong_with_a_portfolio_is_said(change: dict[str, object], said: str) -> None:
    found = judge_portfolio(portfolio() | change, USER, range(3))
    assert any(said in each for each in found), found


def test_portfolio_of_an_order_that_nobody_may_have_seen_is_wrong() -> None:
    assert any("holdings" in each for each in judge_portfolio(portfolio(), USER, range(2, 4)))


def test_orders_that_a_reader_may_have_seen_are_those_committed_before_up_to_those_asked_for() -> None:
    user = User("user", Decimal(1), {}, orders=[Order(1, 0.0, 1.0), Order(2, 2.0, None), Order(3, 4.0, 5.0)])
    assert user.orders_between(0.5, 1.5) == range(2)  # none of them, or the first
    assert user.orders_between(1.5, 3.0) == range(1, 3)  # the first, or the second that may have been lost
    assert user.orders_between(5.0, 9.0) == range(3, 4)


def test_chart_that_does_not_add_up_is_wrong() -> None:
    point = {"timestamp": "2026-03-02T15:00:00Z", "value": Decimal(100), "partial": True}
    chart = {
        "data_points": [point],
        "data_available": True,
        "start_value": Decimal(100),
        "current_value": Decimal("110.50"),
        "profit_loss": Decimal("10.50"),
    }
    assert judge_chart(chart, USER) == []
    for change in (
        {"profit_loss": Decimal("10.51")},
        {"start_value": Decimal(99), "profit_loss": Decimal("11.50")},
        {"data_available": False},
        {"data_points": [point, point]},
        {"data_points": [{"timestamp": "2026-03-02T15:00:00Z", "value": Decimal(100)}]},
    ):
        assert judge_chart(chart | change, USER), change


def system_of(gateway: Service) -> system.System:
    """Return a system in which nothing runs."""
    return system.System(
        folder=Path(),
        population=population.Population([]),
        postgres_servers=[Postgres("postgres")],
        nats_servers=[Nats("nats")],
        market=Service("market"),
        services={"api_gateway": [gateway]},
        http=None,  # type: ignore[arg-type]  # nobody is asked
        gateway_ports={},
        jwt_secret="",
    )


def test_refusals_of_an_overload_are_excused_and_silence_is_not() -> None:
    gateway = Service("gateway")
    readers = Readers(system_of(gateway))
    gateway.overloads.append(Spell("overloaded", 10.0, 20.0))
    readers.refused = [Asked(gateway.name, at, at + 1.0, f"at {at:g}") for at in (8.5, 19.5, 24.5, 25.5)]
    readers.unanswered = [Asked(gateway.name, 15.0, 22.0, "silence")]
    assert readers.unexcused() == [
        "gateway gave no answer (silence)",
        "gateway refused without need (at 8.5)",  # and over before it began
        "gateway refused without need (at 25.5)",  # more than five seconds after it
    ]


def test_refused_read_is_excused_by_postgres_and_by_nothing_else_that_is_away() -> None:
    gateway = Service("gateway")
    disturbed = system_of(gateway)
    disturbed.postgres.spells.append(Spell("frozen", 10.0, 12.0))
    disturbed.nats.spells.append(Spell("frozen", 20.0, 22.0))
    disturbed.market.spells.append(Spell("frozen", 30.0, 32.0))
    readers = Readers(disturbed)
    readers.refused = [Asked(gateway.name, at, at + 0.5, f"at {at:g}") for at in (11.0, 21.0, 31.0)]
    assert readers.unexcused() == [
        "gateway refused without need (at 21)",
        "gateway refused without need (at 31)",
    ]


def test_time_out_counts_for_the_slowest_unless_its_gateway_or_the_way_there_was_struck() -> None:
    assert readers_of.GIVE_UP_SECONDS > readers_of.DEADLINE_SECONDS + readers_of.LATE_SECONDS_MAX + 5
    gateway = Service("gateway")
    disturbed = system_of(gateway)
    disturbed.postgres.spells.append(Spell("frozen", 0.0, 12.0))
    gateway.spells.append(Spell("frozen", 40.0, 52.0))
    readers = Readers(disturbed)
    assert readers._took(Asked(gateway.name, 40.0, 54.0, "TimeoutError")) == 0.0
    assert readers.slowest_seconds == 0.0
    assert (
        readers._took(Asked(gateway.name, 1.0, 9.5, "TimeoutError")) == 8.5
    )  # PostgreSQL is no excuse for that
    assert readers.slowest_seconds == 8.5


# ---- wrong rows ----------------------------------------------------------------------------------


def snapshot(**change: object) -> Snapshot:
    """Return a snapshot of the user above, with id 1, after his first order."""
    usual: dict[str, object] = {
        "at": AT,
        "user_id": 1,
        "total_value": Decimal("124.63"),
        "cash_balance": Decimal("99.00"),
        "investment_value": Decimal("25.63"),
        "unpriced_positions": 1,
        "details": (Detail("AAPL", Decimal("2.5"), Decimal("25.63"), Decimal("10.25")),),
    }
    return Snapshot(**(usual | change))  # type: ignore[arg-type]


def test_every_due_snapshot_must_be_there_once_and_no_other() -> None:
    user = User("user", Decimal(100), {}, id=1)
    slots = [AT, AT + timedelta(seconds=1)]
    right = [snapshot(), snapshot(at=slots[1])]
    assert checker.not_once(right, slots, [user]) == []
    assert checker.not_once(right[:1], slots, [user]) == ["no snapshot of slot 15:00:01 and user 1"]
    assert checker.not_once([*right, right[0]], slots, [user]) == ["2 snapshots of slot 15:00:00 and user 1"]
    stray = snapshot(at=AT + timedelta(seconds=0.5))
    assert checker.not_once([*right, stray], slots, [user]) == [
        "a snapshot at 15:00:00.500000 of user 1 that was not due"
    ]


def since_the_slot(at: datetime) -> float:
    """Return a moment in seconds that begin with the slot."""
    return (at - AT).total_seconds()


def test_snapshots_beyond_the_counted_slots_must_have_been_due_too() -> None:
    active = [User("user", Decimal(100), {}, id=1)]
    now = AT + timedelta(seconds=60)

    def said(at: datetime, user_id: int = 1) -> int:
        return len(checker.never_due([{"timestamp": at, "user_id": user_id}], AT, now, active))

    assert said(AT) == said(AT + timedelta(seconds=30)) == said(now) == 0
    assert said(AT - timedelta(seconds=1))  # nobody was there to take it
    assert said(AT - timedelta(hours=1))
    assert said(now + timedelta(seconds=2))
    assert said(AT + timedelta(seconds=30.5))
    assert said(AT, user_id=2)


def test_earliest_slot_is_the_one_in_which_the_first_snapshotter_was_started() -> None:
    still = system_of(Service("gateway"))
    began = time.monotonic()
    still.services["snapshotter"] = [
        Service(f"snapshotter-{number}", spells=[Spell("starting", began - ago)])
        for number, ago in ((1, 100.0), (2, 130.0))
    ]
    earliest = last_boundary(utc_now() - timedelta(seconds=130), system.SLOT)
    assert checker.earliest_slot(still) in (earliest, earliest - system.SLOT)


_LEAVE_AN_ORPHAN = """
INSERT INTO position_snapshots (timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share)
SELECT timestamp, user_id + 1, ticker, shares, cost_basis, current_value, price_per_share
FROM position_snapshots
"""


async def test_position_of_no_snapshot_is_an_orphan(database: Database, database_url: str) -> None:
    user_id = await create_user(database, positions={"AAPL": ("1", "10")})
    await set_price(database, "AAPL", "10.00")
    at = last_boundary(utc_now(), system.SLOT)
    await take_snapshots(database, at, 0, 1)
    connection = await asyncpg.connect(database_url)
    try:
        assert await checker.orphans(connection) == []
        await connection.execute(_LEAVE_AN_ORPHAN)
        assert await checker.orphans(connection) == [
            f"1 positions at {at:%Y-%m-%d %H:%M:%S}.000000 of user {user_id + 1}"
        ]
    finally:
        await connection.close()


async def test_price_on_the_bus_must_be_the_one_in_the_table(
    database: Database, database_url: str, bus: Bus, nats_url: str
) -> None:
    connection = await asyncpg.connect(database_url)

    async def found() -> list[str]:
        return await checker.unlike_the_bus(connection, [nats_url], seconds_max=0.3)

    try:
        await trade(database, bus, "AAPL", "10.25")
        await trade(database, bus, "BTC/USD", "65000.00")
        assert await found() == []
        await trade(database, None, "AAPL", "10.26")  # stored, and never published
        (said,) = await found()
        assert said.startswith("AAPL is ")
        await trade(database, bus, "AAPL", "10.27")
        await trade(database, None, "MSFT", "400.00")
        (said,) = await found()
        assert said.startswith("MSFT is ")
    finally:
        await connection.close()


def test_snapshot_must_have_what_was_ordered_before_its_slot() -> None:
    people = population.Population([User("user", USER.cash, USER.shares, id=1)])

    def found(*orders: Order) -> list[str]:
        people.users[0].orders = list(orders)
        return checker.incomplete([snapshot()], people, since_the_slot)  # of after the first order

    assert found(Order(1, -3.0, -2.0)) == []
    assert found(Order(1, 5.0, 6.0)) == []  # it was taken late
    assert found(Order(1, -5.0, -4.0), Order(2, -3.0, None)) == []  # the second may never have been
    assert found(Order(1, -5.0, -4.0), Order(2, -3.0, -0.5)) == []  # so soon before, by some clock after
    (said,) = found(Order(1, -5.0, -4.0), Order(2, -3.0, -2.0))
    assert "after no order in range(2, 3)" in said


def test_snapshot_must_have_prices_of_its_slot_or_later() -> None:
    def written(price: str, seconds: float) -> dict[str, object]:
        return {"symbol": "AAPL", "price": Decimal(price), "written_at": AT + timedelta(seconds=seconds)}

    def found(*prices: dict[str, object], was_struck: bool = False) -> list[str]:
        replaced = checker.replaced_at(prices)
        return checker.outdated([snapshot()], replaced, lambda _since, _until: was_struck)  # at 10.25

    before = written("10.25", -60)
    assert found(before) == []
    assert found(before, written("10.26", -2)) == []  # which is committed at any moment
    assert found(before, written("10.26", 1)) == []
    assert found(written("10.24", -60), written("10.25", 5)) == []  # it was taken late
    assert found(before, written("10.26", -20), written("10.25", -10)) == []
    assert found(before, written("10.26", -8), was_struck=True) == []
    assert found(before, written("10.26", -8)) == [
        "AAPL at 10.25 in slot 15:00:00: it was replaced 8.0 s before"
    ]
    assert found(written("10.26", -60)) == ["AAPL at 10.25 in slot 15:00:00: it was never stored"]


def test_commit_may_be_held_up_by_what_befell_postgres() -> None:
    still = system_of(Service("gateway"))
    now = time.monotonic()
    still.postgres.spells.append(Spell("frozen", now - 20, now - 10))
    was_struck = checker.postgres_was_struck(still)

    def ago(seconds: float) -> datetime:
        return utc_now() - timedelta(seconds=seconds)

    assert was_struck(ago(25), ago(15))
    assert not was_struck(ago(40), ago(25))
    assert not was_struck(ago(5), ago(1))


def test_more_prices_of_a_symbol_than_shards_are_of_more_than_one_view() -> None:
    def slot_of(*prices: str) -> list[Snapshot]:
        return [
            snapshot(user_id=number, details=(Detail("AAPL", Decimal(1), Decimal(price), Decimal(price)),))
            for number, price in enumerate(prices)
        ]

    assert checker.torn(slot_of("10.25", "10.26", "10.25")) == []
    assert checker.torn(slot_of("10.25", "10.26", "10.27")) == [
        "AAPL in slot 15:00:00: [Decimal('10.25'), Decimal('10.26'), Decimal('10.27')]"
    ]


def test_stored_price_must_have_been_the_market_s() -> None:
    trade = truth.Market(system.MARKET_SEED).latest_trade("AAPL", AT)
    right = {"symbol": "AAPL", "price": trade.price, "traded_at": truth.traded_at(trade)}
    assert checker.untrue([right]) == []
    for change in (
        {"price": trade.price + Decimal("0.01")},
        {"traded_at": truth.traded_at(trade) + timedelta(microseconds=1)},
        {"symbol": population.UNKNOWN_SYMBOL},
    ):
        assert len(checker.untrue([right | change])) == 1, change


def test_snapshot_must_have_all_positions_and_add_up() -> None:
    user = User("user", USER.cash, USER.shares, id=1, orders=[Order(1, 0.0, 1.0)])
    people = population.Population([user])
    assert checker.incomplete([snapshot()], people, since_the_slot) == []
    for change in (
        {"details": ()},
        {"unpriced_positions": 0},
        {"total_value": Decimal("124.62")},
        {"investment_value": Decimal("25.62"), "total_value": Decimal("124.62")},
        {"details": (Detail("AAPL", Decimal("2.5"), Decimal("25.62"), Decimal("10.25")),)},
        {"cash_balance": Decimal("97.00"), "total_value": Decimal("122.63")},
    ):
        assert checker.incomplete([snapshot(**change)], people, since_the_slot), change


def test_point_of_a_chart_must_be_a_snapshot_of_that_user_in_that_bucket() -> None:
    stored = [{"timestamp": AT + timedelta(minutes=6), "user_id": 1, "total_value": Decimal("124.63")}]
    bucket = AT + timedelta(minutes=5)
    assert checker.uncharted([Point(1, bucket, Decimal("124.63"))], stored) == []
    for point in (
        Point(1, bucket, Decimal("124.62")),
        Point(2, bucket, Decimal("124.63")),
        Point(1, AT, Decimal("124.63")),
    ):
        assert checker.uncharted([point], stored), point


def test_last_points_of_a_chart_are_kept() -> None:
    points = [
        {"timestamp": f"2026-03-02T15:{minute:02}:00Z", "value": Decimal(minute)} for minute in (0, 5, 10)
    ]
    at = datetime(2026, 3, 2, 15, 5, tzinfo=UTC)
    assert readers_of.points_of({"data_points": points}, User("user", Decimal(1), {}, id=7)) == [
        Point(7, at, Decimal(5)),
        Point(7, at + timedelta(minutes=5), Decimal(10)),
    ]


def test_connections_are_counted_by_the_pool_they_are_of() -> None:
    allowed = {"": 1, "snapshotter": 12, "api_gateway": 20}
    assert checker.beyond({"": 1, "snapshotter": 12, "api_gateway": 3}, allowed) == []
    assert checker.beyond({"": 2, "snapshotter": 13, "api_gateway": 20, "psql": 1}, allowed) == [
        "somebody has 2, of 1",
        "psql has 1, of 0",
        "snapshotter has 13, of 12",
    ]


# ---- processes -----------------------------------------------------------------------------------


def ended(folder: Path, *ends: End, module: str = "") -> list[str]:
    """Return what is said of a service whose processes ended so."""
    service = Service("snapshotter-1", ends=list(ends), module=module, folder=folder)
    service.log.write_text('{"level": "error"}\n')
    return checker.ended_otherwise(system_of(service))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (End(-9, frozenset({KILLED})), ""),
        (End(0, frozenset({STOPPING})), ""),
        (End(0, frozenset({FROZEN, STOPPING})), ""),
        (End(-9, frozenset({KILLED, STOPPING})), ""),
        (End(-9, frozenset()), "ended with -9 by itself"),  # for want of memory, say
        (End(-9, frozenset({STOPPING})), "ended with -9 after it was stopping"),
        (End(-9, frozenset({STOPPING, NOT_STOPPED})), "was not stopped in time, and killed"),
        (End(0, frozenset()), "ended with 0 by itself"),
        (End(0, frozenset({FROZEN})), "ended with 0 after it was frozen"),
        (End(1, frozenset({STOPPING})), "ended with 1 after it was stopping"),
    ],
)
def test_process_may_end_only_as_it_was_told_to(tmp_path: Path, end: End, said: str) -> None:
    assert ended(tmp_path, end) == ([f'snapshotter-1 {said}: {{"level": "error"}}'] if said else [])


def test_server_that_had_to_be_killed_because_it_did_not_stop_is_found() -> None:
    still = system_of(Service("gateway"))
    still.postgres.ends += [End(-9, frozenset({KILLED})), End(1, frozenset({STOPPING}))]
    assert checker.ended_otherwise(still) == []
    still.postgres.ends.append(End(-9, frozenset({STOPPING, NOT_STOPPED})))
    assert checker.ended_otherwise(still) == ["postgres was not stopped in time, and killed"]


def test_service_that_was_tampered_with_may_kill_itself_once(tmp_path: Path) -> None:
    died = End(-9, frozenset())
    deadly = runner("snapshotter", "die_before_acknowledging")
    assert ended(tmp_path, died, module=deadly) == []
    assert len(ended(tmp_path, died, died, module=deadly)) == 1
    assert len(ended(tmp_path, died, module=runner("snapshotter", "ack_first"))) == 1
    assert len(ended(tmp_path, End(1, frozenset()), module=deadly)) == 1


class Stubborn(Service):
    """A process that ignores SIGTERM."""

    async def _launch(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            child_command(["sh", "-c", "trap '' TERM; exec sleep 60"], death_signal="KILL")
        )

    async def is_ready(self) -> bool:
        return _ignores_sigterm(self.pids()[0])


def _ignores_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(ignored.split()[1], 16) & 1 << (signal.SIGTERM - 1))


async def test_what_befell_a_process_is_noted_with_its_end() -> None:
    stubborn = Stubborn("stubborn", stop_seconds_max=0.3)
    await stubborn.start()
    await stubborn.wait_until_ready()

    async def ends(count: int) -> list[End]:
        return stubborn.ends if len(stubborn.ends) == count else []

    stubborn.kill()
    await eventually(partial(ends, 1))
    await stubborn.wait_until_ready()
    stubborn.freeze()
    stopping = asyncio.create_task(stubborn.terminate())
    _, still = await asyncio.wait({stopping}, timeout=0.9)
    assert still, "nobody can stop while he is frozen"
    stubborn.thaw()
    assert await stopping is None
    await eventually(partial(ends, 2))
    await stubborn.end()
    assert stubborn.ends[:2] == [
        End(-9, frozenset({KILLED})),
        End(-9, frozenset({FROZEN, STOPPING, NOT_STOPPED})),
    ]


USED = Usage(tasks=20, threads=4, files=30, connections=3, in_use=1, memory_mb=100.0)


def test_more_than_comes_and_goes_is_a_leak() -> None:
    assert checker.more_than("gateway", USED, USED) == []
    for what, (times, more) in checker.MORE_MAX.items():
        before = getattr(USED, what)
        most = int(before * times + more)
        assert checker.more_than("gateway", USED, replace(USED, **{what: most})) == []
        assert checker.more_than("gateway", USED, replace(USED, **{what: most + 1})) == [
            f"gateway: {most + 1} {what}, {before:.0f} before"
        ]
    begins_to_lead = replace(USED, tasks=USED.tasks + checker.FEEDER_TASKS)
    assert checker.more_than("price_feeder-1", USED, begins_to_lead) == []
    assert checker.more_than("snapshotter-1", USED, begins_to_lead) == ["snapshotter-1: 44 tasks, 20 before"]
    assert set(checker.MORE_MAX) == {each.name for each in fields(Usage)}


def test_replica_that_stood_by_may_use_what_the_one_that_led_used() -> None:
    still = system_of(Service("gateway"))
    still.services["price_feeder"] = [Service("price_feeder-1"), Service("price_feeder-2")]
    used = {
        "gateway": USED,
        "price_feeder-1": replace(USED, tasks=40, memory_mb=90.0),
        "price_feeder-2": USED,
    }
    most = replace(USED, tasks=40)
    assert checker.of_any_replica(still, used) == {
        "gateway": USED,
        "price_feeder-1": most,
        "price_feeder-2": most,
    }


async def test_service_that_does_not_say_what_it_uses_is_found() -> None:
    assert checker.more_than("gateway", USED, None) == ["gateway does not say what it uses"]
    async with aiohttp.ClientSession() as http:
        silent = Service("gateway", health_url=f"http://127.0.0.1:{free_port()}", http=http)
        with pytest.raises(AssertionError, match="gateway does not say what it uses"):
            await checker.usage(system_of(silent), seconds_max=0.1)


def test_process_that_a_dead_service_left_behind_is_found() -> None:
    still = system_of(Service("gateway"))
    still.jwt_secret = secrets.token_hex()
    assert checker.left_behind(still) == []
    # Its parent ends at once: it is nobody's child any more.
    leaving = subprocess.run(
        ["sh", "-c", "sleep 60 >&- & echo $!"],
        env={**os.environ, "JWT_SECRET": still.jwt_secret},
        stdout=subprocess.PIPE,
        check=True,
        start_new_session=True,
    )
    orphan = int(leaving.stdout)
    try:
        assert checker.left_behind(still) == [f"process {orphan}"]
    finally:
        os.kill(orphan, signal.SIGKILL)


# ---- orders --------------------------------------------------------------------------------------


def test_order_that_was_acknowledged_must_be_there() -> None:
    user = User("user", USER.cash, USER.shares, id=1, orders=[Order(1, 0.0, 1.0), Order(2, 2.0, None)])
    people = population.Population([user])

    def rows(cash: str, shares: str) -> list[dict[str, object]]:
        return [
            {"id": 1, "cash_balance": Decimal(cash), "ticker": "AAPL", "shares": Decimal(shares)},
            {"id": 1, "cash_balance": Decimal(cash), "ticker": "NOPE", "shares": Decimal(5)},
        ]

    assert checker.lost_orders(rows("99.00", "2.5"), people) == []
    assert checker.lost_orders(rows("98.00", "3.5"), people) == []  # the second may be there
    assert checker.lost_orders(rows("100.00", "1.5"), people)
    assert checker.lost_orders(rows("99.00", "1.5"), people)  # half of it
