"""Which trades set the last price."""

import pytest

from services.price_feeder.conditions import sets_price

REGULAR = {"A": " ", "B": " ", "C": "@", "O": "@"}


@pytest.mark.parametrize("tape", ["A", "B", "C", "O"])
@pytest.mark.parametrize("condition", "CHIMNPQRUVZ479")
def test_conditions_that_set_no_price_on_any_tape(tape: str, condition: str) -> None:
    """The rows of Alpaca's table whose open / close does not change in minute bars."""
    assert not sets_price([REGULAR[tape], condition], tape)


@pytest.mark.parametrize("tape", ["A", "B", "C"])
@pytest.mark.parametrize("condition", "FKLOTX56")
def test_conditions_that_set_a_price_on_every_tape(tape: str, condition: str) -> None:
    assert sets_price([REGULAR[tape], condition], tape)


def test_the_same_letter_means_another_thing_on_another_tape() -> None:
    assert not sets_price([" ", "B"], "A")  # average price
    assert not sets_price([" ", "B"], "B")
    assert sets_price(["@", "B"], "C")  # bunched
    assert not sets_price(["@", "W"], "C")  # average price
    assert not sets_price(["@", "W"], "O")
    assert not sets_price(["@", "G"], "C")  # bunched sold


def test_of_several_conditions_the_strictest_counts() -> None:
    """Alpaca's own example: `@`, `4`, `I` sets no price, nor does `@`, `4` in a minute bar; `@` does."""
    assert not sets_price(["@", "4", "I"], "C")
    assert not sets_price(["@", "4"], "C")
    assert sets_price(["@"], "C")


def test_what_is_not_known_sets_a_price() -> None:
    assert sets_price([], "C")
    assert sets_price(["?"], "A")
    assert sets_price(["@"], "Z")
    assert not sets_price(["@", "I"], None)
