"""The chart's arithmetic: which buckets a timeframe has, and what changed between its start and now. Pure."""

from dataclasses import dataclass
from datetime import date, datetime, timedelta
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


def answer(
    timeframe: Timeframe, points: str, start_value: Decimal | None, current_value: Decimal, *, simulated: bool
) -> str:
    """Return the JSON text of the answer; `points` are JSON objects with commas between.

    Without a first point there is nothing to compare with: the start, the profit and its percentage are null,
    because a zero would claim that nothing was gained.
    """
    if start_value is None:
        start = profit_loss = profit_loss_percent = "null"
    else:
        profit = current_value - start_value
        start, profit_loss = f"{start_value:f}", f"{profit:f}"
        profit_loss_percent = f"{money.percent(profit, abs(start_value)) + 0:f}"  # + 0: no negative zero
    return (
        f'{{"timeframe":"{timeframe}","data_points":[{points}],"start_value":{start}'
        f',"current_value":{current_value:f},"profit_loss":{profit_loss}'
        f',"profit_loss_percent":{profit_loss_percent}'
        f',"data_available":{_json(start_value is not None)},"simulated":{_json(simulated)}}}'
    )


def _json(value: bool) -> str:
    return "true" if value else "false"
