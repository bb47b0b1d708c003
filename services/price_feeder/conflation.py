"""Conflation: of many trades of a symbol the newest, and of many moments a few. Pure.

What comes in costs a comparison; what goes out is bounded by symbols and windows, however much comes in. A symbol's
first trade goes out at once, and after it one a window. Each symbol has a window of its own, so that not all of them
come due together: a batch is small, and none of its trades waits for hundreds of others to be stored and published.
"""

from typing import NamedTuple

WINDOW_SECONDS = 0.25
"""Between two trades of a symbol that go out, at least."""
SPACING_SECONDS = 0.01
"""Between two batches, at least: what comes due meanwhile shares the cost of a commit."""

CLOSING_PRINT_STAYS_NS = 15 * 60 * 1_000_000_000
"""So long trades after a closing auction's are trades outside the session, which do not count."""


class StreamedTrade(NamedTuple):
    """A trade as a stream sent it, not judged yet."""

    price: float
    traded_at_ns: int
    """Nanoseconds since the epoch."""
    trade_id: object
    feed: str
    is_closing_print: bool = False


class Conflation:
    """The newest trade of each symbol that has not gone out yet. Times are seconds of a clock that never goes back.

    Bounded by the symbols that are let in, for which `forget` is told when they are not wanted any more.
    """

    def __init__(
        self, window_seconds: float = WINDOW_SECONDS, *, spacing_seconds: float = SPACING_SECONDS
    ) -> None:
        self._window_seconds = window_seconds
        self._spacing_seconds = spacing_seconds
        self._waiting: dict[str, StreamedTrade] = {}
        self._gone_out: dict[str, StreamedTrade] = {}
        self._window_ends: dict[str, float] = {}
        """Of the symbols that went out lately, in the order of their ends, since all windows are equally long."""
        self._due: dict[str, None] = {}
        """The waiting symbols without a window, in the order in which they came."""
        self._next_batch_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, symbol: str, trade: StreamedTrade) -> bool:
        """Take a trade in unless a newer one is known; of the same instant the last one counts. Tell whether it did.

        A closing auction's that waits is not displaced by what is traded after it.
        """
        newest = self._waiting.get(symbol) or self._gone_out.get(symbol)
        if newest is not None and trade.traded_at_ns < newest.traded_at_ns:
            return False
        if (
            newest is not None
            and newest.is_closing_print
            and not trade.is_closing_print
            and symbol in self._waiting
            and trade.traded_at_ns < newest.traded_at_ns + CLOSING_PRINT_STAYS_NS
        ):
            return False
        self._wait(symbol, trade)
        return True

    def _wait(self, symbol: str, trade: StreamedTrade) -> None:
        self._waiting[symbol] = trade
        if symbol not in self._window_ends:
            self._due[symbol] = None

    def wait_seconds(self, at: float) -> float | None:
        """Return how long it is from `at` on until a batch may be there; None while there is nothing to go out."""
        if not self._waiting:
            return None
        self._end_windows(at)
        due_at = at if self._due else next(iter(self._window_ends.values()))
        return max(due_at - at, self._next_batch_at - at, 0.0)

    def batch(self, at: float) -> dict[str, StreamedTrade]:
        """Let out what waits of the symbols whose windows are over, and begin new ones at `at`."""
        self._end_windows(at)
        batch = {symbol: self._waiting.pop(symbol) for symbol in self._due}
        self._due.clear()
        self._gone_out |= batch
        self._window_ends |= dict.fromkeys(batch, at + self._window_seconds)
        self._next_batch_at = at + self._spacing_seconds
        return batch

    def _end_windows(self, at: float) -> None:
        while self._window_ends:
            symbol, ends_at = next(iter(self._window_ends.items()))
            if ends_at > at:
                break
            del self._window_ends[symbol]
            if symbol in self._waiting:
                self._due[symbol] = None

    def take_back(self, batch: dict[str, StreamedTrade]) -> None:
        """Let a batch that could not be stored wait again, less what is newer by now.

        A closing auction's trade stays before what was traded after it.
        """
        closing = {
            symbol: trade
            for symbol, trade in batch.items()
            if trade.is_closing_print
            and symbol in self._waiting
            and not self._waiting[symbol].is_closing_print
        }
        for symbol, trade in (batch | self._waiting | closing).items():
            self._wait(symbol, trade)

    def withdraw(self, symbol: str, trade_id: object) -> bool:
        """Drop a trade that does not count any more; tell whether it waited here.

        Older ones of its symbol that it has displaced are gone: the caller must ask for the symbol's last trade.
        """
        waiting = self._waiting.get(symbol)
        if waiting is not None and waiting.trade_id == trade_id:
            self._drop(symbol)
            return True
        return False

    def forget(self, symbol: str) -> None:
        """Know nothing of a symbol any more: the next trade is the newest, whenever it happened."""
        self._drop(symbol)
        self._gone_out.pop(symbol, None)

    def _drop(self, symbol: str) -> None:
        self._waiting.pop(symbol, None)
        self._due.pop(symbol, None)
