"""Timeframes of bars, as Alpaca writes them (`1Min`, `4Hour`, `1Day`, `1Week`, `3Month`), and their boundaries."""

import re
from dataclasses import dataclass
from datetime import date, timedelta, tzinfo

from services.market_simulator.instants import MINUTE_NS, datetime_of, local_midnight_ns

_TEXT = re.compile(r"([1-9]\d?)(Min|T|Hour|H|Day|D|Week|W|Month|M)")
_UNITS = {"T": "Min", "H": "Hour", "D": "Day", "W": "Week", "M": "Month"}
_AMOUNTS = {
    "Min": range(1, 60),
    "Hour": range(1, 24),
    "Day": (1,),
    "Week": (1,),
    "Month": (1, 2, 3, 4, 6, 12),
}


@dataclass(frozen=True, slots=True)
class Timeframe:
    amount: int
    unit: str

    def bounds(self, at_ns: int, zone: tzinfo) -> tuple[int, int]:
        """Return start and end of the bar that holds an instant.

        Minutes and hours count from the epoch; days, weeks (from Monday) and months begin at the zone's midnight.
        """
        if self.unit in {"Min", "Hour"}:
            width = self.amount * (MINUTE_NS if self.unit == "Min" else 60 * MINUTE_NS)
            start_ns = at_ns // width * width
            return start_ns, start_ns + width
        first, after = self._days(datetime_of(at_ns).astimezone(zone).date())
        return local_midnight_ns(first, zone), local_midnight_ns(after, zone)

    def _days(self, day: date) -> tuple[date, date]:
        if self.unit == "Day":
            return day, day + timedelta(days=1)
        if self.unit == "Week":
            monday = day - timedelta(days=day.weekday())
            return monday, monday + timedelta(days=7)
        first = day.replace(month=(day.month - 1) // self.amount * self.amount + 1, day=1)
        year, month = divmod(first.year * 12 + first.month - 1 + self.amount, 12)
        return first, date(year, month + 1, 1)


MINUTE = Timeframe(1, "Min")
DAY = Timeframe(1, "Day")


def timeframe_of(text: str) -> Timeframe:
    """Read a timeframe; raises ValueError for one that Alpaca does not have."""
    match = _TEXT.fullmatch(text)
    if match:
        amount, unit = int(match[1]), _UNITS.get(match[2], match[2])
        if amount in _AMOUNTS[unit]:
            return Timeframe(amount, unit)
    raise ValueError(f"invalid timeframe: {text}")
