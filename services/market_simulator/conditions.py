"""Which trades set a price, by their conditions: the minute-bar column of the table in Alpaca's market data FAQ. Pure.

A trade sets a price when it updates the open and close of a minute bar; of several conditions the strictest counts.
The others (odd lots, average prices, trades out of sequence and the like) are streamed all the same, but are never
anybody's latest trade.
"""

from collections.abc import Iterable

_NO_PRICE = frozenset("CGHIMNPQRUVWZ479")
_AVERAGE_PRICE = "B"  # on the tapes of NYSE; on Nasdaq's it is a bunched trade, which sets a price


def sets_price(conditions: Iterable[str], tape: str) -> bool:
    """Tell whether a stock trade with these conditions on this tape sets a price."""
    return not any(one in _NO_PRICE or (one == _AVERAGE_PRICE and tape in {"A", "B"}) for one in conditions)
