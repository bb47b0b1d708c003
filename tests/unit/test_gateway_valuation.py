"""The value of a watched portfolio: sums worked by hand, and which changes a client is told."""

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api_gateway import valuation
from services.api_gateway.valuation import Holding, Holdings, Portfolio, Quote
from shared.freshness import PriceStatus
from shared.messages import PriceTick

NOON = datetime(2026, 11, 20, 17, 0, tzinfo=UTC)
MARKET = '{"is_open":true}'


def quote(symbol: str, price: str, *, sequence: int = 1, at: datetime = NOON, feed: str = "iex") -> Quote:
    found = Quote(symbol)
    take(found, price, sequence=sequence, at=at, feed=feed)
    return found


def take(found: Quote, price: str, *, sequence: int, at: datetime = NOON, feed: str = "iex") -> None:
    tick = PriceTick(
        symbol=found.symbol, price=Decimal(price), traded_at=at, received_at=at, feed=feed, sequence=sequence
    )
    found.take(tick, at)
    found.status = PriceStatus.LIVE


def portfolio(cash: str, quotes: dict[str, Quote], **positions: tuple[str, str]) -> Portfolio:
    return Portfolio(holdings(cash, **positions), quotes, MARKET)


def holdings(cash: str, **positions: tuple[str, str]) -> Holdings:
    held = (Holding(ticker, Decimal(shares), Decimal(cost)) for ticker, (shares, cost) in positions.items())
    return Holdings(1, True, Decimal(cash), tuple(held))


def test_portfolio_is_worth_what_the_seed_says() -> None:
    whole = portfolio("5000.50", {"AAPL": quote("AAPL", "175.00")}, AAPL=("100", "15000.00")).whole(NOON)
    assert json.loads(whole, parse_float=str) == {
        "total_value": "22500.50",
        "investment_value": "17500.00",
        "cash_balance": "5000.50",
        "positions": [
            {
                "ticker": "AAPL",
                "shares": 100,
                "cost_basis": "15000.00",
                "current_value": "17500.00",
                "price_per_share": "175.00",
                "unrealized_gain_loss": "2500.00",
                "unrealized_gain_loss_percent": "16.67",
                "price_as_of": "2026-11-20T17:00:00Z",
                "price_status": "live",
                "price_feed": "iex",
            }
        ],
        "last_updated": "2026-11-20T17:00:00Z",
        "price_fresh": True,
        "unpriced": [],
        "simulated": False,
        "market": {"is_open": True},
    }


@pytest.mark.parametrize(
    ("shares", "price", "value"),
    [
        ("3", "0.1250", "0.38"),  # 0.375, half away from zero
        ("1", "0.3350", "0.34"),
        ("0.000000001", "0.0001", "0.00"),
        ("99999999999.999999999", "9.9999", "999990000000.00"),
        ("10", "99999999999.9999", None),  # 999,999,999,999.999 rounds to a trillion
        ("1", "999999999999.9950", None),  # rounds to a trillion
    ],
)
def test_market_value_is_rounded_once_and_bounded(shares: str, price: str, value: str | None) -> None:
    expected = None if value is None else Decimal(value)
    assert valuation.market_value(Decimal(shares), Decimal(price)) == expected


def test_gain_percent_rounds_half_away_from_zero_and_is_zero_without_cost() -> None:
    assert valuation.gain_percent(Decimal("-0.01"), Decimal("8.00")) == Decimal("-0.13")  # -0.125
    assert valuation.gain_percent(Decimal("5.00"), Decimal("0.00")) == Decimal("0.00")


def test_parts_are_rounded_before_they_are_added() -> None:
    quotes = {ticker: quote(ticker, "0.3350") for ticker in ("A", "B", "C")}
    told = json.loads(
        portfolio("0.00", quotes, A=("1", "0"), B=("1", "0"), C=("1", "0")).whole(NOON), parse_float=str
    )
    assert told["investment_value"] == "1.02"


def test_texts_are_those_of_the_database() -> None:
    assert [valuation.price_text(Decimal(price)) for price in ("175.0000", "0.1000", "1.2340", "1.2345")] == [
        "175.00",
        "0.10",
        "1.234",
        "1.2345",
    ]
    shares = ("100.000000000", "0.500000000", "0.000000001", "1000", "0.000000000")
    assert [valuation.quantity_text(Decimal(text)) for text in shares] == [
        "100",
        "0.5",
        "0.000000001",
        "1000",
        "0",
    ]
    instants = (NOON, NOON.replace(microsecond=120000), NOON.replace(microsecond=1))
    assert [valuation.instant_text(at) for at in instants] == [
        "2026-11-20T17:00:00Z",
        "2026-11-20T17:00:00.12Z",
        "2026-11-20T17:00:00.000001Z",
    ]


def test_changes_are_told_since_the_version_that_was_seen() -> None:
    quotes = {"A": quote("A", "1.00"), "B": quote("B", "2.00")}
    watched = portfolio("10.00", quotes, A=("1", "1"), B=("1", "1"))
    first = watched.settle()
    take(quotes["A"], "1.50", sequence=2)
    watched.touch("A")
    second = watched.settle()
    take(quotes["B"], "3.00", sequence=2)
    watched.touch("B")
    third = watched.settle()
    assert (first, second, third) == (1, 2, 3)
    assert all(watched.is_known(version) for version in (1, 2, 3))
    since_first = json.loads(watched.changes_since(1, NOON), parse_float=str)
    assert [position["ticker"] for position in since_first["positions"]] == ["A", "B"]
    since_second = json.loads(watched.changes_since(2, NOON), parse_float=str)
    assert [position["ticker"] for position in since_second["positions"]] == ["B"]
    assert since_second["total_value"] == "14.50"


