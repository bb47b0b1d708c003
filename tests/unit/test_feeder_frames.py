"""Frames of a stream, judged message by message."""

import time
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has no types of its own
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.price_feeder.conflation import Conflation, StreamedTrade
from services.price_feeder.frames import Heard, Withdrawal, hear

AT = 1_772_463_600  # 2026-03-02T15:00:00Z
NOW_NS = (AT + 60) * 10**9
SYMBOLS = frozenset({"AAPL", "MSFT", "BTC/USD"})


def message(
    symbol: str = "AAPL", price: object = 200.5, nanosecond: int = 0, **other: object
) -> dict[str, Any]:
    at = msgpack.Timestamp(AT, nanosecond)
    return {
        "T": "t",
        "S": symbol,
        "i": 1,
        "x": "V",
        "p": price,
        "s": 100,
        "c": ["@"],
        "z": "C",
        "t": at,
    } | other


def heard_of(
    frame: bytes | str, conflation: Conflation | None = None
) -> tuple[Heard, dict[str, StreamedTrade]]:
    conflation = conflation or Conflation()
    return hear(frame, SYMBOLS, "iex", conflation, now_ns=NOW_NS), conflation.batch(0.0)


def test_newest_trade_of_each_symbol_is_taken() -> None:
    frame = msgpack.packb(
        [
            message(nanosecond=1),
            message(price=201, nanosecond=3),
            message(price=199.0, nanosecond=2),
            message("MSFT", 400.0),
        ]
    )
    heard, batch = heard_of(frame)
    assert (heard.trades, heard.taken, heard.malformed) == (4, 3, 0)
    assert batch == {
        "AAPL": StreamedTrade(201, AT * 10**9 + 3, 1, "iex"),
        "MSFT": StreamedTrade(400.0, AT * 10**9, 1, "iex"),
    }


def test_closing_print_is_known_by_its_condition() -> None:
    _, batch = heard_of(msgpack.packb([message(c=[" ", "6", "X"]), message("MSFT", 400.0)]))
    assert {symbol: trade.is_closing_print for symbol, trade in batch.items()} == {
        "AAPL": True,
        "MSFT": False,
    }


def test_odd_lot_and_what_is_not_subscribed_leave_no_trace() -> None:
    frame = msgpack.packb(
        [message(c=["@", "I"]), message("TSLA"), message("BTC/USD", 29791.0, c=None, z=None)]
    )
    heard, batch = heard_of(frame)
    assert (heard.without_price, heard.malformed) == (1, 0)
    assert list(batch) == ["BTC/USD"]


@pytest.mark.parametrize(
    "bad",
    [
        7,
        {},
        {"T": 7},
        {"T": "t"},
        message(price="200"),
        message(price=None),
        message(price=True),
        message(price=-1.0),
        message(price=0),
        message(price=float("nan")),
        message(price=float("inf")),
        message(price=1e11),
        message(S=None),
        message(S=["AAPL"]),
        message(t="2026-03-02T15:00:00Z"),
        message(t=None),
        message(t=msgpack.Timestamp(AT + 3600)),  # an hour ahead
        message(t=msgpack.Timestamp(-62135596800)),  # the year one
        message(c="@I"),
        message(c=[["I"]]),
        message(z=["C"]),
        {"T": "x", "S": "AAPL", "i": 1, "p": "200"},
        {"T": "c", "S": None},
    ],
)
def test_malformed_message_costs_itself_alone(bad: object) -> None:
    heard, batch = heard_of(msgpack.packb([message("MSFT"), bad, message("AAPL", 201.0)]))
    assert heard.malformed == 1
    assert {symbol: trade.price for symbol, trade in batch.items()} == {"MSFT": 200.5, "AAPL": 201.0}


def test_frame_that_is_cut_off_keeps_what_came_before() -> None:
    frame = msgpack.packb([message("MSFT"), message("AAPL")])
    heard, batch = heard_of(frame[:-10])
    assert heard.malformed == 1
    assert list(batch) == ["MSFT"]


@given(st.one_of(st.binary(max_size=200), st.text(max_size=20)))
def test_no_frame_raises(frame: bytes | str) -> None:
    hear(frame, SYMBOLS, "iex", Conflation(), now_ns=NOW_NS)


def test_corrections_and_cancellations_name_the_trade_that_goes() -> None:
    frame = msgpack.packb(
        [
            {
                "T": "c",
                "S": "AAPL",
                "x": "V",
                "oi": 5,
                "op": 200.5,
                "os": 1,
                "oc": ["@"],
                "ci": 6,
                "cp": 200.4,
                "cs": 1,
                "cc": ["@"],
                "t": msgpack.Timestamp(AT),
                "z": "C",
            },
            {
                "T": "x",
                "S": "MSFT",
                "i": 7,
                "x": "V",
                "p": 400,
                "s": 1,
                "a": "C",
                "t": msgpack.Timestamp(AT),
                "z": "C",
            },
            {"T": "x", "S": "TSLA", "i": 8, "p": 1.0},
        ]
    )
    heard, _ = heard_of(frame)
    assert heard.withdrawals == [Withdrawal("AAPL", 5, 200.5), Withdrawal("MSFT", 7, 400.0)]


@pytest.mark.parametrize(
    ("code", "kind"),
    [("H", "halted"), ("2", "halted"), ("P", "halted"), ("T", "resumed"), ("3", "resumed"), ("?", "other")],
)
def test_trading_statuses_are_halts_and_resumptions(code: str, kind: str) -> None:
    heard, _ = heard_of(
        msgpack.packb([{"T": "s", "S": "AAPL", "sc": code, "sm": "words", "t": msgpack.Timestamp(AT)}])
    )
    assert [(status.symbol, status.kind) for status in heard.statuses] == [("AAPL", kind)]


def test_frame_is_heard_quickly() -> None:
    """5,000 trades a second must leave most of a core; a bound that only a blunder breaks."""
    frames = [msgpack.packb([message(nanosecond=number)]) for number in range(2_000)]
    conflation = Conflation()
    began = time.process_time()
    for frame in frames:
        hear(frame, SYMBOLS, "iex", conflation, now_ns=NOW_NS)
    assert (time.process_time() - began) / len(frames) < 100e-6
