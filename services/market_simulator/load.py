"""Load for benchmarks: a bounded random walk of trades, evenly over many symbols. Pure.

Prices are whole cents in an array and a trade is a few operations on it, so that thousands of trades a second cost
little; only the latest trade of each symbol is kept.
"""

from array import array
from collections.abc import Mapping
from decimal import Decimal
from random import Random
from typing import Any

from services.market_simulator.instants import SECOND_NS
from services.market_simulator.market import Trade

SYMBOLS_MAX = 1000
TICKS_PER_SECOND_MAX = 20_000

_TURN_SECONDS_MAX = 0.25  # what a turn makes up for; a machine that stood still longer sends less, not later
_STEPS = 4096
_REACH = 5  # a price stays within a fifth of where it began

_EXCHANGE = "V"
_CONDITIONS = ("@",)
_SIZE = Decimal(100)


class Load:
    """`ticks_per_second` trades a second in turn over `symbols`, from prices given in cents."""

    def __init__(
        self, cents: Mapping[str, int], ticks_per_second: float, now_ns: int, *, seed: int = 1
    ) -> None:
        self.symbols = tuple(cents)
        self.positions = {symbol: place for place, symbol in enumerate(self.symbols)}
        self.ticks_per_second = ticks_per_second
        self.sent = 0
        self.skipped = 0
        self._start_ns = now_ns
        self._last_ns = now_ns
        self._cents = array("q", cents.values())
        self._lows = array("q", (max(1, start - start // _REACH) for start in cents.values()))
        self._highs = array("q", (start + start // _REACH + 1 for start in cents.values()))
        self._at_ns = array("q", bytes(8 * len(cents)))
        self._ids = array("q", bytes(8 * len(cents)))
        self._steps = Random(seed).choices((-2, -1, 1, 2), k=_STEPS)  # noqa: S311 - prices, not secrets

    def turn(self, now_ns: int) -> list[tuple[str, int, int, int]]:
        """Make the trades that are due by `now_ns` and return symbol, cents, instant and id of each.

        Their instants are `now_ns` and the nanoseconds after it, so that no two trades have the same.
        """
        due = int((now_ns - self._start_ns) * self.ticks_per_second / SECOND_NS) - self.sent - self.skipped
        at_once_max = max(1, int(self.ticks_per_second * _TURN_SECONDS_MAX))
        if due > at_once_max:
            self.skipped += due - at_once_max
            due = at_once_max
        # A clock that was set back must not give an older trade a newer place.
        at_ns = max(now_ns, self._last_ns + 1)
        symbols, cents, lows, highs = self.symbols, self._cents, self._lows, self._highs
        count, made = len(symbols), []
        for trade_id in range(self.sent + 1, self.sent + 1 + max(0, due)):
            place = trade_id % count
            # The walk of each symbol reads the steps from another place on, and not in the order of the symbols.
            step = self._steps[(trade_id * 7 + trade_id // count * 13) % _STEPS]
            price = cents[place] + step
            if not lows[place] <= price <= highs[place]:
                price = (
                    cents[place] - step
                    if lows[place] <= cents[place] - step <= highs[place]
                    else cents[place]
                )
            cents[place] = price
            self._at_ns[place] = at_ns
            self._ids[place] = trade_id
            made.append((symbols[place], price, at_ns, trade_id))
            at_ns += 1
        self.sent += len(made)
        self._last_ns = at_ns if made else self._last_ns
        return made

    def latest(self, symbol: str) -> Trade | None:
        """Return a symbol's last trade of this load; None before its first, and for other symbols."""
        place = self.positions.get(symbol)
        if place is None or not self._ids[place]:
            return None
        return Trade(
            at_ns=self._at_ns[place],
            price=Decimal(self._cents[place]).scaleb(-2),
            size=_SIZE,
            id=self._ids[place],
            exchange=_EXCHANGE,
            conditions=_CONDITIONS,
        )

    def listed(self) -> dict[str, Any]:
        """Return what this load is, for people."""
        return {
            "symbols": len(self.symbols),
            "ticks_per_second": self.ticks_per_second,
            "sent": self.sent,
            "skipped": self.skipped,
        }
