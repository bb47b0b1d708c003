"""Frames of Alpaca's stream: msgpack arrays of messages, judged one by one, so that a bad one costs itself alone. Pure.

Nothing is converted here that may be thrown away a moment later: thousands of trades a second end in the conflation.
"""

from collections.abc import Container
from dataclasses import dataclass, field

import msgpack  # type: ignore[import-untyped]

from services.price_feeder.conditions import CLOSING_PRINT, sets_price
from services.price_feeder.conflation import Conflation, StreamedTrade
from services.price_feeder.trades import EARLIEST, FUTURE_MAX, PRICE_LIMIT

_NANOSECONDS = 1_000_000_000
_EARLIEST_NS = int(EARLIEST.timestamp()) * _NANOSECONDS
_FUTURE_MAX_NS = int(FUTURE_MAX.total_seconds()) * _NANOSECONDS
_PRICE_LIMIT = float(PRICE_LIMIT)
_NO_CONDITIONS: tuple[object, ...] = ()
_MESSAGES_MAX = 100_000
HALTED = frozenset({"H", "P", "2"})
RESUMED = frozenset({"T", "3"})


@dataclass(frozen=True)
class Withdrawal:
    """A trade that does not count any more: corrected, cancelled or an error."""

    symbol: str
    trade_id: object
    price: float


@dataclass(frozen=True)
class TradingStatus:
    """A symbol's trading was halted or resumed, or another status began; `code` is the tape's."""

    symbol: str
    code: str
    message: str

    @property
    def kind(self) -> str:
        """Return `halted`, `resumed` or `other`."""
        if self.code in HALTED:
            return "halted"
        return "resumed" if self.code in RESUMED else "other"


@dataclass
class Heard:
    """What a frame had besides the trades that went into the conflation, and how many of which kind there were."""

    trades: int = 0
    taken: int = 0
    without_price: int = 0
    malformed: int = 0
    withdrawals: list[Withdrawal] = field(default_factory=list)
    statuses: list[TradingStatus] = field(default_factory=list)
    controls: list[dict[str, object]] = field(default_factory=list)
    """`subscription`, `success` and `error` messages."""


def unpacked(frame: bytes | str) -> tuple[list[object], int]:
    """Return a frame's messages, with times in nanoseconds, and 1 when it was cut off or is no list of messages."""
    if isinstance(frame, str):
        return [], 1
    try:
        messages = msgpack.unpackb(frame, timestamp=2, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException, RecursionError):
        return _salvaged(frame), 1
    return (messages, 0) if isinstance(messages, list) else ([], 1)


def _salvaged(frame: bytes) -> list[object]:
    """Return the messages before the place where a frame breaks."""
    messages: list[object] = []
    unpacker = msgpack.Unpacker(timestamp=2, strict_map_key=False)
    try:
        unpacker.feed(frame)
        for _ in range(min(unpacker.read_array_header(), _MESSAGES_MAX)):
            messages.append(unpacker.unpack())
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException, RecursionError):
        pass
    return messages


def hear(
    frame: bytes | str, symbols: Container[str], feed: str, conflation: Conflation, *, now_ns: int
) -> Heard:
    """Take a frame's trades of `symbols` into the conflation and return the rest."""
    messages, broken = unpacked(frame)
    heard = Heard(malformed=broken)
    latest_ns = now_ns + _FUTURE_MAX_NS
    for message in messages:
        if type(message) is not dict:
            heard.malformed += 1
            continue
        if message.get("T") != "t":
            if not _hear_other(message, symbols, heard):
                heard.malformed += 1
            continue
        symbol, price, at_ns = message.get("S"), message.get("p"), message.get("t")
        conditions = message.get("c") or _NO_CONDITIONS
        if (
            type(symbol) is not str
            or (type(price) is not float and type(price) is not int)
            or not 0 < price < _PRICE_LIMIT
            or type(at_ns) is not int
            or not _EARLIEST_NS <= at_ns <= latest_ns
            or type(conditions) not in _LISTS
        ):
            heard.malformed += 1
            continue
        heard.trades += 1
        try:
            # Crypto has neither tapes nor conditions, and most equity trades one or two conditions.
            if conditions and not sets_price(conditions, message.get("z")):
                heard.without_price += 1
            elif symbol in symbols:
                trade = StreamedTrade(price, at_ns, message.get("i"), feed, CLOSING_PRINT in conditions)
                heard.taken += conflation.take(symbol, trade)
        except TypeError:  # a condition or a tape that is a list, say
            heard.malformed += 1
    return heard


_LISTS = (list, tuple)


def _hear_other(message: dict[object, object], symbols: Container[str], heard: Heard) -> bool:
    """Take in what is not a trade; return False when it is malformed."""
    kind, symbol = message.get("T"), message.get("S")
    if kind in ("subscription", "success", "error"):
        heard.controls.append({str(key): value for key, value in message.items()})
    elif kind not in ("c", "x", "s"):
        return isinstance(kind, str)  # a kind that is not known yet is no mistake
    elif not isinstance(symbol, str):
        return False
    elif symbol in symbols:
        return _hear_of_trade(kind, symbol, message, heard)
    return True


def _hear_of_trade(kind: str, symbol: str, message: dict[object, object], heard: Heard) -> bool:
    """Take in a trading status, a correction (which names the original trade) or a cancellation."""
    if kind == "s":
        code, words = str(message.get("sc"))[:8], str(message.get("sm") or "")[:100]
        heard.statuses.append(TradingStatus(symbol, code, words))
        return True
    price, trade_id = (message.get(name) for name in (("op", "oi") if kind == "c" else ("p", "i")))
    if not isinstance(price, int | float) or isinstance(price, bool):
        return False
    heard.withdrawals.append(Withdrawal(symbol, trade_id, float(price)))
    return True
