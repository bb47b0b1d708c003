"""The parts of the simulator's streams that do no I/O: tape, conditions, load, subscriptions, messages, faults."""

from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has no types of its own
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.market_simulator.conditions import sets_price
from services.market_simulator.instants import DAY_NS, MINUTE_NS, SECOND_NS, ns_of_text
from services.market_simulator.load import Load
from services.market_simulator.market import Trade
from services.market_simulator.questions import CRYPTO, STOCKS
from services.market_simulator.replay import read_replay
from services.market_simulator.stream_faults import Freeze, Mute, RefuseAuth, StreamFaults
from services.market_simulator.stream_messages import Malformed, read, timestamp, written
from services.market_simulator.subscriptions import Rejected, Subscriptions
from services.market_simulator.synthetic import FIRST_NS, SyntheticMarket
from services.market_simulator.tape import REPORTED_MAX, Tape

MARKET = SyntheticMarket(1)
NOW_NS = ns_of_text("2026-11-20T15:00:00Z")


def a_trade(price: int, seconds: float = 0, **others: Any) -> Trade:
    base = Trade(NOW_NS + int(seconds * SECOND_NS), Decimal(price), Decimal(100), price, "V", ("@",))
    return replace(base, **others)


def price_of(tape: Tape, symbol: str, seconds: float = 0) -> Decimal | None:
    latest = tape.latest(symbol, NOW_NS + int(seconds * SECOND_NS))
    return None if latest is None else latest.price


# ---- conditions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "tape", "does"),
    [
        ("@", "C", True),
        ("@F", "C", True),
        ("@T", "C", True),  # extended hours set the price of a minute
        (" ", "A", True),
        ("@I", "C", False),
        ("@4I", "C", False),  # the strictest of several counts
        ("B", "A", False),  # an average price
        ("B", "C", True),  # a bunched trade
        ("W", "C", False),
        ("7V", "B", False),
        ("", "A", True),
    ],
)
def test_conditions_say_whether_a_trade_sets_a_price(conditions: str, tape: str, does: bool) -> None:
    assert sets_price(conditions, tape) is does


# ---- the tape ------------------------------------------------------------------------------------


def test_the_newest_trade_counts_whoever_reported_it() -> None:
    tape = Tape(MARKET)
    own = MARKET.latest_trade("AAPL", NOW_NS)
    assert own is not None
    assert tape.latest("AAPL", NOW_NS) == own
    tape.report("AAPL", a_trade(1, seconds=-60))  # out of order: the market has traded since
    assert tape.latest("AAPL", NOW_NS) == own
    tape.report("AAPL", a_trade(2, seconds=0.5))
    assert price_of(tape, "AAPL", 0.5) == 2
    assert price_of(tape, "AAPL", 10) != 2  # the market goes on


def test_a_pin_counts_however_old_and_stops_the_market() -> None:
    tape = Tape(MARKET)
    assert tape.trades_by_itself("AAPL")
    tape.pin("AAPL", a_trade(100))
    tape.pin("AAPL", a_trade(90, seconds=-3600))
    assert price_of(tape, "AAPL", 3600) == 90
    assert not tape.trades_by_itself("AAPL")
    tape.report("AAPL", a_trade(95, seconds=-1800))
    assert price_of(tape, "AAPL", 3600) == 95
    tape.unpin("AAPL")
    assert tape.trades_by_itself("AAPL")
    assert tape.latest("AAPL", NOW_NS) == MARKET.latest_trade("AAPL", NOW_NS)
    assert (tape.pins, len(tape)) == ({}, 0)


def test_a_cancel_gives_way_to_the_trade_before() -> None:
    tape = Tape(MARKET)
    for price in (1, 2, 3):
        tape.pin("NEWCO", a_trade(price, seconds=price))
    tape.cancel("NEWCO", a_trade(3, seconds=3))
    assert price_of(tape, "NEWCO") == 2
    tape.cancel("NEWCO", a_trade(1, seconds=1))  # an older one changes nothing
    assert price_of(tape, "NEWCO") == 2


def test_a_correction_keeps_place_and_time() -> None:
    tape = Tape(MARKET)
    tape.report("NEWCO", a_trade(1))
    tape.report("NEWCO", a_trade(2, seconds=1))
    tape.correct("NEWCO", a_trade(1), a_trade(5, seconds=99))
    assert price_of(tape, "NEWCO") == 2
    tape.correct("NEWCO", a_trade(2, seconds=1), a_trade(6, seconds=99))
    assert tape.latest("NEWCO", NOW_NS) == a_trade(6, seconds=1)
    tape.correct("NEWCO", a_trade(6, seconds=1), a_trade(7, conditions=("I",)))  # an odd lot after all
    assert price_of(tape, "NEWCO") == 5


