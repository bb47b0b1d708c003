"""How often prices are asked for while the market is closed. 2026-03-02 is a Monday, 14:30 to 21:00 UTC."""

from datetime import UTC, datetime, timedelta

from services.price_feeder.pace import Pace
from shared.market_hours import MarketHours

HELD = ["AAPL", "BTC/USD"]
HOURS = MarketHours()
FIVE_MINUTES = timedelta(minutes=5)


def at(hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, 3, 2, hour, minute, second, tzinfo=UTC)


def due(pace: Pace, when: datetime, held: list[str] = HELD, unanswered: tuple[str, ...] = ()) -> list[str]:
    """Take a round in which all that is due is answered but for these."""
    asked = pace.due(held, HOURS, when)
    pace.note_answered([symbol for symbol in asked if symbol not in unanswered], HOURS, when)
    return asked


def test_equities_rest_outside_the_session_and_crypto_does_not() -> None:
    pace = Pace("iex", FIVE_MINUTES)
    assert due(pace, at(3)) == HELD
    assert due(pace, at(3, 0, 10)) == ["BTC/USD"]
    assert due(pace, at(3, 4, 59)) == ["BTC/USD"]
    assert due(pace, at(3, 5)) == HELD
    assert due(pace, at(3, 5, 10)) == ["BTC/USD"]


def test_full_pace_from_five_minutes_before_the_open_until_fifteen_after_the_close() -> None:
    pace = Pace("iex", timedelta(hours=12))
    due(pace, at(14, 0))
    assert due(pace, at(14, 24, 59)) == ["BTC/USD"]
    assert due(pace, at(14, 25)) == HELD
    assert due(pace, at(14, 25, 10)) == HELD
    assert due(pace, at(21, 14, 50)) == HELD
    assert due(pace, at(21, 15)) == ["BTC/USD"]


def test_half_day_ends_the_full_pace_early() -> None:
    """2026-11-27 closes at 13:00 in New York, 18:00 UTC."""
    pace = Pace("iex", timedelta(hours=12))
    day = datetime(2026, 11, 27, 17, 59, tzinfo=UTC)
    assert due(pace, day) == HELD
    assert due(pace, day + timedelta(minutes=15)) == HELD  # 18:14
    assert due(pace, day + timedelta(minutes=16)) == ["BTC/USD"]


def test_what_somebody_begins_to_hold_is_asked_for_at_once() -> None:
    pace = Pace("iex", FIVE_MINUTES)
    due(pace, at(3))
    assert due(pace, at(3, 0, 10), ["AAPL", "MSFT"]) == ["MSFT"]
    assert due(pace, at(3, 0, 20), ["AAPL", "MSFT"]) == []


def test_what_nobody_answered_is_asked_for_again() -> None:
    pace = Pace("iex", FIVE_MINUTES)
    assert due(pace, at(3), unanswered=("AAPL", "BTC/USD")) == HELD
    assert due(pace, at(3, 0, 10), unanswered=("AAPL",)) == HELD
    assert due(pace, at(3, 0, 20)) == HELD
    assert due(pace, at(3, 0, 30)) == ["BTC/USD"]
    assert due(pace, at(3, 0, 40), ["AAPL", "MSFT"], unanswered=("MSFT",)) == ["MSFT"]
    assert due(pace, at(3, 0, 50), ["AAPL", "MSFT"]) == ["MSFT"]
    assert due(pace, at(3, 1), ["AAPL", "MSFT"]) == []


def test_clock_that_goes_back_delays_nothing() -> None:
    pace = Pace("iex", FIVE_MINUTES)
    due(pace, at(9))
    assert due(pace, at(3)) == HELD


def test_feeds_that_trade_around_the_clock_never_rest() -> None:
    for feed in ("simulated", "overnight", "boats"):
        pace = Pace(feed, FIVE_MINUTES)
        due(pace, at(3))
        assert due(pace, at(3, 0, 10)) == HELD
