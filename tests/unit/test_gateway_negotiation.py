"""Entity tags, accepted encodings and the compressed forms of an answer."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from services.api_gateway.negotiation import (
    COMPRESSED_BYTES_MIN,
    Representation,
    Stem,
    gzip_accepted,
    gzipped,
    is_match,
)

LONG, SHORT = b"[" + b"1," * 1000, b"[" + b"1," * 100


def asked(*headers: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(headers))


@pytest.mark.parametrize(
    ("accept_encoding", "is_welcome", "is_needed"),
    [
        ("gzip", True, False),
        ("GZip", True, False),
        ("x-gzip", True, False),
        ("gzip, deflate, br", True, False),
        ("br;q=1.0, gzip;q=0.8, *;q=0.1", True, False),
        ("gzip ; q=0.001", True, False),
        ("*", True, False),
        ("gzip;q=0.5, identity;q=0.5", True, False),
        ("gzip;q=0.5, identity", False, False),
        ("gzip;q=0.5, identity;q=0.6", False, False),
        ("", False, False),
        ("identity", False, False),
        ("deflate, br", False, False),
        ("gzip;q=0", False, False),
        ("gzip;q=0.000, *", False, False),
        ("*;q=0", False, False),
        ("gzip, identity;q=0", True, True),
        ("gzip, *;q=0", True, True),
        ("*, identity;q=0", True, True),
        ("gzip;q=0, identity;q=0", False, False),  # nothing is acceptable; then it is sent as it is
        ("gzip;q=2", False, False),  # malformed
        ("gzip;q=", False, False),
        ("gzip;q=nan", False, False),
        (";;;,,,=", False, False),
    ],
)
def test_accepted_encoding_is_read_with_its_weights(
    accept_encoding: str, is_welcome: bool, is_needed: bool
) -> None:
    assert gzip_accepted(accept_encoding) == (is_welcome, is_needed)


@pytest.mark.parametrize(
    ("if_none_match", "matches"),
    [
        ('"a"', True),
        ('W/"a"', True),
        (' "b" ,W/"a"', True),
        ('"b","a"', True),
        ("*", True),
        (" * ", True),
        ('"b"', False),
        ('"a-gzip"', False),
        ('"A"', False),
        ("a", False),
        ('"x,"a"y"', False),
        ('"*"', False),
        ("", False),
    ],
)
def test_known_entity_tags_are_compared_weakly(if_none_match: str, matches: bool) -> None:
    assert is_match(if_none_match, '"a"') is matches


@given(st.binary(max_size=3000), st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_compressed_form_is_the_whole_whatever_its_end(beginning: bytes, ends: list[bytes]) -> None:
    stem = Stem(beginning)
    for end in ends:
        assert gzip.decompress(stem.gzipped(end)) == beginning + end
    assert gzip.decompress(gzipped(beginning)) == beginning


@given(st.binary(max_size=100), st.integers(min_value=0, max_value=100))
def test_entity_tag_follows_from_the_content_and_not_from_where_it_was_cut(content: bytes, cut: int) -> None:
    pieces = Representation(Stem(content[:cut]), content[cut:], cache_control="no-cache")
    whole = Representation(Stem(content), b"", cache_control="no-cache")
    assert pieces.entity_tag == whole.entity_tag
    assert pieces.entity_tag != Representation(Stem(content), b"!", cache_control="no-cache").entity_tag


def test_long_answer_is_compressed_for_who_accepts_it() -> None:
    answer = Representation(Stem(LONG), b"1]", cache_control="private, no-cache")
    plain, compressed = answer.response(asked()), answer.response(asked(("Accept-Encoding", "gzip")))
    assert plain.body == LONG + b"1]"
    assert isinstance(compressed.body, bytes)
    assert gzip.decompress(compressed.body) == plain.body
    assert len(compressed.body) < COMPRESSED_BYTES_MIN
    assert "Content-Encoding" not in plain.headers
    assert compressed.headers["Content-Encoding"] == "gzip"
    assert compressed.headers["ETag"] == plain.headers["ETag"][:-1] + '-gzip"'
    for response in (plain, compressed):
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["Cache-Control"] == "private, no-cache"
        assert response.headers["Vary"] == "Accept-Encoding, Authorization"


def test_compressed_form_is_made_once() -> None:
    answer = Representation(Stem(LONG), b"1]", cache_control="no-cache")
    header = asked(("Accept-Encoding", "gzip"))
    assert answer.response(header).body is answer.response(header).body


def test_short_answer_is_compressed_only_for_who_takes_nothing_else() -> None:
    answer = Representation(Stem(SHORT), b"1]", cache_control="no-cache")
    assert "Content-Encoding" not in answer.response(asked(("Accept-Encoding", "gzip"))).headers
    needed = answer.response(asked(("Accept-Encoding", "gzip, identity;q=0")))
    assert needed.headers["Content-Encoding"] == "gzip"


def test_several_header_lines_count_as_one() -> None:
    answer = Representation(Stem(LONG), b"1]", cache_control="no-cache")
    response = answer.response(asked(("Accept-Encoding", "br"), ("Accept-Encoding", "gzip")))
    assert response.headers["Content-Encoding"] == "gzip"
    known = answer.response(asked(("If-None-Match", '"b"'), ("If-None-Match", answer.entity_tag)))
    assert known.status == 304


@pytest.mark.parametrize(
    ("accept_encoding", "known", "status"),
    [
        ("gzip", "compressed", 304),
        ("gzip", "plain", 200),
        ("identity", "compressed", 200),
        ("identity", "plain", 304),
    ],
)
def test_each_form_has_its_own_entity_tag(accept_encoding: str, known: str, status: int) -> None:
    answer = Representation(Stem(LONG), b"1]", cache_control="private, no-cache")
    tag = answer.entity_tag_gzip if known == "compressed" else answer.entity_tag
    response = answer.response(asked(("Accept-Encoding", accept_encoding), ("If-None-Match", tag)))
    assert response.status == status
    if status == 304:
        assert response.body is None
        assert dict(response.headers) == {
            "Cache-Control": "private, no-cache",
            "Vary": "Accept-Encoding, Authorization",
            "ETag": tag,
        }
