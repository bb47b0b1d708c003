"""The contracts of the bus."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.messages import PriceTick, SnapshotDue, price_subject, symbol_of_token, symbol_token


def test_subjects_tell_class_and_symbol() -> None:
    assert price_subject("AAPL") == "prices.v1.equity.AAPL"
    assert price_subject("BRK.B") == "prices.v1.equity.BRK_2EB"
    assert price_subject("BTC/USD") == "prices.v1.crypto.BTC_2FUSD"


@given(st.text(min_size=1))
def test_every_symbol_survives_the_codec_as_one_token(symbol: str) -> None:
    token = symbol_token(symbol)
    assert symbol_of_token(token) == symbol
    assert all(character.isascii() and (character.isalnum() or character in "-_") for character in token)


@given(a=st.text(min_size=1), b=st.text(min_size=1))
def test_different_symbols_have_different_tokens(a: str, b: str) -> None:
    assert (symbol_token(a) == symbol_token(b)) == (a == b)


@pytest.mark.parametrize("token", ["BRK.B", "BRK_2eB", "A_41", "A_", "é"])
def test_what_the_codec_did_not_make_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="not a symbol token"):
        symbol_of_token(token)


def test_tick_travels_with_decimals_as_text_and_times_in_utc() -> None:
    at = datetime(2024, 1, 1, 10, 0, tzinfo=UTC)
    tick = PriceTick(
        symbol="BRK.B", price=Decimal("175.0000"), traded_at=at, received_at=at, feed="iex", sequence=7
    )
    assert tick.model_dump_json() == (
        '{"symbol":"BRK.B","price":"175.0000","traded_at":"2024-01-01T10:00:00Z",'
        '"received_at":"2024-01-01T10:00:00Z","feed":"iex","sequence":7}'
    )


def test_a_reader_ignores_fields_it_does_not_know() -> None:
    due = SnapshotDue.model_validate_json('{"scheduled_at":"2024-01-01T10:00:00Z","added_in_version_1":true}')
    assert (due.shard, due.shards) == (0, 1)


@pytest.mark.parametrize(
    "payload",
    [
        '{"scheduled_at":"2024-01-01T10:00:00"}',
        '{"scheduled_at":"2024-01-01T10:00:00Z","shard":2,"shards":2}',
        '{"scheduled_at":"2024-01-01T10:00:00Z","shard":-1}',
        '{"shard":0}',
        "[]",
    ],
)
def test_a_due_moment_without_zone_or_shard_is_refused(payload: str) -> None:
    with pytest.raises(ValidationError):
        SnapshotDue.model_validate_json(payload)


@pytest.mark.parametrize("price", ["0", "-1", "1e400", "NaN", "1.00001", "123456789012.0"])
def test_absurd_prices_are_refused(price: str) -> None:
    at = datetime(2024, 1, 1, tzinfo=UTC)
    with pytest.raises(ValidationError):
        PriceTick(symbol="A", price=Decimal(price), traded_at=at, received_at=at, feed="iex", sequence=1)