def test_the_markets_own_trades_can_be_amended() -> None:
    tape = Tape(MARKET)
    last = MARKET.latest_trade("SPY", NOW_NS)
    assert last is not None
    before = MARKET.latest_trade("SPY", last.at_ns - 1)
    assert before is not None
    assert tape.find("SPY", before.id, NOW_NS) == before
    tape.cancel("SPY", last)
    assert tape.latest("SPY", NOW_NS) == before
    tape.correct("SPY", before, a_trade(7))
    assert tape.latest("SPY", NOW_NS) == a_trade(7, at_ns=before.at_ns)


def test_the_same_trade_twice_is_one_and_the_number_of_trades_is_bounded() -> None:
    tape = Tape(MARKET)
    for price in range(1, REPORTED_MAX + 100):
        for _ in range(2):
            tape.report("NEWCO", a_trade(price, seconds=price))
    tape.cancel("NEWCO", a_trade(REPORTED_MAX + 99, seconds=REPORTED_MAX + 99))
    assert price_of(tape, "NEWCO") == REPORTED_MAX + 98
    assert tape.find("NEWCO", 99, NOW_NS) is None  # the oldest are forgotten


# ---- when markets trade next ---------------------------------------------------------------------


@given(st.integers(FIRST_NS + MINUTE_NS, FIRST_NS + 10_000 * DAY_NS), st.sampled_from(["AAPL", "BTC/USD"]))
def test_the_next_trade_of_the_synthetic_market_is_the_first_after(at_ns: int, symbol: str) -> None:
    following_ns = MARKET.next_trade_ns(symbol, at_ns)
    assert following_ns is not None
    assert at_ns < following_ns <= at_ns + 6 * SECOND_NS
    following = MARKET.latest_trade(symbol, following_ns)
    assert following is not None
    assert following.at_ns == following_ns
    previous = MARKET.latest_trade(symbol, following_ns - 1)
    assert previous is None or previous.at_ns <= at_ns
    assert MARKET.next_trade_ns("NEWCO", at_ns) is None


def test_the_next_trade_of_a_replay_is_known_when_its_minute_has_ended(tmp_path: Path) -> None:
    file = tmp_path / "bars.csv"
    file.write_text(
        "timestamp,symbol,open,high,low,close,volume\n"
        "2026-01-02T15:00:00Z,SPY,1,1,1,1,5\n2026-01-02T15:05:00Z,SPY,2,2,2,2,5\n"
    )
    market = read_replay(file)
    first_ns = ns_of_text("2026-01-02T15:01:00Z")
    assert market.next_trade_ns("SPY", 0) == first_ns
    assert market.next_trade_ns("SPY", first_ns - 1) == first_ns
    assert market.next_trade_ns("SPY", first_ns) == first_ns + 5 * MINUTE_NS
    assert market.next_trade_ns("SPY", first_ns + 5 * MINUTE_NS) is None
    trades = list(Tape(market).own_trades("SPY", 0, first_ns + 5 * MINUTE_NS, 10))
    assert [trade.price for trade in trades] == [1, 2]
    assert [trade.price for trade in Tape(market).own_trades("SPY", 0, 2 * first_ns, 1)] == [2]


# ---- load ----------------------------------------------------------------------------------------


def test_load_makes_what_is_due_and_no_more() -> None:
    load = Load({"A": 10_000, "B": 10_000, "C": 10_000}, 3000, NOW_NS)
    assert load.turn(NOW_NS) == []
    assert load.latest("A") is None
    made = load.turn(NOW_NS + 10_000_000)  # 10 ms: 30 trades, ten of each
    assert [symbol for symbol, *_ in made].count("A") == 10
    assert len(made) == 30
    assert [at_ns for _, _, at_ns, _ in made] == list(range(NOW_NS + 10_000_000, NOW_NS + 10_000_030))
    symbol, cents, at_ns, trade_id = made[-1]
    latest = load.latest(symbol)
    assert latest is not None
    assert (latest.price, latest.at_ns, latest.id) == (Decimal(cents) / 100, at_ns, trade_id)
    assert load.turn(NOW_NS + 10_000_000) == []


def test_load_skips_what_a_standstill_would_have_made() -> None:
    load = Load({"A": 10_000}, 1000, NOW_NS)
    assert len(load.turn(NOW_NS + 10 * SECOND_NS)) == 250
    assert (load.sent, load.skipped) == (250, 9750)
    assert len(load.turn(NOW_NS + 10 * SECOND_NS + 5_000_000)) == 5


