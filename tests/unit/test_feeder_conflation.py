"""Of many trades the newest, and of many moments a few."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.price_feeder.conflation import Conflation, StreamedTrade

SYMBOLS = ("AAPL", "MSFT", "BTC/USD")


def trade(price: float, at_ns: int, trade_id: int = 0) -> StreamedTrade:
    return StreamedTrade(price, at_ns, trade_id, "iex")


def seconds(waited: float | None) -> float:
    assert waited is not None
    return round(waited, 6)


def test_first_trade_of_a_symbol_goes_out_at_once_and_the_next_a_window_later() -> None:
    conflation = Conflation(0.25, spacing_seconds=0)
    assert conflation.wait_seconds(10.0) is None
    conflation.take("AAPL", trade(200.0, 1))
    assert conflation.wait_seconds(10.0) == 0.0
    assert conflation.batch(10.0) == {"AAPL": trade(200.0, 1)}
    assert conflation.wait_seconds(10.0) is None
    conflation.take("AAPL", trade(201.0, 2))
    conflation.take("AAPL", trade(202.0, 3))
    assert seconds(conflation.wait_seconds(10.1)) == 0.15
    assert conflation.batch(10.1) == {}
    assert conflation.batch(10.25) == {"AAPL": trade(202.0, 3)}


def test_each_symbol_has_a_window_of_its_own() -> None:
    conflation = Conflation(0.25, spacing_seconds=0)
    conflation.take("AAPL", trade(200.0, 1))
    conflation.batch(10.0)
    conflation.take("AAPL", trade(201.0, 2))
    conflation.take("MSFT", trade(400.0, 2))
    assert conflation.wait_seconds(10.1) == 0.0
    assert conflation.batch(10.1) == {"MSFT": trade(400.0, 2)}
    conflation.take("MSFT", trade(401.0, 3))
    assert conflation.batch(10.25) == {"AAPL": trade(201.0, 2)}
    assert seconds(conflation.wait_seconds(10.25)) == 0.1
    assert conflation.batch(10.35) == {"MSFT": trade(401.0, 3)}


def test_what_comes_due_shortly_after_a_batch_shares_the_next_one() -> None:
    conflation = Conflation(0.25, spacing_seconds=0.01)
    conflation.take("AAPL", trade(200.0, 1))
    conflation.batch(10.0)
    conflation.take("MSFT", trade(400.0, 1))
    assert seconds(conflation.wait_seconds(10.002)) == 0.008
    conflation.take("SPY", trade(500.0, 1))
    assert conflation.wait_seconds(10.01) == 0.0
    assert conflation.batch(10.01) == {"MSFT": trade(400.0, 1), "SPY": trade(500.0, 1)}


def test_older_trade_is_dropped_also_when_the_newer_one_has_gone_out() -> None:
    conflation = Conflation()
    assert conflation.take("AAPL", trade(200.0, 5))
    assert not conflation.take("AAPL", trade(199.0, 4))
    conflation.batch(0.0)
    assert not conflation.take("AAPL", trade(199.0, 4))
    assert len(conflation) == 0


def test_of_trades_of_the_same_instant_the_last_one_counts() -> None:
    conflation = Conflation()
    conflation.take("AAPL", trade(200.0, 5, 1))
    assert conflation.take("AAPL", trade(200.1, 5, 2))
    assert conflation.batch(0.0)["AAPL"].price == 200.1
    assert conflation.take("AAPL", trade(200.2, 5, 3))


def test_closing_print_that_waits_is_not_displaced_by_trades_after_it() -> None:
    conflation = Conflation()
    closing = trade(200.0, 5)._replace(is_closing_print=True)
    corrected = trade(200.5, 6)._replace(is_closing_print=True)
    conflation.take("AAPL", trade(199.0, 4))
    assert conflation.take("AAPL", closing)
    assert not conflation.take("AAPL", trade(210.0, 6))
    assert conflation.take("AAPL", corrected)
    assert conflation.batch(0.0) == {"AAPL": corrected}
    assert conflation.take("AAPL", trade(211.0, 7))  # whether it counts is for the market hours to say


def test_closing_print_that_could_not_be_stored_is_displaced_a_quarter_of_an_hour_later() -> None:
    conflation = Conflation()
    conflation.take("AAPL", trade(200.0, 5)._replace(is_closing_print=True))
    assert not conflation.take("AAPL", trade(201.0, 900_000_000_004))
    assert conflation.take("AAPL", trade(201.0, 900_000_000_005))


def test_batch_that_was_not_stored_waits_again_less_what_is_newer() -> None:
    conflation = Conflation()
    conflation.take("AAPL", trade(200.0, 1))
    conflation.take("MSFT", trade(400.0, 1))
    batch = conflation.batch(0.0)
    conflation.take("AAPL", trade(201.0, 2))
    conflation.take_back(batch)
    assert conflation.batch(1.0) == {"AAPL": trade(201.0, 2), "MSFT": trade(400.0, 1)}


def test_closing_print_that_was_not_stored_stays_before_what_came_since() -> None:
    conflation = Conflation()
    closing = trade(200.0, 5)._replace(is_closing_print=True)
    conflation.take("AAPL", closing)
    batch = conflation.batch(0.0)
    conflation.take("AAPL", trade(201.0, 6))
    conflation.take_back(batch)
    assert conflation.batch(1.0) == {"AAPL": closing}


def test_withdrawn_trade_does_not_go_out_and_a_forgotten_symbol_begins_anew() -> None:
    conflation = Conflation()
    conflation.take("AAPL", trade(999.0, 9, trade_id=7))
    assert not conflation.withdraw("AAPL", 6)
    assert conflation.withdraw("AAPL", 7)
    assert conflation.wait_seconds(0.0) is None
    conflation.take("AAPL", trade(200.0, 3))
    conflation.batch(0.0)
    assert not conflation.take("AAPL", trade(199.0, 2))
    conflation.forget("AAPL")
    assert conflation.take("AAPL", trade(150.0, 1))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(SYMBOLS),
            st.integers(min_value=1, max_value=50),
            st.floats(min_value=0, max_value=0.2, allow_nan=False),
        ),
        max_size=200,
    )
)
def test_what_goes_out_is_bounded_in_order_and_ends_with_the_newest(
    events: list[tuple[str, int, float]],
) -> None:
    conflation = Conflation(0.25)
    at, batches = 0.0, []
    arrived: dict[str, tuple[int, int]] = {}

    def let_out() -> None:
        if conflation.wait_seconds(at) == 0.0 and (batch := conflation.batch(at)):
            batches.append((at, batch))

    for number, (symbol, at_ns, pause) in enumerate(events):
        at += pause
        conflation.take(symbol, trade(float(number), at_ns, number))
        arrived[symbol] = max(arrived.get(symbol, (0, 0)), (at_ns, number))
        assert len(conflation) <= len(SYMBOLS)
        let_out()
    at += 0.25
    let_out()
    assert len(conflation) == 0
    assert all(later - earlier >= 0.0099 for (earlier, _), (later, _) in pairwise(batches))
    for symbol in SYMBOLS:
        moments = [moment for moment, batch in batches if symbol in batch]
        assert all(later - earlier >= 0.2499 for earlier, later in pairwise(moments))
        out = [batch[symbol] for _, batch in batches if symbol in batch]
        assert out == sorted(out, key=lambda each: (each.traded_at_ns, each.trade_id))
        if symbol in arrived:
            assert (out[-1].traded_at_ns, out[-1].trade_id) == arrived[symbol]
