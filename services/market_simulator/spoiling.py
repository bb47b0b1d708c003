"""Spoil the body of an answer as ordered: wrong prices, times and symbols, and cut JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from services.market_simulator.faults import (
    BadPrice,
    BadSymbols,
    Fault,
    OldTrades,
    Truncation,
    UnknownSymbols,
    WrongTypes,
)
from services.market_simulator.instants import SECOND_NS, ns_of_text, rfc3339
from services.market_simulator.wire import Json, number

_PRICES = ("p", "o", "h", "l", "c", "vw", "ap", "bp")
_SETS = ("trades", "quotes", "bars", "snapshots")
_SINGLES = ("trade", "quote", "bar")
_HUGE = "\ue000huge\ue000"  # no JSON library writes a number beyond its own range, so it is put in afterwards
_STALE_SECONDS = 90 * 86_400.0
_OUT_OF_ORDER_SECONDS = 60.0
_TEMPLATE = {
    "t": "2026-01-02T15:04:05.123456789Z",
    "x": "V",
    "p": 12.34,
    "s": 100,
    "c": ["@"],
    "i": 1,
    "z": "A",
    "tks": "B",
}


class LastSent:
    """When the newest trade was that each symbol was answered with; needed to send an older one."""

    def __init__(self) -> None:
        self._at_ns: dict[str, int] = {}

    def note(self, payload: Json) -> None:
        for symbol, entry in _entries(payload):
            for trade in _trades(entry):
                self._at_ns[symbol] = max(self._at_ns.get(symbol, 0), ns_of_text(trade["t"]))

    def before(self, symbol: str, seconds: float) -> int | None:
        at_ns = self._at_ns.get(symbol)
        return None if at_ns is None else at_ns - int(seconds * SECOND_NS)


def spoiled(payload: Json, faults: Sequence[Fault], last_sent: LastSent) -> bytes:
    """Return the body of an answer after all ordered spoiling; `payload` is changed."""
    for fault in faults:
        if isinstance(fault, BadPrice | WrongTypes | OldTrades):
            for symbol, entry in _entries(payload):
                if not fault.symbols or symbol in fault.symbols:
                    _spoil_entry(symbol, entry, fault, last_sent)
        elif isinstance(fault, BadSymbols):
            _spoil_symbols(payload, fault)
        elif isinstance(fault, UnknownSymbols):
            _add_symbols(payload, fault)
    text = json.dumps(payload, separators=(",", ":")).replace(json.dumps(_HUGE), "1e400")
    if any(isinstance(fault, Truncation) for fault in faults):
        text = text[: len(text) // 2]
    return text.encode()


def _symbol_table(payload: Json) -> Json | None:
    """Return the part of an answer that maps symbols to entries; None in an answer about one symbol."""
    for name in _SETS:
        if isinstance(payload.get(name), dict):
            table: Json = payload[name]
            return table
    return None if "symbol" in payload else payload  # the stock snapshots have no name around them


def _entries(payload: Json) -> Iterator[tuple[str, Any]]:
    table = _symbol_table(payload)
    if table is not None:
        yield from table.items()
    else:
        yield payload["symbol"], payload


def _records(entry: Any) -> Iterator[Json]:
    """Yield the trades, quotes and bars within a symbol's entry, whatever its shape."""
    if isinstance(entry, list):
        for element in entry:
            yield from _records(element)
    elif isinstance(entry, dict):
        if "t" in entry:
            yield entry
        else:
            for value in entry.values():
                yield from _records(value)


def _trades(entry: Any) -> Iterator[Json]:
    return (record for record in _records(entry) if "p" in record and isinstance(record.get("t"), str))


def _spoil_entry(
    symbol: str, entry: Any, fault: BadPrice | WrongTypes | OldTrades, last_sent: LastSent
) -> None:
    if isinstance(fault, OldTrades):
        for trade in _trades(entry):
            trade["t"] = rfc3339(_old_ns(symbol, trade, fault, last_sent))
            if fault.price is not None:
                trade["p"] = number(fault.price)
        return
    for record in _records(entry):
        for name in _PRICES:
            if isinstance(record.get(name), int | float):
                record[name] = _bad_price(record[name], fault)


def _bad_price(price: float, fault: BadPrice | WrongTypes) -> Any:
    if isinstance(fault, WrongTypes):
        shapes: dict[str, Any] = {
            "string": str(price),
            "text": f"about {price}",
            "object": {"price": price},
            "bool": True,
            "array": [price],
            "null": None,
        }
        return shapes[fault.as_type]
    bad = {"nan": math.nan, "negative_price": -abs(price), "huge_price": _HUGE, "zero_price": 0}
    return bad[fault.kind]


def _old_ns(symbol: str, trade: Json, fault: OldTrades, last_sent: LastSent) -> int:
    sent_ns = ns_of_text(trade["t"])
    if fault.kind == "stale_trades":
        return sent_ns - int((fault.age_seconds or _STALE_SECONDS) * SECOND_NS)
    age_seconds = fault.age_seconds or _OUT_OF_ORDER_SECONDS
    before_ns = last_sent.before(symbol, age_seconds)
    return sent_ns - int(age_seconds * SECOND_NS) if before_ns is None else before_ns


def _spoil_symbols(payload: Json, fault: BadSymbols) -> None:
    table = _symbol_table(payload)
    names = (
        [name for name in _SINGLES if name in payload]
        if table is None
        else [symbol for symbol in table if not fault.symbols or symbol in fault.symbols]
    )
    for name in names:
        where = payload if table is None else table
        if fault.kind == "null_symbols":
            where[name] = None
        else:
            del where[name]


def _add_symbols(payload: Json, fault: UnknownSymbols) -> None:
    table = _symbol_table(payload)
    if table is None:
        return
    example = next((entry for entry in table.values() if entry), _TEMPLATE if "trades" in payload else None)
    if example is not None:
        copied = json.dumps(example)
        table.update({symbol: json.loads(copied) for symbol in fault.symbols})
