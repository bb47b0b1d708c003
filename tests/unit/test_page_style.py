"""The page's colours can be read by everyone (WCAG 2.2, AA: 4.5 for text)."""

import re
from itertools import product

import pytest

from services.api_gateway.pages import FOLDER

STYLE = (FOLDER / "style.css").read_text()
TEXTS = ("ink", "muted", "up", "down", "warn")
CONTRAST_MIN = 4.5


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block))


def schemes() -> dict[str, dict[str, str]]:
    """Return the colours of both schemes; the dark one names those that differ."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)[:2]
    return {"light": colours(light), "dark": colours(light) | colours(dark)}


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_contrast_of_black_and_white_is_the_largest() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme: str) -> None:
    named = schemes()[scheme]
    pairs = [*product(TEXTS, ("canvas", "surface")), ("muted", "raised"), ("ink", "raised"), ("ink", "chip")]
    pairs += [("warn", "warn-surface"), ("on-accent", "accent"), ("accent", "surface")]
    faint = {
        pair: ratio for pair in pairs if (ratio := contrast(named[pair[0]], named[pair[1]])) < CONTRAST_MIN
    }
    assert faint == {}
