"""The rounding rule."""

from decimal import Decimal

import pytest

from shared.money import percent, rounded


@pytest.mark.parametrize(
    ("value", "cents"),
    [("0.375", "0.38"), ("0.335", "0.34"), ("0.125", "0.13"), ("-0.125", "-0.13"), ("1.004999", "1.00")],
)
def test_half_a_cent_is_rounded_away_from_zero(value: str, cents: str) -> None:
    assert str(rounded(Decimal(value), 2)) == cents


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        ("2500.00", "15000.00", "16.67"),
        ("5000.50", "120000.00", "4.17"),
        ("50", "1450", "3.45"),
        ("5", "0", "0.00"),
    ],
)
def test_percentages_have_two_decimals(part: str, whole: str, expected: str) -> None:
    assert str(percent(Decimal(part), Decimal(whole))) == expected