def test_a_version_of_the_future_and_one_from_before_other_holdings_are_not_known() -> None:
    quotes = {"A": quote("A", "1.00"), "B": quote("B", "2.00")}
    watched = portfolio("10.00", quotes, A=("1", "1"))
    assert not watched.is_known(2)
    watched.hold(holdings("10.00", A=("1", "1"), B=("1", "1")), quotes)
    assert not watched.is_known(1)
    assert watched.is_known(2)
    watched.hold(holdings("10.00", A=("1", "1"), B=("1", "1")), quotes)
    assert watched.settle() == 2


def test_cash_and_shares_that_change_are_changes_and_not_the_whole() -> None:
    quotes = {"A": quote("A", "1.00"), "B": quote("B", "2.00")}
    watched = portfolio("10.00", quotes, A=("1", "1"), B=("1", "1"))
    watched.hold(holdings("20.00", A=("1", "1"), B=("1", "1")), quotes)
    watched.settle()
    assert watched.is_known(1)
    cash_alone = json.loads(watched.changes_since(1, NOON), parse_float=str)
    assert (cash_alone["total_value"], cash_alone["positions"]) == ("23.00", [])
    seen = watched.version
    watched.hold(holdings("20.00", A=("1", "1"), B=("5", "1")), quotes)
    watched.settle()
    assert watched.is_known(seen)
    bought = json.loads(watched.changes_since(seen, NOON), parse_float=str)
    assert (bought["total_value"], [position["ticker"] for position in bought["positions"]]) == (
        "31.00",
        ["B"],
    )


def test_a_position_that_gets_its_first_price_needs_the_whole_to_be_told() -> None:
    quotes = {"A": quote("A", "1.00"), "B": Quote("B")}
    watched = portfolio("10.00", quotes, A=("1", "1"), B=("1", "1"))
    told = json.loads(watched.whole(NOON))
    assert [position["reason"] for position in told["unpriced"]] == ["no_price"]
    assert told["price_fresh"] is True
    take(quotes["B"], "2.00", sequence=1)
    watched.touch("B")
    watched.settle()
    assert not watched.is_known(1)
    assert json.loads(watched.whole(NOON))["unpriced"] == []


def test_cash_alone_is_fresh_and_positions_without_any_price_are_not() -> None:
    cash = json.loads(portfolio("10.00", {}).whole(NOON))
    assert (cash["price_fresh"], cash["last_updated"]) == (True, "2026-11-20T17:00:00Z")
    unpriced = json.loads(portfolio("10.00", {"A": Quote("A")}, A=("1", "1")).whole(NOON))
    assert unpriced["price_fresh"] is False


def test_one_stale_price_makes_the_portfolio_not_fresh_and_closed_ones_do_not() -> None:
    quotes = {"A": quote("A", "1.00"), "B": quote("B", "2.00")}
    quotes["A"].status = PriceStatus.CLOSED
    watched = portfolio("0.00", quotes, A=("1", "1"), B=("1", "1"))
    assert json.loads(watched.whole(NOON))["price_fresh"] is True
    quotes["B"].status = PriceStatus.STALE
    assert json.loads(watched.pulse(NOON))["price_fresh"] is False


@given(
    cash=st.decimals(0, 10**12, places=2),
    held=st.lists(
        st.tuples(st.decimals(0, 10**6, places=9), st.decimals("0.0001", 10**5, places=4)), max_size=8
    ),
    changes=st.lists(st.tuples(st.integers(0, 7), st.decimals("0.0001", 10**5, places=4)), max_size=12),
)
def test_a_client_that_applies_changes_has_what_a_newcomer_gets(
    cash: Decimal, held: list[tuple[Decimal, Decimal]], changes: list[tuple[int, Decimal]]
) -> None:
    tickers = [f"T{number}" for number in range(len(held))]
    quotes = {ticker: quote(ticker, str(price)) for ticker, (_, price) in zip(tickers, held, strict=True)}
    positions = {ticker: (str(shares), "1.00") for ticker, (shares, _) in zip(tickers, held, strict=True)}
    watched = portfolio(str(cash), quotes, **positions)
    seen, shown = watched.settle(), json.loads(watched.whole(NOON), parse_float=str)
    for sequence, (number, price) in enumerate(changes, start=2):
        if number >= len(tickers):
            continue
        take(quotes[tickers[number]], str(price), sequence=sequence)
        watched.touch(tickers[number])
        if sequence % 2:
            version = watched.settle()
            change = json.loads(watched.changes_since(seen, NOON), parse_float=str)
            changed = {position["ticker"]: position for position in change.pop("positions")}
            shown |= change
            shown["positions"] = [
                changed.get(position["ticker"], position) for position in shown["positions"]
            ]
            seen = version
            assert shown == json.loads(watched.whole(NOON), parse_float=str)
