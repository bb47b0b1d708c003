"""The request budget and the pauses."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.price_feeder.budget import RateBudget, pause_asked_for

NOW = datetime(2026, 3, 2, 15, 0, 0, tzinfo=UTC)


def test_budget_allows_its_number_and_then_none_until_60_seconds_after_the_end() -> None:
    budget = RateBudget(2)
    assert budget.start(0.0)
    assert budget.start(0.0)
    assert not budget.start(1.0)
    budget.end(5.0)
    assert not budget.start(65.0)
    assert budget.start(65.1)
    assert budget.left(65.1) == 0
    budget.end(66.0)
    budget.end(66.0)
    assert budget.left(200.0) == 2


waits = st.floats(min_value=0, max_value=40, allow_nan=False)


@given(
    requests_max=st.integers(1, 5),
    attempts=st.lists(st.tuples(waits, waits, st.floats(0, 1)), max_size=60),
)
def test_no_60_seconds_see_more_requests_than_the_budget(
    requests_max: int, attempts: list[tuple[float, float, float]]
) -> None:
    """Wherever between its start and its end the other side counts a request."""
    budget = RateBudget(requests_max)
    at = 0.0
    under_way: list[float] = []
    counted: list[float] = []
    for pause, duration, share in attempts:
        at += pause
        for end in sorted(end for end in under_way if end <= at):
            budget.end(end)
            under_way.remove(end)
        if budget.start(at):
            under_way.append(at + duration)
            counted.append(at + duration * share)
    for begin in counted:
        assert sum(begin <= moment < begin + 60 for moment in counted) <= requests_max


@given(requests_max=st.integers(1, 5), pauses=st.lists(st.floats(min_value=0, max_value=100), max_size=60))
def test_budget_that_rested_a_minute_is_whole_again(requests_max: int, pauses: list[float]) -> None:
    budget = RateBudget(requests_max)
    at = 0.0
    for pause in pauses:
        at += pause
        if budget.start(at):
            budget.end(at)
    assert budget.left(at + 60.01) == requests_max


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "900"}, 900),
        ({"Retry-After": "0"}, 1),
        ({"Retry-After": "-5"}, 1),
        ({"Retry-After": "86400"}, 3600),
        ({"Retry-After": "1e999"}, 15),
        ({"Retry-After": "soon"}, 15),
        ({"Retry-After": "Mon, 02 Mar 2026 15:00:20 GMT"}, 20),
        ({"Retry-After": "Mon, 02 Mar 2026 14:00:00 GMT"}, 1),
        ({"Retry-After": "Mon, 02 Mar 2099 15:00:00 GMT"}, 3600),
        ({"X-RateLimit-Reset": "1772463645"}, 45),  # 2026-03-02 15:00:45 UTC
        ({"X-RateLimit-Reset": "1772463645", "Retry-After": "3"}, 3),
        ({"X-RateLimit-Reset": "1772463645", "Retry-After": "soon"}, 45),
        ({"X-RateLimit-Reset": "nan"}, 15),
        ({}, 15),
    ],
)
def test_pause_is_what_the_headers_say_within_bounds(headers: dict[str, str], seconds: int) -> None:
    assert pause_asked_for(headers, NOW) == timedelta(seconds=seconds)
