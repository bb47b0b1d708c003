"""Numbers from text that must fit a NUMERIC column exactly: nothing is rounded, guessed or read as a float."""

import re
from decimal import Decimal
from typing import NamedTuple

from shared.money import MONEY_PLACES

_PLAIN = re.compile(r"([+-]?)0*([0-9]*)(?:\.([0-9]*))?", re.ASCII)
_SHOWN_LENGTH_MAX = 40


class Column(NamedTuple):
    """What a NUMERIC column takes: digits before and after the point, and whether the sign may be minus."""

    whole_digits_max: int
    places_max: int
    negative: bool = False


SHARES = Column(whole_digits_max=11, places_max=9)
COST_BASIS = Column(whole_digits_max=15, places_max=MONEY_PLACES)
CASH = Column(whole_digits_max=15, places_max=MONEY_PLACES, negative=True)


def amount(text: str, column: Column) -> Decimal:
    """Return the number that `text` writes; raises ValueError that says in words why the column cannot hold it."""
    given = text.strip()
    if not given:
        raise ValueError("is empty")
    plain = _PLAIN.fullmatch(given)
    if not plain or not any(digit in given for digit in "0123456789"):
        raise ValueError(f"is {shown(given)}, {_problem(given)}")
    sign, whole, fraction = plain[1], plain[2], (plain[3] or "").rstrip("0")
    if len(whole) > column.whole_digits_max:
        raise ValueError(
            f"is {shown(given)}, too large: at most {column.whole_digits_max} digits before the point"
        )
    if len(fraction) > column.places_max:
        raise ValueError(f"is {shown(given)}, too fine: at most {column.places_max} decimals")
    value = Decimal(f"{whole or 0}.{fraction or 0}")
    if sign == "-" and value:
        if not column.negative:
            raise ValueError(f"is {shown(given)}, must not be negative")
        return -value
    return value


def shown(text: str) -> str:
    """Return the text in quotes, cut when it is long, with nothing in it that a terminal would obey."""
    return ascii(text if len(text) <= _SHOWN_LENGTH_MAX else f"{text[:_SHOWN_LENGTH_MAX]}…")


def _problem(given: str) -> str:
    if re.fullmatch(r"[+-]?[0-9.]+[eE][+-]?[0-9]+", given):
        return "must be written out, without an exponent"
    if re.fullmatch(r"[+-]?[0-9]+([,'_ \u00a0\u202f][0-9]+)+(\.[0-9]*)?", given):
        return "must have no thousands separators and a point before the decimals"
    if re.fullmatch(r"\([0-9.,]+\)", given):
        return "must be written with a minus sign, not in brackets"
    return "must be a plain number such as 1234.50"
