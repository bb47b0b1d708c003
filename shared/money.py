"""Money, prices and quantities as constrained decimals, and the one rounding rule.

No float enters here: a value from outside is made from its text, `Decimal(str(value))`.
"""

from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated

from pydantic import Field

PRICE_PLACES = 4
MONEY_PLACES = 2

Price = Annotated[Decimal, Field(gt=0, max_digits=15, decimal_places=PRICE_PLACES, allow_inf_nan=False)]
"""US dollars per share or coin, the table's NUMERIC(15,4)."""

Money = Annotated[Decimal, Field(max_digits=18, decimal_places=MONEY_PLACES, allow_inf_nan=False)]
"""US dollars with cents, the table's NUMERIC(18,2)."""

Shares = Annotated[Decimal, Field(ge=0, max_digits=20, decimal_places=9, allow_inf_nan=False)]
"""Units of one symbol, the table's NUMERIC(20,9)."""


def rounded(value: Decimal, places: int) -> Decimal:
    """Round half away from zero, as PostgreSQL rounds NUMERIC."""
    return value.quantize(Decimal(1).scaleb(-places), rounding=ROUND_HALF_UP)


def percent(part: Decimal, whole: Decimal) -> Decimal:
    """Return `part` as a percentage of `whole` with two decimals; 0 when `whole` is 0."""
    if whole == 0:
        return Decimal("0.00")
    return rounded(part * 100 / whole, 2)
