"""The messages of Alpaca's real-time streams, and how they are written on the wire. Pure.

A message is a map with its type under `T`. Instants are msgpack timestamps until they are written, in either format
to the nanosecond: as a timestamp extension in msgpack, as RFC 3339 in JSON.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgpack  # type: ignore[import-untyped]  # has no types of its own
import orjson

from services.market_simulator.instants import ns_of_text, rfc3339
from services.market_simulator.listings import tape_of
from services.market_simulator.market import Bar, Trade
from services.market_simulator.questions import Venue
from services.market_simulator.wire import Json, number

Format = Literal["json", "msgpack"]

CHANNEL_OF = {
    "t": "trades",
    "q": "quotes",
    "b": "bars",
    "u": "updatedBars",
    "d": "dailyBars",
    "s": "statuses",
    "l": "lulds",
    "c": "corrections",
    "x": "cancelErrors",
    "o": "orderbooks",
}
"""The channel that carries each type of message."""

ERRORS = {
    400: "invalid syntax",
    401: "not authenticated",
    402: "auth failed",
    403: "already authenticated",
    404: "auth timeout",
    405: "symbol limit exceeded",
    406: "connection limit exceeded",
    407: "slow client",
    408: "v2 not enabled",
    409: "insufficient subscription",
    410: "invalid subscribe action for this feed",
    500: "internal error",
}

MESSAGES_OF_A_FRAME_MAX = 1000
_TIMES = ("t",)


class Malformed(Exception):
    """What the client sent cannot be read."""


def success(text: str) -> Json:
    return {"T": "success", "msg": text}


def error(code: int) -> Json:
    return {"T": "error", "code": code, "msg": ERRORS[code]}


def timestamp(at_ns: int) -> Any:
    """Return an instant as it stands in a message until that is written."""
    return msgpack.Timestamp.from_unix_nano(at_ns)


def trade_message(venue: Venue, symbol: str, trade: Trade, feed: str) -> Json:
    return _timed("t", symbol, venue.trade(symbol, trade, feed), trade.at_ns)


def quote_message(venue: Venue, symbol: str, trade: Trade, feed: str) -> Json:
    return _timed("q", symbol, venue.quote(symbol, trade, feed), trade.at_ns)


def bar_message(venue: Venue, symbol: str, bar: Bar, kind: Literal["b", "d"]) -> Json:
    return _timed(kind, symbol, venue.bar(bar), bar.start_ns)


def load_messages(made: Sequence[tuple[str, int, int, int]]) -> list[Json]:
    """Return the messages of a load's trades, which are made often: by hand, without a step in between."""
    at = msgpack.Timestamp.from_unix_nano
    return [
        {
            "T": "t",
            "S": symbol,
            "i": trade_id,
            "x": "V",
            "p": cents / 100,
            "s": 100,
            "c": ["@"],
            "z": tape_of(symbol),
            "t": at(at_ns),
        }
        if "/" not in symbol
        else {
            "T": "t",
            "S": symbol,
            "p": cents / 100,
            "s": 100,
            "i": trade_id,
            "tks": "B" if trade_id % 2 else "S",
            "t": at(at_ns),
        }
        for symbol, cents, at_ns, trade_id in made
    ]


def correction_message(symbol: str, original: Trade, corrected: Trade, at_ns: int) -> Json:
    return {
        "T": "c",
        "S": symbol,
        "x": original.exchange,
        "oi": original.id,
        "op": number(original.price),
        "os": number(original.size),
        "oc": list(original.conditions),
        "ci": corrected.id,
        "cp": number(corrected.price),
        "cs": number(corrected.size),
        "cc": list(corrected.conditions),
        "z": tape_of(symbol),
        "t": timestamp(at_ns),
    }


def cancel_message(symbol: str, trade: Trade, action: str, at_ns: int) -> Json:
    return {
        "T": "x",
        "S": symbol,
        "i": trade.id,
        "x": trade.exchange,
        "p": number(trade.price),
        "s": number(trade.size),
        "a": action,
        "z": tape_of(symbol),
        "t": timestamp(at_ns),
    }


def given_message(message: Mapping[str, Any]) -> Json:
    """Return a message that a test wrote as JSON: an instant under `t` becomes one, all else stays as it is."""
    read = dict(message)
    for name in _TIMES:
        if isinstance(read.get(name), str):
            try:
                read[name] = timestamp(ns_of_text(read[name]))
            except ValueError:
                continue  # a wrong instant may be what the test wants to send
    return read


def written(messages: Sequence[Any], form: Format) -> bytes:
    """Return the payload of a frame."""
    if form == "msgpack":
        packed: bytes = msgpack.packb(messages)
        return packed
    return orjson.dumps(messages, default=_text)


def read(payload: bytes | str, *, binary: bool) -> Json:
    """Return what a client says; raises Malformed for what is not a map. Binary is msgpack, or JSON."""
    try:
        # A map never begins with this byte in msgpack, so that JSON is understood in binary frames too.
        said = orjson.loads(payload) if not binary or payload[:1] == b"{" else msgpack.unpackb(payload)
    except (ValueError, msgpack.UnpackException, RecursionError) as problem:
        raise Malformed(str(problem)) from problem
    if not isinstance(said, dict):
        raise Malformed("not a map")
    return said


def _timed(kind: str, symbol: str, shape: Json, at_ns: int) -> Json:
    return {"T": kind, "S": symbol} | shape | {"t": timestamp(at_ns)}


def _text(value: Any) -> str:
    if isinstance(value, msgpack.Timestamp):
        return rfc3339(value.to_unix_nano())
    raise TypeError(f"{type(value).__name__} has no place in a message")