def test_load_is_bounded_and_moves() -> None:
    load = Load({"A": 100, "B": 10_000}, 20_000, NOW_NS)
    seen: dict[str, set[int]] = {"A": set(), "B": set()}
    for turn in range(1, 200):
        for symbol, cents, _, _ in load.turn(NOW_NS + turn * 100_000_000):
            seen[symbol].add(cents)
    assert min(seen["A"]) >= 80
    assert max(seen["A"]) <= 121
    assert len(seen["A"]) > 10
    assert len(seen["B"]) > 10


def test_loads_trades_count_instead_of_the_markets() -> None:
    tape = Tape(MARKET)
    tape.load = Load({"AAPL": 12_345}, 1000, NOW_NS)
    assert tape.latest("AAPL", NOW_NS) == MARKET.latest_trade("AAPL", NOW_NS)
    tape.load.turn(NOW_NS + 1_000_000)
    assert tape.latest("AAPL", NOW_NS) == tape.load.latest("AAPL")
    assert not tape.trades_by_itself("AAPL")
    assert tape.trades_by_itself("SPY")
    tape.pin("AAPL", a_trade(7))
    assert price_of(tape, "AAPL") == 7


# ---- subscriptions -------------------------------------------------------------------------------


def test_a_refused_subscription_changes_nothing() -> None:
    one = Subscriptions(STOCKS)
    one.change({"action": "subscribe", "trades": ["AAPL", "SPY"], "bars": ["*"]}, 3)
    before = one.message()
    for said, code in (
        ({"trades": ["A", "B"]}, 405),
        ({"quotes": ["*"]}, 405),
        ({"quotes": ["A"], "news": ["*"]}, 410),
        ({"quotes": ["A"], "bars": "SPY"}, 400),
        ({"quotes": ["A", 7]}, 400),
        ({"quotes": ["BTC/USD"]}, 400),
        ({}, 400),
    ):
        with pytest.raises(Rejected) as rejected:
            one.change({"action": "subscribe"} | said, 3)
        assert (rejected.value.code, one.message()) == (code, before)
    one.change(
        {"action": "subscribe", "trades": ["AAPL"], "quotes": ["SPY"]}, 3
    )  # three names, one of them again
    one.change({"action": "unsubscribe", "trades": ["AAPL", "NOSUCH"], "bars": ["*"]}, 3)
    assert (one.wants("trades", "AAPL"), one.wants("corrections", "AAPL")) == (False, False)
    assert (one.wants("cancelErrors", "SPY"), one.wants("bars", "SPY")) == (True, False)


def test_every_symbol_is_wanted_with_an_asterisk() -> None:
    one = Subscriptions(CRYPTO)
    one.change({"action": "subscribe", "trades": ["*"]}, None)
    assert one.wants("trades", "ETH/USD")
    assert not one.wants("quotes", "ETH/USD")
    assert not one.wants("statuses", "ETH/USD")  # a channel that crypto does not have


# ---- messages ------------------------------------------------------------------------------------


@given(st.integers(0, 2**62))
def test_an_instant_keeps_its_nanoseconds_in_both_formats(at_ns: int) -> None:
    message = {"T": "t", "S": "AAPL", "p": 262.5, "t": timestamp(at_ns)}
    (packed,) = msgpack.unpackb(written([message], "msgpack"))
    assert packed["t"].to_unix_nano() == at_ns
    (said,) = read(b'{"m":' + written([message], "json") + b"}", binary=False)["m"]
    assert ns_of_text(said["t"]) == at_ns


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("payload", [b"", b"[1]", b"\xc1", b'{"action":', b"\x81", b"7", b"\x93" * 2000])
def test_what_is_no_map_is_malformed(payload: bytes, binary: bool) -> None:
    with pytest.raises(Malformed):
        read(payload, binary=binary)


@given(st.binary(max_size=200), st.booleans())
def test_reading_raises_nothing_else(payload: bytes, binary: bool) -> None:
    with suppress(Malformed):
        assert isinstance(read(payload, binary=binary), dict)


# ---- faults --------------------------------------------------------------------------------------


def test_faults_are_due_for_their_kind_path_and_time() -> None:
    faults = StreamFaults()
    faults.add(RefuseAuth(kind="refuse_auth", times=2, path="/v2/iex"), 100.0)
    faults.add(Mute(kind="mute", seconds=5), 100.0)
    assert faults.take(RefuseAuth, "/v2/sip", 101.0) is None
    assert [faults.take(RefuseAuth, "/v2/iex", 101.0) is not None for _ in range(3)] == [True, True, False]
    assert faults.standing(Freeze, "/v2/iex", 101.0) is None
    assert [faults.standing(Mute, "/v2/sip", now_s) is not None for now_s in (104.9, 105.0)] == [True, False]
    assert faults.listed(105.0) == []
