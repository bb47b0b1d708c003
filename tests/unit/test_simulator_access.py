"""Requests a minute, and which faults are due."""

import pytest
from pydantic import SecretStr, TypeAdapter

from services.market_simulator.access import BusiestMinute, Credentials, RateLimit, Refused
from services.market_simulator.faults import Fault, Faults

TRADES = "/v2/stocks/trades/latest"
AAPL = frozenset({"AAPL"})


def fault(kind: str, **parameters: object) -> Fault:
    read: Fault = TypeAdapter(Fault).validate_python({"kind": kind, **parameters})
    return read


def test_a_minute_begins_with_its_first_request_and_then_anew() -> None:
    limit = RateLimit(per_minute=2)
    quotas = [limit.spend("key", now_s) for now_s in (1000.5, 1030.0, 1060.0, 1060.5)]
    assert [quota.exceeded for quota in quotas] == [False, False, True, False]
    assert [quota.remaining for quota in quotas] == [1, 0, 0, 1]
    assert [quota.reset_at for quota in quotas] == [1061, 1061, 1061, 1121]
    assert quotas[2].retry_after_seconds == 1


def test_the_busiest_minute_is_any_sixty_seconds() -> None:
    busiest = BusiestMinute()
    for now_s in (
        0,
        50,
        60,
        109.9,
        110,
        300,
    ):  # 50, 60 and 109.9 are within 60 s, and so are 60, 109.9 and 110
        busiest.count(now_s)
    assert busiest.requests == 3


def test_the_table_of_callers_stays_bounded() -> None:
    limit = RateLimit(per_minute=1)
    for caller in range(25_000):
        limit.spend(str(caller), 1000.0)
    assert len(limit._windows) <= 10_000


def test_any_keys_are_let_in_unless_one_pair_is_set() -> None:
    anyone = Credentials(key=None, secret=None)
    keys = {"APCA-API-KEY-ID": "a", "APCA-API-SECRET-KEY": "b"}
    anyone.check(keys, required=True)
    anyone.check({}, required=False)
    with pytest.raises(Refused, match="unauthorized"):
        anyone.check({"APCA-API-KEY-ID": "a"}, required=True)
    one = Credentials(key=SecretStr("a"), secret=SecretStr("c"))
    with pytest.raises(Refused, match="forbidden"):
        one.check(keys, required=True)
    one.check(keys | {"APCA-API-SECRET-KEY": "c"}, required=True)


def test_faults_come_in_the_order_they_were_ordered() -> None:
    faults = Faults()
    for kind in ("server_error", "bad_gateway"):
        faults.add(fault(kind), now_s=0)
    assert [one.kind for one in faults.take(TRADES, AAPL, now_s=1)] == ["server_error"]
    assert [one.kind for one in faults.take(TRADES, AAPL, now_s=1)] == ["bad_gateway"]
    assert faults.take(TRADES, AAPL, now_s=1) == []


def test_spoilers_add_up_until_a_fault_replaces_the_answer() -> None:
    faults = Faults()
    for kind in ("nan", "truncated_json", "reset", "zero_price"):
        faults.add(fault(kind), now_s=0)
    assert [one.kind for one in faults.take(TRADES, AAPL, now_s=1)] == ["nan", "truncated_json", "reset"]
    assert [one.kind for one in faults.take(TRADES, AAPL, now_s=1)] == ["zero_price"]


def test_a_fault_of_some_seconds_ends_by_itself() -> None:
    faults = Faults()
    faults.add(fault("server_error", seconds=10), now_s=100)
    assert all(faults.take(TRADES, AAPL, now_s) for now_s in (100, 105, 109.9))
    assert faults.take(TRADES, AAPL, 110) == []


def test_a_fault_waits_for_a_request_that_it_concerns() -> None:
    faults = Faults()
    faults.add(fault("server_error", symbols=["TSLA"], path="/v2/stocks/bars"), now_s=0)
    tesla = frozenset({"TSLA", "SPY"})
    assert faults.take("/v2/stocks/bars", AAPL, 1) == []
    assert faults.take(TRADES, tesla, 1) == []
    assert [one.kind for one in faults.take("/v2/stocks/bars", tesla, 1)] == ["server_error"]


def test_the_trading_host_is_not_concerned_unless_named() -> None:
    faults = Faults()
    faults.add(fault("server_error"), now_s=0)
    assert faults.take("/v2/clock", frozenset(), 1) == []
    faults.add(fault("server_error", path="/v2/clock"), now_s=0)
    assert [one.kind for one in faults.take("/v2/clock", frozenset(), 1)] == ["server_error"]
