"""Timeframes, instants and page tokens, as Alpaca writes them."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from services.market_simulator.bars import PageToken, Span, bars
from services.market_simulator.instants import MINUTE_NS, ns_of_text, rfc3339
from services.market_simulator.synthetic import SyntheticMarket
from services.market_simulator.timeframes import Timeframe, timeframe_of

NEW_YORK = ZoneInfo("America/New_York")


@pytest.mark.parametrize(
    ("text", "at", "start", "end"),
    [
        ("1Min", "2026-03-02T14:31:59Z", "2026-03-02T14:31:00Z", "2026-03-02T14:32:00Z"),
        ("15T", "2026-03-02T14:31:59Z", "2026-03-02T14:30:00Z", "2026-03-02T14:45:00Z"),
        ("4Hour", "2026-03-02T14:31:59Z", "2026-03-02T12:00:00Z", "2026-03-02T16:00:00Z"),
        ("1Day", "2026-03-02T14:31:59Z", "2026-03-02T05:00:00Z", "2026-03-03T05:00:00Z"),
        ("1D", "2026-03-08T12:00:00Z", "2026-03-08T05:00:00Z", "2026-03-09T04:00:00Z"),  # 23 hours
        ("1D", "2026-11-01T12:00:00Z", "2026-11-01T04:00:00Z", "2026-11-02T05:00:00Z"),  # 25 hours
        ("1Week", "2026-03-08T12:00:00Z", "2026-03-02T05:00:00Z", "2026-03-09T04:00:00Z"),
        ("1Month", "2026-01-01T02:00:00Z", "2025-12-01T05:00:00Z", "2026-01-01T05:00:00Z"),
        ("3M", "2026-11-22T12:00:00Z", "2026-10-01T04:00:00Z", "2027-01-01T05:00:00Z"),
        ("12Month", "2026-11-22T12:00:00Z", "2026-01-01T05:00:00Z", "2027-01-01T05:00:00Z"),
    ],
)
def test_a_bar_starts_and_ends_at(text: str, at: str, start: str, end: str) -> None:
    bounds = timeframe_of(text).bounds(ns_of_text(at), NEW_YORK)
    assert tuple(map(rfc3339, bounds)) == (start, end)


@pytest.mark.parametrize(
    "text", ["", "Min", "0Min", "60Min", "24Hour", "2Day", "2Week", "5Month", "1min", "1Min "]
)
def test_other_timeframes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid timeframe"):
        timeframe_of(text)


def test_the_bar_of_the_current_hour_ends_with_the_last_whole_minute() -> None:
    market = SyntheticMarket(seed=1)
    now_ns = ns_of_text("2026-03-02T14:12:34Z")
    start_ns = ns_of_text("2026-03-02T13:00:00Z")
    span = Span(timeframe_of("1Hour"), NEW_YORK, first_ns=start_ns, last_ns=now_ns, now_ns=now_ns)
    found = list(bars(market, "SPY", span))
    assert [rfc3339(bar.start_ns) for bar in found] == ["2026-03-02T13:00:00Z", "2026-03-02T14:00:00Z"]
    trade = market.latest_trade("SPY", ns_of_text("2026-03-02T14:12:00Z") - 1)
    assert trade is not None
    assert found[-1].close == trade.price


def test_the_current_minute_has_no_bar_yet() -> None:
    market = SyntheticMarket(seed=1)
    now_ns = ns_of_text("2026-03-02T14:12:34Z")
    span = Span(
        timeframe_of("1Min"), NEW_YORK, first_ns=now_ns - 2 * MINUTE_NS, last_ns=now_ns, now_ns=now_ns
    )
    assert [rfc3339(bar.start_ns) for bar in bars(market, "SPY", span)] == ["2026-03-02T14:11:00Z"]


def test_a_bar_that_began_before_the_start_is_left_out_in_both_orders() -> None:
    market = SyntheticMarket(seed=1)
    first_ns, last_ns = ns_of_text("2026-03-02T14:02:00Z"), ns_of_text("2026-03-02T14:12:00Z")
    starts = {}
    for descending in (False, True):
        span = Span(timeframe_of("5Min"), NEW_YORK, first_ns, last_ns, 2 * last_ns, descending)
        starts[descending] = [rfc3339(bar.start_ns) for bar in bars(market, "SPY", span)]
    assert starts[False] == ["2026-03-02T14:05:00Z", "2026-03-02T14:10:00Z"]
    assert starts[True] == ["2026-03-02T14:10:00Z", "2026-03-02T14:05:00Z"]


def test_a_page_token_survives_its_journey_and_nothing_else_is_one() -> None:
    token = PageToken("BRK.B", Timeframe(5, "Min"), ns_of_text("2026-03-02T14:05:00Z"))
    assert PageToken.decoded(token.encoded(), Timeframe(5, "Min")) == token
    with pytest.raises(ValueError, match="another timeframe"):
        PageToken.decoded(token.encoded(), Timeframe(1, "Day"))
    for wrong in ("%%%", "QUJD", "", "QXxCfEM="):
        with pytest.raises(ValueError, match="invalid page_token"):
            PageToken.decoded(wrong, Timeframe(5, "Min"))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("2022-01-03T09:00:00Z", "2022-01-03T09:00:00Z"),
        ("2022-08-17T09:50:43.361102308Z", "2022-08-17T09:50:43.361102308Z"),
        ("2024-01-04T09:30:00-04:00", "2024-01-04T13:30:00Z"),
        ("2022-05-26T11:47:18.443471360+00:00", "2022-05-26T11:47:18.44347136Z"),
    ],
)
def test_instants_keep_their_nanoseconds(text: str, written: str) -> None:
    assert rfc3339(ns_of_text(text)) == written


@pytest.mark.parametrize(
    "text", ["2022-01-03", "2022-01-03T09:00:00", "2022-13-03T09:00:00Z", "now", "1641200400"]
)
def test_what_is_no_instant_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"instant|month"):
        ns_of_text(text)


def test_the_epoch_is_zero() -> None:
    assert ns_of_text("1970-01-01T00:00:00.000000001Z") == 1
    assert datetime.fromtimestamp(0, UTC).year == 1970
