"""The chart's arithmetic: which buckets a timeframe has, and what changed between its start and its end. Pure."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import StrEnum
from zoneinfo import ZoneInfo

from shared import money
from shared.clock import last_boundary


class Timeframe(StrEnum):
    ONE_DAY = "1D"
    ONE_WEEK = "1W"
    ONE_MONTH = "1M"
    THREE_MONTHS = "3M"
    YEAR_TO_DATE = "YTD"
    ALL = "ALL"


@dataclass(frozen=True)
class Buckets:
    """Buckets of one width: the starts of the first and of the last, multiples of the width since the epoch."""

    first: datetime
    last: datetime
    width: timedelta


@dataclass(frozen=True)
class MarketDays:
    """A bucket for each market date until `last`; without `first`, from the user's first snapshot."""

    first: date | None
    last: date


_WINDOW_AND_WIDTH = {
    Timeframe.ONE_DAY: (timedelta(days=1), timedelta(minutes=5)),
    Timeframe.ONE_WEEK: (timedelta(days=7), timedelta(minutes=30)),
    Timeframe.ONE_MONTH: (timedelta(days=30), timedelta(hours=1)),
    Timeframe.THREE_MONTHS: (timedelta(days=90), timedelta(hours=3)),
}


def buckets(timeframe: Timeframe, now: datetime, market_timezone: ZoneInfo) -> Buckets | MarketDays:
    """Return the buckets that end with the one `now` falls into.

    A window of fixed length holds the buckets that start in (now - window, now]: 288, 336, 720 and 720 of them.
    """
    if timeframe in _WINDOW_AND_WIDTH:
        window, width = _WINDOW_AND_WIDTH[timeframe]
        last = last_boundary(now, width)
        return Buckets(last - window + width, last, width)
    today = now.astimezone(market_timezone).date()
    return MarketDays(date(today.year, 1, 1) if timeframe is Timeframe.YEAR_TO_DATE else None, today)


def buckets_until(timeframe: Timeframe, until: datetime, market_timezone: ZoneInfo) -> Buckets | MarketDays:
    """Return the buckets of the range that is over by `until`: as many as those of `buckets`, none of them cut off.

    The year of YTD is that of the last whole market date.
    """
    if timeframe in _WINDOW_AND_WIDTH:
        window, width = _WINDOW_AND_WIDTH[timeframe]
        end = last_boundary(until, width)
        return Buckets(end - window, end - width, width)
    last = until.astimezone(market_timezone).date() - timedelta(days=1)
    return MarketDays(date(last.year, 1, 1) if timeframe is Timeframe.YEAR_TO_DATE else None, last)


def end(window: Buckets | MarketDays, market_timezone: ZoneInfo) -> datetime:
    """Return the instant at which the window's last bucket is over."""
    match window:
        case Buckets(_, last, width):
            return last + width
        case MarketDays(_, day):
            return datetime.combine(day + timedelta(days=1), time(), market_timezone).astimezone(UTC)


def last_value(points: str) -> Decimal | None:
    """Return the value of the last of the points that a series has as JSON text; None without a point."""
    value = points[points.rfind('"value":') + len('"value":') : -1].partition(",")[0]
    return Decimal(value) if points else None


def answer(
    timeframe: Timeframe,
    points: str,
    start_value: Decimal | None,
    current_value: Decimal | None,
    *,
    simulated: bool,
    until: datetime | None = None,
) -> str:
    """Return the JSON text of the answer: what `answer_beginning` and `answer_end` return."""
    beginning = answer_beginning(timeframe, points, until=until)
    return beginning + answer_end(start_value, current_value, simulated=simulated)


def answer_beginning(timeframe: Timeframe, points: str, *, until: datetime | None = None) -> str:
    """Return the JSON text of the answer as far as only a snapshot changes it; `points` have commas between."""
    ended = "" if until is None else f',"until":"{until.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"'
    return f'{{"timeframe":"{timeframe}"{ended},"data_points":[{points}]'


def answer_end(start_value: Decimal | None, current_value: Decimal | None, *, simulated: bool) -> str:
    """Return the rest of the JSON text, which follows the prices.

    `current_value` is the live one, and in a range that is over the last point's. Without a first point there is
    nothing to compare with: the start, the profit and its percentage are null, because a zero would claim that nothing
    was gained.
    """
    if start_value is None or current_value is None:
        start = profit_loss = profit_loss_percent = "null"
    else:
        profit = current_value - start_value
        start, profit_loss = f"{start_value:f}", f"{profit:f}"
        profit_loss_percent = f"{money.percent(profit, abs(start_value)) + 0:f}"  # + 0: no negative zero
    current = "null" if current_value is None else f"{current_value:f}"
    return (
        f',"start_value":{start},"current_value":{current},"profit_loss":{profit_loss}'
        f',"profit_loss_percent":{profit_loss_percent}'
        f',"data_available":{_json(start_value is not None)},"simulated":{_json(simulated)}}}'
    )


def _json(value: bool) -> str:
    return "true" if value else "false"
