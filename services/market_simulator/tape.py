"""The tape: a market's trades, and what tests report on top of them: pinned prices, ordered trades, amendments. Pure.

A pinned symbol no longer trades by itself: its latest trade is the last one reported. A symbol under load has the
load's trades instead of the market's. For every other symbol the newest trade counts, reported or the market's own.
Trades that do not set a price are kept, so that they can be amended, but are never the latest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from services.market_simulator.conditions import sets_price
from services.market_simulator.listings import tape_of
from services.market_simulator.load import Load
from services.market_simulator.market import Market, Trade

REPORTED_MAX = 200
"""Trades kept for each symbol, and amendments of its market's own trades."""
_LOOK_BACK = 100


@dataclass(slots=True)
class _Reported:
    """What was reported of one symbol: its trades in the order of their precedence, the last one first in line."""

    pinned: Trade | None = None
    trades: list[Trade] = field(default_factory=list)
    gone: dict[int, None] = field(
        default_factory=dict
    )  # ids of the market's trades that were cancelled or corrected

    def add(self, trade: Trade) -> None:
        """Put a trade behind all that are not newer."""
        place = len(self.trades)
        while place and self.trades[place - 1].at_ns > trade.at_ns:
            place -= 1
        self.trades.insert(place, trade)
        del self.trades[:-REPORTED_MAX]

    def drop(self, trade_id: int) -> None:
        """Let the market's trade count no more."""
        self.gone[trade_id] = None
        if len(self.gone) > REPORTED_MAX:
            del self.gone[next(iter(self.gone))]


class Tape:
    """Answers what the latest trade of a symbol is, and what follows it."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.load: Load | None = None
        self._reported: dict[str, _Reported] = {}

    @property
    def pins(self) -> dict[str, Trade]:
        """Return the pinned trades by symbol."""
        return {symbol: one.pinned for symbol, one in self._reported.items() if one.pinned is not None}

    def __len__(self) -> int:
        """Return how many symbols something was reported of."""
        return len(self._reported)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._reported

    @property
    def symbols(self) -> list[str]:
        """Return every symbol that has trades: the market's, and those that only tests know."""
        known = dict.fromkeys(self.market.symbols)
        known.update(dict.fromkeys(self._reported))
        if self.load is not None:
            known.update(dict.fromkeys(self.load.symbols))
        return sorted(known)

    def trades_by_itself(self, symbol: str) -> bool:
        """Tell whether the market's own trades of a symbol count."""
        reported = self._reported.get(symbol)
        return (reported is None or reported.pinned is None) and (
            self.load is None or symbol not in self.load.positions
        )

    def latest(self, symbol: str, at_ns: int) -> Trade | None:
        """Return the last trade that sets a price, of the market's own the last one at an instant."""
        reported = self._reported.get(symbol)
        if reported is None:
            return self._own(symbol, at_ns)
        newest = next(
            (trade for trade in reversed(reported.trades) if _sets_price(symbol, trade)),
            None,
        )
        if newest is not None and reported.pinned is not None:
            return newest
        own = self._own(symbol, at_ns)
        for _ in range(_LOOK_BACK):
            if own is None or own.id not in reported.gone:
                break
            own = self.market.latest_trade(symbol, own.at_ns - 1)
        if newest is None or own is None:
            return newest or own
        return newest if newest.at_ns >= own.at_ns else own

    def pin(self, symbol: str, trade: Trade) -> None:
        """Make a trade the latest one, however old, and stop the symbol's own trading."""
        reported = self._reported.setdefault(symbol, _Reported())
        reported.pinned = trade
        reported.trades.append(trade)
        del reported.trades[:-REPORTED_MAX]

    def unpin(self, symbol: str) -> None:
        """Let a symbol trade by itself again; what was reported of it is forgotten. Harmless when it was not pinned."""
        reported = self._reported.get(symbol)
        if reported is not None and reported.pinned is not None:
            del self._reported[symbol]

    def report(self, symbol: str, trade: Trade) -> None:
        """Add a trade, in or out of order; the same one twice is one."""
        reported = self._reported.setdefault(symbol, _Reported())
        if trade not in reported.trades:
            reported.add(trade)

    def find(self, symbol: str, trade_id: int | None, at_ns: int) -> Trade | None:
        """Return the trade of an id, reported or one of the market's last; without an id the latest."""
        if trade_id is None:
            return self.latest(symbol, at_ns)
        for trade in reversed(self._reported.get(symbol, _Reported()).trades):
            if trade.id == trade_id:
                return trade
        own = self._own(symbol, at_ns)
        for _ in range(_LOOK_BACK):
            if own is None or own.id == trade_id:
                return own
            own = self.market.latest_trade(symbol, own.at_ns - 1)
        return None

    def cancel(self, symbol: str, trade: Trade) -> None:
        """Take a trade back: the one before it is the latest again."""
        reported = self._reported.setdefault(symbol, _Reported())
        if trade in reported.trades:
            reported.trades.remove(trade)
        else:
            reported.drop(trade.id)

    def correct(self, symbol: str, trade: Trade, corrected: Trade) -> None:
        """Put a corrected trade in the place and time of another."""
        corrected = replace(corrected, at_ns=trade.at_ns)
        reported = self._reported.setdefault(symbol, _Reported())
        if trade in reported.trades:
            reported.trades[reported.trades.index(trade)] = corrected
        else:
            reported.drop(trade.id)
            reported.add(corrected)

    def own_trades(self, symbol: str, after_ns: int, until_ns: int, count_max: int) -> Iterator[Trade]:
        """Yield the trades that came between two instants, the last ones if there are many."""
        found: list[Trade] = []
        known = self.market.latest_trade(symbol, after_ns)
        trade = self.market.latest_trade(symbol, until_ns)
        while trade is not None and len(found) < count_max and (known is None or trade.at_ns > known.at_ns):
            found.append(trade)
            trade = self.market.latest_trade(symbol, trade.at_ns - 1)
        return reversed(found)

    def _own(self, symbol: str, at_ns: int) -> Trade | None:
        if self.load is not None and (trade := self.load.latest(symbol)) is not None:
            return trade
        return self.market.latest_trade(symbol, at_ns)


def _sets_price(symbol: str, trade: Trade) -> bool:
    return "/" in symbol or sets_price(
        trade.conditions, tape_of(symbol)
    )  # trades of crypto have no conditions
