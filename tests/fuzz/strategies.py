"""What does not belong: JSON of any shape, and right messages of which something was made wrong."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

DIGITS_MAX = 400
"""10^400 is no float, and no number of any table."""


class Raw(str):
    """JSON that is written as it is: what no Python value becomes, such as 1e400 or a key that is there twice."""


_NUMBERS = """
1e400 -1e400 1e-400 -0 -0.0 NaN Infinity -Infinity 1E+2 0.1 1.00005 99999999999.99995 0.00004999
9223372036854775807 9223372036854775808 -9223372036854775809 18446744073709551616
"""
RAW_NUMBERS = st.sampled_from([*_NUMBERS.split(), "1" + "0" * DIGITS_MAX, "0." + "0" * DIGITS_MAX + "1"]).map(
    Raw
)
"""Among them NaN and Infinity, which are no JSON and which many readers take."""

_INSTANTS = """
0001-01-01T00:00:00Z 0001-01-01T00:00:00+23:59 9999-12-31T23:59:59.999999Z 9999-12-31T23:59:59-23:59
2026-03-02T15:00:00 2026-02-30T15:00:00Z 2026-03-02T24:00:00Z 2016-12-31T23:59:60Z 2026-03-02 now
2026-03-02T15:00:00.123456789Z 292278994-08-17T07:12:55Z -262144-01-01T00:00:00Z 1970-01-01T00:00:00Z
1969-12-31T23:59:59Z 2026-W10-1T15:00:00Z 2026-03-02T15:00:00+24:00 20260302T150000Z ٢٠٢٦-03-02T15:00:00Z
"""
INSTANTS = st.sampled_from(_INSTANTS.split())
"""Instants that do not exist, name no zone, or are so far away that arithmetic with them overflows."""

TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "\x00", "AAPL", "AAPL\n", "aapl", "*", ">", "a.b", "NaN", "null", "💥", "\u202e"]
    ),
    st.text(max_size=40),
    st.integers(33, 2000).map("A".__mul__),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, INSTANTS, RAW_NUMBERS, st.integers(-2, 2)
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=12,
)
"""JSON of any shape."""

DEPTHS = st.sampled_from([10, 200, 5_000, 100_000])


def nested(depth: int) -> bytes:
    """Return JSON that is that deep."""
    return b"[" * depth + b"]" * depth


def written(value: Any) -> str:
    """Write a value as JSON; NaN and infinities as Python does, and what is `Raw` as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json.dumps(key)}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def encoded(value: Any) -> bytes:
    return written(value).encode(errors="surrogatepass")


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")),
    VALUES.map(encoded),
    DEPTHS.map(nested),
    st.sampled_from(
        [b"", b"null", b"{}", b"[]", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"a":', b'"' + b"x" * 100_000 + b'"']
    ),
    st.sampled_from(["utf-16", "utf-32", "latin-1"]).map('{"symbol":"é"}'.encode),
)
"""Payloads of any kind of nonsense."""


@st.composite
def spoiled(draw: st.DrawFn, right: Mapping[str, Any], values: st.SearchStrategy[Any] = VALUES) -> bytes:
    """Return a right message of which one or two members have another value, are left out, doubled or added."""
    members: list[tuple[str, Any]] = list(right.items())
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(members) - 1)) if members else 0
        name = members[place][0] if members else "a"
        match draw(st.sampled_from(["replaced", "replaced", "left out", "doubled", "added"])):
            case "replaced" if members:
                members[place] = name, draw(values)
            case "left out" if members:
                members.pop(place)
            case "doubled":
                members.insert(place, (name, draw(values)))
            case _:
                members.append((draw(TEXTS), draw(values)))
    text = "{" + ",".join(f"{json.dumps(name)}:{written(value)}" for name, value in members) + "}"
    return text.encode(errors="surrogatepass")


@st.composite
def cut(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return bytes that end too early, or of which one is another."""
    place = draw(st.integers(0, len(whole) - 1))
    if draw(st.booleans()):
        return whole[:place]
    return whole[:place] + bytes([draw(st.integers(0, 255))]) + whole[place + 1 :]


def wrong(right: Callable[[], Mapping[str, Any]]) -> st.SearchStrategy[bytes]:
    """Return what is not quite the message that `right` makes, or nothing like it."""
    return st.one_of(
        st.deferred(lambda: spoiled(right())), st.deferred(lambda: cut(encoded(right()))), GARBAGE
    )
