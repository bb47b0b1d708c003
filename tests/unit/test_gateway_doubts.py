"""Whoever floods the bus with garbage fills a counter, and not the log."""

import pytest
from structlog.testing import capture_logs

from services.api_gateway.doubts import Doubts
from shared.messages import PRICES_CONFIRMED, PricesConfirmed
from tests.metrics import sample


def test_a_flood_is_counted_and_said_now_and_then() -> None:
    at = 100.0
    before, said = sample("gateway_messages_doubtful_total"), Doubts(clock=lambda: at)
    with capture_logs() as logs:
        for _ in range(1000):
            said.add("prices.v1.AAPL", "its sequence is far ahead of the last one")
        at += 10
        with pytest.raises(ValueError, match="Invalid JSON") as error:
            PricesConfirmed.model_validate_json(b"{")
        said.add_malformed(PRICES_CONFIRMED, b"{", error.value)  # type: ignore[arg-type]  # a ValidationError
    assert sample("gateway_messages_doubtful_total") - before == 1001
    assert [(line["reason"].split(":")[0], line["unsaid_before"]) for line in logs] == [
        ("its sequence is far ahead of the last one", 0),
        ("malformed", 999),
    ]
