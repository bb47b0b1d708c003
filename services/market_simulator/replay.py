"""A recorded market: one-minute bars read from a file once, kept as arrays.

At an instant a minute's bar is known when the minute has ended; the latest trade is the close of the last known bar,
stamped with the last nanosecond of its minute. The file has neither trade counts nor average prices: a bar's count is
that of its recorded minutes, its average that of (high + low + close) / 3 weighted with the volume.
"""

import csv
import gzip
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path

from services.market_simulator.instants import MINUTE_NS, ns_of_text
from services.market_simulator.market import Bar, Trade

COLUMNS = ("timestamp", "symbol", "open", "high", "low", "close", "volume")

_PRICE_PLACES = 9
_VOLUME_PLACES = 6
_PRICE_MAX = Decimal(9 * 10**9)
_VOLUME_MAX = Decimal(9 * 10**12)
_GZIP_MAGIC = b"\x1f\x8b"


class ReplayFileError(Exception):
    """The file cannot be replayed; the text says which line and why."""


class _Series:
    """A symbol's minutes, ascending; prices and volumes are scaled whole numbers."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.opens = array("q")
        self.highs = array("q")
        self.lows = array("q")
        self.closes = array("q")
        self.volumes = array("q")


class ReplayMarket:
    """The minutes of a file, as a market. `first_ns` is the first bar's start, `end_ns` the last one's end."""

    name = "replay"

    def __init__(self, series: dict[str, _Series]) -> None:
        self._series = series
        self._symbols = tuple(sorted(series))
        self.first_ns = min(one.starts[0] for one in series.values())
        self.end_ns = max(one.starts[-1] for one in series.values()) + MINUTE_NS

    @property
    def symbols(self) -> tuple[str, ...]:
        return self._symbols

    def latest_trade(self, symbol: str, at_ns: int) -> Trade | None:
        series = self._series.get(symbol)
        if series is None:
            return None
        known = bisect_left(series.starts, at_ns - MINUTE_NS + 1)
        if known == 0:
            return None
        last = known - 1
        return Trade(
            at_ns=series.starts[last] + MINUTE_NS - 1,
            price=_unscaled(series.closes[last], _PRICE_PLACES),
            size=_unscaled(series.volumes[last], _VOLUME_PLACES),
            id=known,
            exchange="V",
        )

    def next_trade_ns(self, symbol: str, after_ns: int) -> int | None:
        series = self._series.get(symbol)
        if series is None:
            return None
        following = bisect_left(series.starts, after_ns - MINUTE_NS + 1)
        return series.starts[following] + MINUTE_NS if following < len(series.starts) else None

    def next_minute(self, symbol: str, at_ns: int) -> int | None:
        series = self._series.get(symbol)
        if series is None:
            return None
        index = bisect_left(series.starts, at_ns)
        return series.starts[index] if index < len(series.starts) else None

    def previous_minute(self, symbol: str, before_ns: int) -> int | None:
        series = self._series.get(symbol)
        if series is None:
            return None
        index = bisect_left(series.starts, before_ns)
        return series.starts[index - 1] if index else None

    def bar(self, symbol: str, start_ns: int, end_ns: int) -> Bar | None:
        series = self._series.get(symbol)
        if series is None:
            return None
        first = bisect_left(series.starts, start_ns)
        after = bisect_left(series.starts, end_ns - MINUTE_NS + 1)
        if after <= first:
            return None
        volumes = series.volumes[first:after]
        volume = sum(volumes)
        weighted = sum(
            (high + low + close) * weight
            for high, low, close, weight in zip(
                series.highs[first:after],
                series.lows[first:after],
                series.closes[first:after],
                volumes,
                strict=True,
            )
        )
        last = after - 1
        close = _unscaled(series.closes[last], _PRICE_PLACES)
        average = _unscaled(weighted // (3 * volume), _PRICE_PLACES) if volume else close
        return Bar(
            start_ns=start_ns,
            open=_unscaled(series.opens[first], _PRICE_PLACES),
            high=_unscaled(max(series.highs[first:after]), _PRICE_PLACES),
            low=_unscaled(min(series.lows[first:after]), _PRICE_PLACES),
            close=close,
            volume=_unscaled(volume, _VOLUME_PLACES),
            trades=after - first,
            vwap=average.quantize(Decimal("0.000001")),
        )


def read_replay(path: Path) -> ReplayMarket:
    """Read a CSV file, gzipped or not; raises ReplayFileError that names the line and what is wrong with it."""
    try:
        with path.open("rb") as file:
            opened = gzip.open if file.read(2) == _GZIP_MAGIC else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as text:
            return _read(text, path)
    except (OSError, EOFError, zlib.error) as error:
        raise ReplayFileError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _read(text: Iterable[str], path: Path) -> ReplayMarket:
    rows = csv.reader(text, strict=True)
    series: dict[str, _Series] = {}
    try:
        places = _places(next(rows, []))
        for row in rows:
            if row:
                _add(series, [row[place].strip() for place in places])
    except IndexError:
        raise ReplayFileError(f"{path}, line {rows.line_num}: fewer fields than the header has") from None
    except (ValueError, csv.Error) as error:
        raise ReplayFileError(f"{path}, line {max(1, rows.line_num)}: {error}") from None
    if not series:
        raise ReplayFileError(f"{path} has no bars")
    return ReplayMarket(series)


def _places(header: list[str]) -> list[int]:
    """Return where the columns stand in a row."""
    names = [name.strip().lower() for name in header]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; expected {','.join(COLUMNS)}")
    return [names.index(name) for name in COLUMNS]


def _add(series: dict[str, _Series], fields: list[str]) -> None:
    timestamp, symbol, *numbers, volume = fields
    if not symbol:
        raise ValueError("no symbol")
    start_ns = ns_of_text(timestamp)
    if start_ns % MINUTE_NS:
        raise ValueError(f"timestamp {timestamp} is not the start of a minute")
    prices = [
        _scaled(name, text, _PRICE_PLACES, _PRICE_MAX)
        for name, text in zip(COLUMNS[2:6], numbers, strict=True)
    ]
    if min(prices) <= 0:
        raise ValueError("a price is not above zero")
    opened, high, low, close = prices
    if not (low <= opened <= high and low <= close <= high):
        raise ValueError("open and close are not between low and high")
    one = series.setdefault(symbol, _Series())
    if one.starts and start_ns <= one.starts[-1]:
        raise ValueError(f"timestamp {timestamp} is not after the bar of {symbol} before it")
    one.starts.append(start_ns)
    one.opens.append(opened)
    one.highs.append(high)
    one.lows.append(low)
    one.closes.append(close)
    one.volumes.append(_scaled("volume", volume, _VOLUME_PLACES, _VOLUME_MAX))


def _scaled(name: str, text: str, places: int, value_max: Decimal) -> int:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{name} {text!r} is not a number") from None
    if not value.is_finite() or not 0 <= value <= value_max:
        raise ValueError(f"{name} {text} is not between 0 and {value_max}")
    scaled = value.scaleb(places)
    if scaled != scaled.to_integral_value():
        raise ValueError(f"{name} {text} has more than {places} decimals")
    return int(scaled)


def _unscaled(value: int, places: int) -> Decimal:
    return Decimal(value).scaleb(-places).normalize()
