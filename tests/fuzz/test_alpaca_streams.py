"""Frames of Alpaca's streams: whatever comes, the good trades around it count, and the stream is there again."""

import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.price_feeder import streams
from services.price_feeder.conflation import Conflation
from services.price_feeder.frames import hear
from services.price_feeder.trades import LastTrade, streamed_last_trade
from shared.bus import Bus
from shared.clock import utc_now
from shared.database import Database
from tests.factories import create_user
from tests.fuzz.spoilt_market import spoilt_market
from tests.fuzz.strategies import DEPTHS, TEXTS, cut
from tests.fuzz.trying import examples, nothing_unexpected_logged, try_each
from tests.integration.feeding import feeding
from tests.waiting import eventually

NOW_NS = 1_772_463_600_000_000_000  # 2026-03-02T15:00:00Z
EQUITIES, CRYPTO = "/v2/iex", "/v1beta3/crypto/us"
SYMBOLS = frozenset({"AAPL", "MSFT", "BTC/USD"})
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LIMIT = Decimal("99999999999.9999")


def packed(*messages: object) -> bytes:
    frame: bytes = msgpack.packb(messages, default=str, unicode_errors="surrogatepass")
    return frame


def trade(symbol: str, price: float, at_ns: int) -> dict[str, Any]:
    at = msgpack.Timestamp.from_unix_nano(at_ns)
    return {"T": "t", "S": symbol, "i": 7, "x": "V", "p": price, "s": 1, "c": ["@"], "t": at, "z": "C"}


TIMES = st.one_of(
    st.builds(msgpack.Timestamp, st.integers(0, 2**34 - 1), st.integers(0, 999_999_999)),
    st.builds(msgpack.Timestamp, st.integers(-(2**63), 2**63 - 1), st.just(0)),
    st.integers(-3_000, 3_000).map(lambda s: msgpack.Timestamp.from_unix_nano(time.time_ns() + s * 10**9)),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    TEXTS,
    st.binary(max_size=20),
    TIMES,
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=9)),
    st.sampled_from(["AAPL", "MSFT", "BTC/USD", "NOT HELD", "t", "c", "x", "s", "q", "b", "subscription"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS | st.integers(0, 9), inner, max_size=5),
    max_leaves=8,
)
RIGHT: tuple[dict[str, Any], ...] = (
    trade("AAPL", 200.5, NOW_NS),
    {"T": "c", "S": "AAPL", "x": "V", "oi": 7, "op": 200.5, "ci": 8, "cp": 200.4, "z": "C"},
    {"T": "x", "S": "AAPL", "i": 7, "x": "V", "p": 200.5, "a": "C", "z": "C"},
    {"T": "s", "S": "AAPL", "sc": "H", "sm": "Trading Halt", "rc": "T12", "rm": "", "z": "C"},
    {"T": "q", "S": "AAPL", "bp": 1.0, "ap": 1.1},
    {"T": "subscription", "trades": ["AAPL", "MSFT"], "quotes": []},
    {"T": "success", "msg": "connected"},
)


@st.composite
def messages(draw: st.DrawFn) -> Any:
    """Return a message of which one or two members are wrong, or anything."""
    if draw(st.integers(0, 4)) == 0:
        return draw(VALUES)
    message: dict[Any, Any] = dict(draw(st.sampled_from(RIGHT)))
    for name in draw(st.lists(st.sampled_from([*message, "new"]), min_size=1, max_size=2)):
        if name in message and draw(st.integers(0, 3)) == 0:
            del message[name]
        else:
            message[name] = draw(VALUES)
    return message


@st.composite
def unasked(draw: st.DrawFn) -> bytes:
    """Return a frame that says that a symbol is streamed for which nobody has asked, and what it costs."""
    symbol = draw(TEXTS)
    heard = {"T": "subscription", "trades": ["AAPL", "BTC/USD", "MSFT", symbol]}
    return packed(heard, trade(symbol, 1.5, time.time_ns()))


@st.composite
def nested(draw: st.DrawFn) -> bytes:
    return draw(st.sampled_from([b"\x91", b"\x81\x01", b"\x91\x81\xa1T"])) * draw(DEPTHS) + b"\xc0"


