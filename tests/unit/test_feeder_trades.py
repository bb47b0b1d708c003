"""Alpaca's trades, judged one by one. (The whole list of bad ones is in test_market_data.)"""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from services.price_feeder.trades import LastTrade, Rejection, last_trade, symbol_problem
from shared.money import Price

NOW = datetime(2026, 3, 2, 15, 0, 0, tzinfo=UTC)


def judged(price: object, at: object = "2026-03-02T14:59:59Z") -> LastTrade | Rejection:
    return last_trade("AAPL", {"p": price, "t": at}, feed="iex", now=NOW)


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (172.78, "172.7800"),
        (29791, "29791.0000"),
        (0.1, "0.1000"),
        (0.00005, "0.0001"),  # half goes away from zero
        (2.00015, "2.0002"),
        (1e-3, "0.0010"),
        (99999999999.9999, "99999999999.9999"),
    ],
)
def test_price_has_four_places(price: float, expected: str) -> None:
    trade = judged(price)
    assert isinstance(trade, LastTrade)
    assert str(trade.price) == expected


def test_price_that_rounds_up_to_the_limit_is_too_large() -> None:
    assert judged(99999999999.99996) is Rejection.TOO_LARGE


def test_nanoseconds_are_cut_and_offsets_turned_to_utc() -> None:
    trade = judged(1, "2026-03-02T09:59:59.123456999-05:00")
    assert isinstance(trade, LastTrade)
    assert trade.traded_at == datetime(2026, 3, 2, 14, 59, 59, 123456, tzinfo=UTC)
    assert trade.traded_at.tzinfo is UTC


@pytest.mark.parametrize(
    ("conditions", "is_closing"), [(["@", "6"], True), (["@"], False), (None, False), ("6", False)]
)
def test_closing_print_is_known_by_its_condition(conditions: object, is_closing: bool) -> None:
    raw = {"p": 1, "t": "2026-03-02T14:59:59Z", "c": conditions}
    trade = last_trade("AAPL", raw, feed="sip", now=NOW)
    assert isinstance(trade, LastTrade)
    assert trade.is_closing_print is is_closing


def test_trade_of_months_ago_is_a_last_trade() -> None:
    assert isinstance(judged(1, "2025-08-01T15:00:00Z"), LastTrade)


@pytest.mark.parametrize(
    "at", [None, 1772463600, "", "yesterday", "2026-03-02", "9999-12-31T23:59:59-12:00", "9" * 99]
)
def test_odd_times_are_rejected_without_a_failure(at: object) -> None:
    assert judged(1, at) in (Rejection.MALFORMED, Rejection.FROM_THE_FUTURE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("pt"), inner),
    max_leaves=5,
)


@given(json_values)
def test_whatever_comes_is_a_storable_trade_or_a_rejection(raw: object) -> None:
    trade = last_trade("AAPL", raw, feed="iex", now=NOW)
    if isinstance(trade, LastTrade):
        TypeAdapter(Price).validate_python(trade.price)


@given(st.floats() | st.integers())
@example(10**400)
@example(-(10**400))
def test_every_number_is_a_price_within_the_tables_bounds_or_rejected(price: float) -> None:
    trade = judged(price)
    if isinstance(trade, LastTrade):
        TypeAdapter(Price).validate_python(trade.price)
        assert abs(trade.price - Decimal(str(price))) <= Decimal("0.00005")


@pytest.mark.parametrize(
    "symbol", ["AAPL", "BRK.B", "BF-A", "ABC.PR.A", "003CVR016", "BTC/USD", "ETH/USDT", "AAVE/USDC"]
)
def test_symbols_worth_asking_for(symbol: str) -> None:
    assert symbol_problem(symbol) is None


@pytest.mark.parametrize(
    "symbol",
    ["aapl", "A,B", "AAPL&feed=sip", ".", "BRK.", "BTC/", "/USD", "BTC/USD/X", "A B", "É", "A\n", "A%"],
)
def test_symbols_that_cannot_be_any(symbol: str) -> None:
    assert symbol_problem(symbol) is Rejection.NOT_A_SYMBOL


def test_pair_quoted_in_bitcoin_has_no_price_in_dollars() -> None:
    assert symbol_problem("ETH/BTC") is Rejection.NOT_IN_DOLLARS
