"""Numbers that must fit their column exactly."""

from decimal import Decimal

import pytest

from services.admin.amounts import CASH, COST_BASIS, SHARES, Column, amount


@pytest.mark.parametrize(
    ("text", "column", "value"),
    [
        ("100", SHARES, "100"),
        (" 0.000000001 ", SHARES, "0.000000001"),
        ("99999999999.999999999", SHARES, "99999999999.999999999"),
        ("1.5000000000000", SHARES, "1.5"),
        ("0007", SHARES, "7"),
        (".5", SHARES, "0.5"),
        ("5.", SHARES, "5"),
        ("+3", SHARES, "3"),
        ("0", SHARES, "0"),
        ("-0.00", COST_BASIS, "0"),
        ("999999999999999.99", COST_BASIS, "999999999999999.99"),
        ("-250.10", CASH, "-250.10"),
    ],
)
def test_plain_number_is_taken_exactly(text: str, column: Column, value: str) -> None:
    assert amount(text, column) == Decimal(value)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", SHARES, "is empty"),
        ("  ", SHARES, "is empty"),
        ("-1", SHARES, "must not be negative"),
        ("-0.01", COST_BASIS, "must not be negative"),
        ("100000000000", SHARES, "too large: at most 11 digits before the point"),
        ("1000000000000000", COST_BASIS, "too large: at most 15 digits before the point"),
        ("0.0000000001", SHARES, "too fine: at most 9 decimals"),
        ("10.005", COST_BASIS, "too fine: at most 2 decimals"),
        ("1,234.50", COST_BASIS, "must have no thousands separators"),
        ("1'234", COST_BASIS, "must have no thousands separators"),
        ("1_000", SHARES, "must have no thousands separators"),
        ("1\u202f234", SHARES, "must have no thousands separators"),
        ("12,5", SHARES, "a point before the decimals"),
        ("1e400", SHARES, "without an exponent"),
        ("1E-5", SHARES, "without an exponent"),
        ("NaN", SHARES, "must be a plain number such as 1234.50"),
        ("Infinity", SHARES, "must be a plain number"),
        ("$5", COST_BASIS, "must be a plain number"),
        ("(5.00)", CASH, "with a minus sign, not in brackets"),
        ("0x10", SHARES, "must be a plain number"),
        ("\u0661\u0662", SHARES, "must be a plain number"),
        ("1.2.3", SHARES, "must be a plain number"),
        ("--1", SHARES, "must be a plain number"),
        (".", SHARES, "must be a plain number"),
        ("-", SHARES, "must be a plain number"),
        ("1\x00", SHARES, "must be a plain number"),
    ],
)
def test_number_that_does_not_fit_is_refused_in_words(text: str, column: Column, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        amount(text, column)


def test_refusal_shows_the_text_cut_and_harmless_for_a_terminal() -> None:
    with pytest.raises(ValueError, match="plain number") as refused:
        amount("\x1b[2J" + "9" * 1000 + "x", SHARES)
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 120