@st.composite
def boastful(draw: st.DrawFn) -> bytes:
    """Return a frame that says of itself that it is four billion long."""
    return (
        draw(st.sampled_from([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\x91\xdd"]))
        + b"\xff" * 4
        + packed(*RIGHT)
    )


def frames() -> st.SearchStrategy[bytes | str]:
    """Return frames of wrong messages, ones that are cut, and what are none."""
    spoiled = st.lists(messages(), max_size=5).map(lambda bad: packed(*bad))
    broken = st.one_of(st.just(packed(*RIGHT)), spoiled).flatmap(cut)
    return st.one_of(
        spoiled,
        spoiled,
        broken,
        unasked(),
        nested(),
        boastful(),
        st.binary(max_size=200),
        st.text(max_size=50),
    )


@examples(150)
@given(frames())
def test_of_any_frame_only_possible_trades_of_wanted_symbols_are_taken(frame: bytes | str) -> None:
    conflation = Conflation()
    now_ns = time.time_ns()
    heard = hear(frame, SYMBOLS, "iex", conflation, now_ns=now_ns)
    assert heard.trades >= heard.taken
    for symbol, taken in conflation.batch(0.0).items():
        assert symbol in SYMBOLS
        judged = streamed_last_trade(symbol, taken)
        if isinstance(judged, LastTrade):
            assert 0 < judged.price <= LIMIT
            assert datetime(1970, 1, 1, tzinfo=UTC) <= judged.traded_at <= utc_now() + timedelta(minutes=6)
    for withdrawal in heard.withdrawals:
        assert withdrawal.symbol in SYMBOLS


@examples(60)
@given(st.lists(messages(), max_size=4), st.integers(0, 4))
def test_bad_messages_cost_themselves_alone(bad: list[Any], place: int) -> None:
    around = [message for message in bad if not (isinstance(message, dict) and message.get("S") == "MSFT")]
    around.insert(min(place, len(around)), trade("MSFT", 401.25, NOW_NS))
    conflation = Conflation()
    hear(packed(*around), SYMBOLS, "iex", conflation, now_ns=NOW_NS)
    assert conflation.batch(0.0)["MSFT"].price == 401.25


async def test_after_any_frames_the_next_trade_reaches_the_table(
    database: Database,
    bus: Bus,
    nats_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("PAUSE_SECONDS_MIN", "OTHER_CONNECTION_PAUSE_SECONDS_MIN", "REFUSED_PAUSE_SECONDS"):
        monkeypatch.setattr(streams, name, 0.01)
    for name in ("PAUSE_SECONDS_MAX", "OTHER_CONNECTION_PAUSE_SECONDS_MAX", "LIMIT_REMEMBERED_SECONDS"):
        monkeypatch.setattr(streams, name, 0.05)
    monkeypatch.setattr(streams, "REFUSED_SYMBOL_SECONDS", 0.05)
    await create_user(database, positions=dict.fromkeys(SYMBOLS, ("1", "1")))
    numbers = count(1)
    newest = 0

    async def check(garbage: list[bytes | str], path: str) -> None:
        symbol = "BTC/USD" if path == CRYPTO else "MSFT"
        for frame in garbage:
            await market.send(path, frame)
        price = next(numbers) * 0.25

        async def the_next_trade_is_stored() -> bool:
            nonlocal newest
            known = await database.fetch_value(
                "SELECT max(traded_at) FROM asset_prices"
            )  # a good one of the garbage
            ahead = known - EPOCH + timedelta(microseconds=1) if known else timedelta(0)
            newest = max(newest, time.time_ns(), ahead // timedelta(microseconds=1) * 1000)
            await market.send(path, packed(trade(symbol, price, newest)))
            row = await database.fetch_row("SELECT price FROM asset_prices WHERE symbol = $1", symbol)
            return row is not None and row["price"] == Decimal(str(price))

        await eventually(the_next_trade_is_stored, every=0.01)
        rows = await database.fetch("SELECT symbol, price, traded_at FROM asset_prices")
        for row in rows:
            assert row["symbol"] in SYMBOLS
            assert 0 < row["price"] <= LIMIT
            assert row["traded_at"] <= utc_now() + timedelta(minutes=5)

    async with (
        spoilt_market() as market,
        feeding(database, bus, nats_url, market.url, interval=timedelta(seconds=1)),
    ):

        async def streams_are_there() -> bool:
            return len(market.sockets) == 2

        await eventually(streams_are_there)
        with nothing_unexpected_logged(caplog):
            await try_each(
                check,
                st.lists(frames(), min_size=1, max_size=4),
                st.sampled_from([EQUITIES, CRYPTO]),
                count=10,
            )


async def test_a_symbol_that_nobody_has_asked_for_is_not_stored(
    database: Database, bus: Bus, nats_url: str
) -> None:
    await create_user(database, positions={"MSFT": ("1", "1")})
    async with (
        spoilt_market() as market,
        feeding(database, bus, nats_url, market.url) as fed,
    ):
        await fed.streams("MSFT")
        heard = {"T": "subscription", "trades": ["MSFT", "FORGED", "NOT A SYMBOL"]}
        trades = [trade(name, 1.5, time.time_ns()) for name in ("FORGED", "NOT A SYMBOL", "MSFT")]
        await market.send(EQUITIES, packed(heard, *trades))
        await fed.price_becomes("MSFT", "1.5000")
        assert fed.streaming.streamed == {"MSFT"}
    assert [row["symbol"] for row in await database.fetch("SELECT symbol FROM asset_prices")] == ["MSFT"]
