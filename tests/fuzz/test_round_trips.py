"""Messages of the bus, to JSON and back: nothing is lost, and what is written is as docs/asyncapi.yaml says."""

import json
from datetime import UTC, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared import messages
from shared.messages import Message
from tests.contract import validator
from tests.fuzz.strategies import GARBAGE
from tests.fuzz.trying import examples

ZONES = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
INSTANTS = st.datetimes(timezones=st.just(UTC) | ZONES).filter(lambda at: 1 < at.year < 9999)
COUNTS = st.integers(0, 10**9)
MONEY = st.decimals(Decimal("-9999999999999999.99"), Decimal("9999999999999999.99"), places=2)
SYMBOL = st.text([chr(code) for code in range(33, 127)], min_size=1, max_size=32)
SYMBOLS = st.lists(SYMBOL, min_size=1, max_size=5).map(tuple)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=32)
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "symbol": SYMBOL,
    "symbols": SYMBOLS,
    "unknown": SYMBOLS,
    "price": st.decimals(Decimal("0.0001"), Decimal("99999999999.9999"), places=4),
    "feed": TEXT,
    "detail": TEXT,
    "subject": TEXT,
    "sequence": st.integers(1, 2**63 - 1),
    "shard": st.integers(0, 1023),
    "shards": st.just(1024),
    "user_id": st.integers(1, 2**31 - 1),
    "simulated": st.booleans(),
    "state": st.sampled_from(messages.FeedState),
    **dict.fromkeys(("total_value", "cash_balance", "investment_value"), MONEY),
    **dict.fromkeys(
        ("portfolios", "positions", "unpriced", "unpriced_positions", "streamed", "polled"), COUNTS
    ),
    **dict.fromkeys(("confirmed", "changed", "rejected"), COUNTS),
    **dict.fromkeys(("traded_at", "received_at", "confirmed_at", "scheduled_at", "requested_at"), INSTANTS),
    **dict.fromkeys(("timestamp", "since", "refreshed_at"), INSTANTS),
    **dict.fromkeys(("ticket_expires_at", "token_expires_at"), INSTANTS),
}
"""What the members of messages may be; they have the same meaning wherever they have the same name."""
MESSAGES: list[type[Message]] = [
    messages.PriceTick,
    messages.CurrentPrice,
    messages.SnapshotDue,
    messages.SnapshotsTaken,
    messages.SnapshotRequested,
    messages.SnapshotTaken,
    messages.FeedStatus,
    messages.PricesConfirmed,
    messages.PricesRequested,
    messages.RefreshRequested,
    messages.StreamTicket,
]


def made(model: type[Message]) -> st.SearchStrategy[Message]:
    return st.builds(model, **{name: FIELDS[name] for name in model.model_fields})


REPLIES: st.SearchStrategy[Message] = st.builds(
    messages.PricesReply, prices=st.lists(made(messages.CurrentPrice), max_size=3).map(tuple), unknown=SYMBOLS
)
REFRESHED: st.SearchStrategy[Message] = st.builds(
    messages.PricesRefreshed,
    **{name: FIELDS[name] for name in ("refreshed_at", "confirmed", "changed", "rejected")},
    symbols=COUNTS,
)


@examples(100)
@given(st.one_of(*(made(model) for model in MESSAGES), REPLIES, REFRESHED))
def test_a_message_comes_back_as_it_was_and_as_it_is_documented(message: Message) -> None:
    text = message.model_dump_json()
    assert type(message).model_validate_json(text) == message
    said = json.loads(text)
    validator(type(message).__name__).validate(said)
    later = json.dumps(said | {"a_member_of_a_later_version": [{}]})
    assert type(message).model_validate_json(later) == message


@pytest.mark.parametrize("model", MESSAGES, ids=lambda model: model.__name__)
def test_nonsense_is_refused_or_means_something(model: type[Message]) -> None:
    @examples(30)
    @given(GARBAGE)
    def check(payload: bytes) -> None:
        try:
            message = model.model_validate_json(payload)
        except ValidationError:
            return
        assert model.model_validate_json(message.model_dump_json()) == message

    check()
