"""The synthetic market: the same everywhere, plausible, and its bars are those of its trades."""

import statistics
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from time import process_time

import pytest

from services.market_simulator.instants import MINUTE_NS, ns_of
from services.market_simulator.listings import LISTINGS
from services.market_simulator.market import Trade
from services.market_simulator.synthetic import SyntheticMarket

NOON = datetime(2025, 6, 2, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def market() -> SyntheticMarket:
    return SyntheticMarket(seed=1)


def trades_between(market: SyntheticMarket, symbol: str, start_ns: int, end_ns: int) -> list[Trade]:
    """Walk back from trade to trade."""
    found: list[Trade] = []
    trade = market.latest_trade(symbol, end_ns - 1)
    while trade is not None and trade.at_ns >= start_ns:
        found.append(trade)
        trade = market.latest_trade(symbol, trade.at_ns - 1)
    return found[::-1]


def test_prices_stay_as_they_were_first_published() -> None:
    # Recorded from this seed once: a change of the walk would move every demo's history.
    market = SyntheticMarket(seed=1)
    assert market.price("AAPL", NOON) == Decimal("279.90")
    assert market.price("BTC/USD", datetime(2016, 2, 29, 23, 59, 59, tzinfo=UTC)) == Decimal("30836.19")
    assert market.price("BRK.B", datetime(2030, 1, 1, tzinfo=UTC)) == Decimal("762.13")


def test_two_markets_of_one_seed_agree_whatever_they_were_asked_before(market: SyntheticMarket) -> None:
    other = SyntheticMarket(seed=1)
    instants = [NOON - timedelta(hours=977 * step) for step in range(90)]  # ten years back
    backward = [other.price("SPY", at) for at in reversed(instants)]
    assert [market.price("SPY", at) for at in instants] == backward[::-1]


def test_seeds_and_symbols_have_paths_of_their_own(market: SyntheticMarket) -> None:
    def path(of: SyntheticMarket, symbol: str) -> list[Decimal]:
        return [of.price(symbol, NOON + hour * timedelta(hours=1)) for hour in range(10)]

    assert path(market, "AAPL") != path(SyntheticMarket(seed=2), "AAPL")
    assert path(market, "GOOG") != path(market, "GOOGL")


def test_symbols_are_forty_and_more_with_the_well_known_ones(market: SyntheticMarket) -> None:
    assert len(market.symbols) >= 40
    assert list(market.symbols) == sorted(market.symbols)
    assert set(market.symbols) >= {
        *("AAPL", "MSFT", "NVDA", "AMZN", "GOOGL", "META", "TSLA", "BRK.B", "JPM", "V", "SPY", "QQQ"),
        *("IBM", "BAC", "AIG", "BTC/USD", "ETH/USD", "SOL/USD"),
    }


def test_prices_are_whole_cents_of_a_plausible_size_for_ten_years(market: SyntheticMarket) -> None:
    for symbol, listing in LISTINGS.items():
        for year in range(2016, 2027):
            price = market.price(symbol, datetime(year, 11, 22, tzinfo=UTC))
            assert price.as_tuple().exponent == -2
            assert listing.price / 12 < price < listing.price * 12


def test_a_price_is_about_the_listed_one_on_the_anchor_day(market: SyntheticMarket) -> None:
    price = market.price("AAPL", datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC))
    assert Decimal("261.00") < price < Decimal("264.00")  # listed at 262.50


def test_daily_moves_have_the_listed_volatility(market: SyntheticMarket) -> None:
    prices = [float(market.price("TSLA", NOON - day * DAY)) for day in range(1500)]
    moves = [after / before - 1 for before, after in zip(prices[1:], prices[:-1], strict=True)]
    assert statistics.stdev(moves) * 365**0.5 == pytest.approx(0.55, rel=0.1)


