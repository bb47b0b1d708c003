"""A recording: what is known when, and what is wrong with a file, in words."""

import gzip
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from services.market_simulator.instants import MINUTE_NS, ns_of
from services.market_simulator.market_clock import ReplayClock
from services.market_simulator.replay import ReplayFileError, ReplayMarket, read_replay

HEADER = "timestamp,symbol,open,high,low,close,volume\n"
ROWS = (
    "2013-10-11T19:58:00Z,SPY,170.08,170.18,170.07,170.17,1197269\n"
    "2013-10-11T19:58:00Z,AIG,49.95,49.99,49.94,49.98,64926\n"
    "2013-10-11T19:59:00Z,SPY,170.17,170.3,170.15,170.3,2579730\n"
    "2013-10-11T20:02:00Z,SPY,170.27,170.35,169.73,170.3,355992\n"
)


def ns(text: str) -> int:
    return ns_of(datetime.fromisoformat(f"2013-10-11T{text}+00:00"))


@pytest.fixture
def recorded(tmp_path: Path) -> ReplayMarket:
    file = tmp_path / "bars.csv"
    file.write_text(HEADER + ROWS)
    return read_replay(file)


def test_a_close_is_known_once_its_minute_has_ended(recorded: ReplayMarket) -> None:
    assert recorded.latest_trade("SPY", ns("19:59:00") - 1) is None
    first = recorded.latest_trade("SPY", ns("19:59:00"))
    assert first is not None
    assert (first.price, first.at_ns, first.size) == (Decimal("170.17"), ns("19:59:00") - 1, Decimal(1197269))
    second = recorded.latest_trade("SPY", ns("20:00:00"))
    assert second is not None
    assert (second.price, second.id) == (Decimal("170.3"), first.id + 1)


def test_the_last_close_counts_while_nothing_newer_is_known(recorded: ReplayMarket) -> None:
    aig = recorded.latest_trade("AIG", ns("23:00:00"))
    assert aig is not None
    assert (aig.price, aig.at_ns) == (Decimal("49.98"), ns("19:59:00") - 1)
    assert recorded.latest_trade("IBM", ns("23:00:00")) is None


def test_a_bar_adds_up_the_recorded_minutes_within_it(recorded: ReplayMarket) -> None:
    bar = recorded.bar("SPY", ns("19:55:00"), ns("20:00:00"))
    assert bar is not None
    assert (bar.open, bar.high, bar.low, bar.close) == tuple(
        map(Decimal, ("170.08", "170.3", "170.07", "170.3"))
    )
    assert (bar.volume, bar.trades) == (Decimal(3776999), 2)
    # (170.14 * 1197269 + 170.25 * 2579730) / 3776999, the means of high, low and close weighted with the volume
    assert bar.vwap == Decimal("170.215131")
    assert recorded.bar("SPY", ns("20:00:00"), ns("20:02:00")) is None


def test_minutes_without_trades_are_skipped(recorded: ReplayMarket) -> None:
    assert recorded.next_minute("SPY", ns("19:59:01")) == ns("20:02:00")
    assert recorded.previous_minute("SPY", ns("20:02:00")) == ns("19:59:00")
    assert recorded.next_minute("SPY", ns("20:02:01")) is None
    assert recorded.previous_minute("AIG", ns("19:58:00")) is None
    assert (recorded.first_ns, recorded.end_ns) == (ns("19:58:00"), ns("20:03:00"))


