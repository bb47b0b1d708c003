"""What a market answers, whichever source it has: trades and bars, in the simulator's own words. No I/O.

Instants are whole nanoseconds since the Unix epoch, the precision of Alpaca's protocol.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Trade:
    """One trade; `price` in US dollars, `size` in shares or coins."""

    at_ns: int
    price: Decimal
    size: Decimal
    id: int
    exchange: str
    conditions: tuple[str, ...] = ("@",)


@dataclass(frozen=True, slots=True)
class Bar:
    """Open, high, low and close of the trades from `start_ns` up to the next bar."""

    start_ns: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    trades: int
    vwap: Decimal


class Market(Protocol):
    """A source of trades and of bars made from whole minutes."""

    @property
    def name(self) -> str:
        """What the source is, for logs and the status."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols that trade here, sorted."""

    def latest_trade(self, symbol: str, at_ns: int) -> Trade | None:
        """Return the last trade that is not after the instant; None without one, or for an unknown symbol."""

    def next_trade_ns(self, symbol: str, after_ns: int) -> int | None:
        """Return from when on the latest trade is another one than at an instant; None for never, or unknown."""

    def bar(self, symbol: str, start_ns: int, end_ns: int) -> Bar | None:
        """Return the bar over the whole minutes from start (inclusive) to end (exclusive)."""

    def next_minute(self, symbol: str, at_ns: int) -> int | None:
        """Return the start of the first minute with trades that starts at or after the instant."""

    def previous_minute(self, symbol: str, before_ns: int) -> int | None:
        """Return the start of the last minute with trades that starts before the instant."""