def test_the_walk_has_no_jump_at_midnight(market: SyntheticMarket) -> None:
    for day in range(200):
        midnight = datetime(2025, 1, 1, tzinfo=UTC) + day * DAY
        before = market.price("AAPL", midnight - timedelta(seconds=3))
        after = market.price("AAPL", midnight + timedelta(seconds=3))
        assert abs(after / before - 1) < Decimal("0.002")


def test_a_new_trade_comes_every_few_seconds_with_a_growing_id(market: SyntheticMarket) -> None:
    start_ns = ns_of(NOON)
    trades = trades_between(market, "AAPL", start_ns, start_ns + 60 * MINUTE_NS)
    assert 1300 < len(trades) < 1400
    assert [trade.id for trade in trades] == list(range(trades[0].id, trades[0].id + len(trades)))
    assert all(earlier.at_ns < later.at_ns for earlier, later in pairwise(trades))
    assert all(trade.size % 100 == 0 and 0 < trade.size <= 800 for trade in trades)
    assert len({trade.exchange for trade in trades}) > 3


def test_the_latest_trade_is_stable_and_agrees_with_the_price(market: SyntheticMarket) -> None:
    for second in range(300):
        at = NOON + timedelta(seconds=second)
        trade = market.latest_trade("MSFT", ns_of(at))
        assert trade is not None
        assert trade.at_ns <= ns_of(at) < trade.at_ns + 6_000_000_000
        assert trade.price == market.price("MSFT", at)
        assert trade == SyntheticMarket(seed=1).latest_trade("MSFT", trade.at_ns)


@pytest.mark.parametrize("symbol", ["AAPL", "BTC/USD"])
@pytest.mark.parametrize(
    ("start", "minutes"),
    [
        ("2025-06-02T13:31:00Z", 1),
        ("2019-12-31T23:58:00Z", 5),  # over midnight
        ("2021-03-14T06:00:00Z", 60),
        ("2024-02-28T05:00:00Z", 1440),
    ],
)
def test_a_bar_is_made_of_exactly_its_trades(
    market: SyntheticMarket, symbol: str, start: str, minutes: int
) -> None:
    start_ns = ns_of(datetime.fromisoformat(start))
    end_ns = start_ns + minutes * MINUTE_NS
    trades = trades_between(market, symbol, start_ns, end_ns)
    prices = [trade.price for trade in trades]
    bar = market.bar(symbol, start_ns, end_ns)
    assert bar is not None
    assert (bar.open, bar.high, bar.low, bar.close) == (prices[0], max(prices), min(prices), prices[-1])
    assert bar.trades == len(trades)
    assert bar.volume == sum(trade.size for trade in trades)
    assert bar.low <= bar.vwap <= bar.high


def test_nothing_is_known_of_other_symbols_and_of_times_before_2000(market: SyntheticMarket) -> None:
    before = datetime(1999, 12, 31, tzinfo=UTC)
    assert market.latest_trade("NOSUCH", ns_of(NOON)) is None
    assert market.bar("NOSUCH", ns_of(NOON), ns_of(NOON) + MINUTE_NS) is None
    assert market.next_minute("NOSUCH", ns_of(NOON)) is None
    assert market.previous_minute("NOSUCH", ns_of(NOON)) is None
    assert market.latest_trade("AAPL", ns_of(before)) is None
    assert market.previous_minute("AAPL", ns_of(before)) is None
    with pytest.raises(ValueError, match="begins in 2000"):
        market.price("AAPL", before)
    with pytest.raises(KeyError):
        market.price("NOSUCH", NOON)
    with pytest.raises(TypeError):
        market.price("AAPL", NOON.replace(tzinfo=None))


def test_a_year_of_history_for_ten_symbols_is_cheap() -> None:
    market = SyntheticMarket(seed=5)
    began_s = process_time()
    for symbol in market.symbols[:10]:
        for step in range(3000):
            market.price(symbol, NOON - step * timedelta(hours=2.9))
    assert process_time() - began_s < 3  # 0.4 s when measured alone