def test_gzip_byte_order_mark_and_more_columns_are_read(tmp_path: Path) -> None:
    file = tmp_path / "bars"
    text = "\ufeffid,volume,close,low,high,open,symbol,timestamp\r\n"
    text += "7,0.25,2,1,3,1.5,BTC/USD,2013-10-11T15:59:00-04:00\r\n"
    file.write_bytes(gzip.compress(text.encode()))
    trade = read_replay(file).latest_trade("BTC/USD", ns("20:00:00"))
    assert trade is not None
    assert (trade.price, trade.size) == (Decimal(2), Decimal("0.25"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: no column timestamp, symbol"),
        (
            "timestamp,symbol,open,high,low,close\n",
            "line 1: no column volume; expected timestamp,symbol,open",
        ),
        (HEADER, "has no bars"),
        (HEADER + "2013-10-11T19:58:00Z,SPY,1,1\n", "line 2: fewer fields than the header has"),
        (HEADER + ROWS + "yesterday,SPY,1,1,1,1,1\n", "line 6: 'yesterday' is not an RFC 3339 instant"),
        (
            HEADER + "2013-10-11T19:58:30Z,SPY,1,1,1,1,1\n",
            "line 2: timestamp 2013-10-11T19:58:30Z is not the start",
        ),
        (HEADER + "2013-10-11T19:58:00Z,,1,1,1,1,1\n", "line 2: no symbol"),
        (HEADER + "2013-10-11T19:58:00Z,SPY,1,1,1,abc,1\n", "line 2: close 'abc' is not a number"),
        (HEADER + "2013-10-11T19:58:00Z,SPY,1,1,1,nan,1\n", "line 2: close nan is not between 0"),
        (HEADER + "2013-10-11T19:58:00Z,SPY,0,1,0,1,1\n", "line 2: a price is not above zero"),
        (HEADER + "2013-10-11T19:58:00Z,SPY,1,1,1,1,-5\n", "line 2: volume -5 is not between 0"),
        (
            HEADER + "2013-10-11T19:58:00Z,SPY,1,1,1,1.0000000001,1\n",
            "line 2: close 1.0000000001 has more than 9",
        ),
        (
            HEADER + "2013-10-11T19:58:00Z,SPY,1,2,3,2,1\n",
            "line 2: open and close are not between low and high",
        ),
        (
            HEADER + ROWS + "2013-10-11T20:02:00Z,SPY,1,1,1,1,1\n",
            "line 6: timestamp 2013-10-11T20:02:00Z is not after",
        ),
    ],
)
def test_a_malformed_file_is_refused_with_line_and_reason(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bars.csv"
    file.write_text(text)
    with pytest.raises(ReplayFileError) as refusal:
        read_replay(file)
    assert words in str(refusal.value)
    assert str(file) in str(refusal.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress((HEADER + ROWS).encode())[:40])
    for file in (broken, tmp_path / "missing.csv", tmp_path):
        with pytest.raises(ReplayFileError, match="cannot be read"):
            read_replay(file)


def test_recorded_time_runs_at_its_speed_to_the_end() -> None:
    seconds = [100.0]
    clock = ReplayClock(at_ns=0, speed=60, end_ns=10 * MINUTE_NS, monotonic_s=lambda: seconds[0])
    assert clock.now_ns() == 0
    seconds[0] = 102.0
    assert clock.now_ns() == 2 * MINUTE_NS
    clock.set(None, 0)
    seconds[0] = 500.0
    assert clock.now_ns() == 2 * MINUTE_NS
    clock.set(5 * MINUTE_NS, None)
    assert clock.now_ns() == 5 * MINUTE_NS
    clock.set(None, 1)
    seconds[0] = 530.0
    assert clock.now_ns() == 5 * MINUTE_NS + MINUTE_NS // 2
    seconds[0] = 9999.0
    assert clock.now_ns() == 10 * MINUTE_NS


def test_the_recorded_week_is_read_whole(shared_folder: Path) -> None:
    week = read_replay(shared_folder / "market-data" / "minute-bars-2013-10-04-to-11.csv.gz")
    assert week.symbols == ("AIG", "BAC", "IBM", "SPY")
    assert week.first_ns == ns_of(datetime(2013, 10, 4, 8, 6, tzinfo=UTC))
    assert week.end_ns == ns_of(datetime(2013, 10, 12, tzinfo=UTC))
    whole = [week.bar(symbol, week.first_ns, week.end_ns) for symbol in week.symbols]
    assert sum(bar.trades for bar in whole if bar) == 13_429  # the rows of the file
