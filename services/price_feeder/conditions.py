"""Which trades set the last price, by their conditions and tape. Pure.

The stream sends every trade. Alpaca's latest-trade call leaves out those with a condition "that causes them to not
update the bar price" (its OpenAPI description), so that the stream must leave out the same for both to agree. The table
is that of Alpaca's Market Data FAQ, "How are bars aggregated?", column open / close, minute bars:
https://docs.alpaca.markets/docs/market-data-faq#how-are-bars-aggregated
It follows the update rules of the SIPs (CTS Pillar Output Specification for tapes A and B, UTP Data Feed Services
Specification for tape C, TDDS for tape O). Of several conditions the strictest counts. Extended hours (`T`) do set a
price: whether one outside the session counts is for the market hours to say.
"""

from collections.abc import Iterable

CASH_SALE = "C"
PRICE_VARIATION = "H"
ODD_LOT = "I"
OFFICIAL_CLOSE = "M"
NEXT_DAY = "N"
PRIOR_REFERENCE_PRICE = "P"
OFFICIAL_OPEN = "Q"
SELLER = "R"
EXTENDED_HOURS_OUT_OF_SEQUENCE = "U"
CONTINGENT = "V"
SOLD_OUT_OF_SEQUENCE = "Z"
DERIVATIVELY_PRICED = "4"
QUALIFIED_CONTINGENT = "7"
CORRECTED_CLOSE = "9"

CLOSING_PRINT = "6"
"""The trade of a closing auction, reported seconds or minutes after the close; it sets a price on every tape."""

AVERAGE_PRICE_CTA = "B"
"""On tape C the same letter is a bunched trade, which sets a price."""
AVERAGE_PRICE_UTP = "W"
BUNCHED_SOLD = "G"

_ANY_TAPE = frozenset(
    {
        CASH_SALE,
        PRICE_VARIATION,
        ODD_LOT,
        OFFICIAL_CLOSE,
        NEXT_DAY,
        PRIOR_REFERENCE_PRICE,
        OFFICIAL_OPEN,
        SELLER,
        EXTENDED_HOURS_OUT_OF_SEQUENCE,
        CONTINGENT,
        SOLD_OUT_OF_SEQUENCE,
        DERIVATIVELY_PRICED,
        QUALIFIED_CONTINGENT,
        CORRECTED_CLOSE,
    }
)
_CTA = _ANY_TAPE | {AVERAGE_PRICE_CTA}
_UTP = _ANY_TAPE | {AVERAGE_PRICE_UTP, BUNCHED_SOLD}
_OTC = _ANY_TAPE | {AVERAGE_PRICE_UTP}

WITHOUT_PRICE: dict[object, frozenset[str]] = {"A": _CTA, "B": _CTA, "C": _UTP, "O": _OTC}
"""Conditions of trades that do not set the last price, by tape."""


def sets_price(conditions: Iterable[object], tape: object) -> bool:
    """Tell whether an equity trade sets the last price; conditions and tapes that are not known do."""
    return WITHOUT_PRICE.get(tape, _ANY_TAPE).isdisjoint(conditions)
