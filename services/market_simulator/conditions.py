"""Which trades set a price, by their conditions: the minute-bar column of the table in Alpaca's market data FAQ. Pure.

A trade sets a price when it updates the open and close of a minute bar; of several conditions the strictest counts.
The others (odd lots, average prices, trades out of sequence and the like) are streamed all the same, but are never
anybody's latest trade.
"""

from collections.abc import Iterable

_ON_EVERY_TAPE = frozenset("CHIMNPQRUVZ479")
_OF_NYSE = _ON_EVERY_TAPE | {
    "B"
}  # an average price; on Nasdaq's tape it is a bunched trade, which sets a price
_OF_NASDAQ = _ON_EVERY_TAPE | {"G", "W"}
_WITHOUT_PRICE = {"A": _OF_NYSE, "B": _OF_NYSE, "C": _OF_NASDAQ}


def sets_price(conditions: Iterable[str], tape: str) -> bool:
    """Tell whether a stock trade with these conditions on this tape sets a price."""
    return _WITHOUT_PRICE.get(tape, _ON_EVERY_TAPE).isdisjoint(conditions)
