"""A synthetic market: seeded random walks with random access. Pure, and the same on every machine and in every run.

The logarithm of a price is a mean-reverting walk over days, fixed to the listed price on the anchor day, with a
Brownian bridge through each day: the middle of a stretch of time is the mean of its ends plus noise that shrinks
with the stretch. Each day has 32**3 slots of 2.6 s with one trade in each, so a price is found from the two ends of
its day by three digests of (seed, symbol, day, stretch), whatever was asked before. Noise is bounded, so how far a
stretch can leave its ends is known: highs and lows are exact without visiting every trade.

It trades around the clock, weekends and holidays included.
"""

import math
import struct
from array import array
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate

from services.market_simulator.instants import DAY_NS, MINUTE_NS, ns_of
from services.market_simulator.listings import LISTINGS
from services.market_simulator.market import Bar, Trade

SLOTS_PER_DAY = 32**3
SLOT_NS = DAY_NS // SLOTS_PER_DAY
assert SLOT_NS * SLOTS_PER_DAY == DAY_NS

_UNIX_DAY = date(1970, 1, 1).toordinal()
ANCHOR_DAY = date(2026, 1, 1).toordinal() - _UNIX_DAY
"""On this day every symbol has about its listed price."""
FIRST_DAY = date(2000, 1, 1).toordinal() - _UNIX_DAY
FIRST_NS = FIRST_DAY * DAY_NS

_YEAR_DAYS = 365.25
_DRIFT_PER_DAY = math.log(1.07) / _YEAR_DAYS
_REVERSION = math.exp(-math.log(2) / _YEAR_DAYS)  # half of a deviation is gone after a year
_CENTRE = 127.5
_UNIFORM = math.sqrt(12) / 256  # a byte, centred and times this, has variance one and never exceeds √3
_SHRINK = math.sqrt(0.5)
_LENGTH_ROOT = tuple(math.sqrt(32.0**-depth) for depth in range(3))
_REACH = math.sqrt(3) / 2 / (1 - _SHRINK)  # a stretch of length 1 leaves the line between its ends by no more
_STRETCHES_KEPT_MAX = 8192

_stretch = struct.Struct("<bqq").pack
_JITTER = 0x9E3779B97F4A7C15
_EXCHANGES = "VQNPZKJY"
_LOTS = (1, 1, 2, 1, 3, 1, 1, 5, 1, 2, 1, 4, 1, 1, 8, 2)
_LOTS_BEFORE = (0, *accumulate(_LOTS))


class _Walk:
    """One symbol's path: day levels as far as they were asked for, and what its digests start with."""

    def __init__(self, seed: int, symbol: str) -> None:
        listing = LISTINGS[symbol]
        self.prefix = blake2b(f"{seed}/{symbol}".encode(), digest_size=16).digest()
        self.key = int.from_bytes(self.prefix[:8], "little")
        self.volatility = listing.volatility / math.sqrt(_YEAR_DAYS)
        self.lot = listing.lot
        self._anchor_level = math.log(listing.price)
        self._after = array("d", [0.0])  # deviations of the days from the anchor on
        self._before = array("d", [0.0])  # and from the anchor back

    def noise(self, depth: int, day: int, index: int) -> bytes:
        """Return the 32 random bytes of one stretch of a day."""
        return blake2b(self.prefix + _stretch(depth, day, index), digest_size=32).digest()

    def level(self, day: int) -> float:
        """Return the logarithm of the price at the start of a day."""
        steps = day - ANCHOR_DAY
        deviations, direction = (self._after, 1) if steps >= 0 else (self._before, -1)
        distance = abs(steps)
        while len(deviations) <= distance:
            for byte in self.noise(-1, direction, len(deviations)):
                step = self.volatility * _UNIFORM * (byte - _CENTRE)
                deviations.append(deviations[-1] * _REVERSION + step)
        return self._anchor_level + _DRIFT_PER_DAY * steps + deviations[distance]


class SyntheticMarket:
    """Deterministic in (seed, symbol, instant) from 2000 on."""

    name = "synthetic"

    def __init__(self, seed: int) -> None:
        self._walks = {symbol: _Walk(seed, symbol) for symbol in LISTINGS}
        self._symbols = tuple(sorted(LISTINGS))

        def noise(symbol: str, depth: int, day: int, index: int) -> bytes:
            return self._walks[symbol].noise(depth, day, index)

        self._noise = lru_cache(maxsize=_STRETCHES_KEPT_MAX)(noise)

    @property
    def symbols(self) -> tuple[str, ...]:
        return self._symbols

    def price(self, symbol: str, at: datetime) -> Decimal:
        """Return the price of the last trade at an instant, to the cent.

        Raises KeyError for an unknown symbol, ValueError for an instant before 2000.
        """
        at_ns = ns_of(at)
        if at_ns < FIRST_NS + SLOT_NS:
            raise ValueError(f"the synthetic market begins in 2000, {at.astimezone(UTC)} is before it")
        walk = self._walks[symbol]
        return _dollars(self._level(symbol, walk, _last_slot(walk, at_ns)))

    def latest_trade(self, symbol: str, at_ns: int) -> Trade | None:
        walk = self._walks.get(symbol)
        if walk is None or at_ns < FIRST_NS + SLOT_NS:
            return None
        slot = _last_slot(walk, at_ns)
        return Trade(
            at_ns=_trade_ns(walk, slot),
            price=_dollars(self._level(symbol, walk, slot)),
            size=walk.lot * _LOTS[slot % len(_LOTS)],
            id=slot,
            exchange=_EXCHANGES[(slot * _JITTER >> 32) % len(_EXCHANGES)],
            conditions=("@", "F") if slot % 5 == 0 else ("@",),
        )

    def next_trade_ns(self, symbol: str, after_ns: int) -> int | None:
        walk = self._walks.get(symbol)
        return (
            None if walk is None else _trade_ns(walk, _last_slot(walk, max(after_ns, FIRST_NS + SLOT_NS)) + 1)
        )

    def next_minute(self, symbol: str, at_ns: int) -> int | None:
        return max(-(-at_ns // MINUTE_NS) * MINUTE_NS, FIRST_NS) if symbol in self._walks else None

    def previous_minute(self, symbol: str, before_ns: int) -> int | None:
        minute = (before_ns - 1) // MINUTE_NS * MINUTE_NS
        return minute if symbol in self._walks and minute >= FIRST_NS else None

    def bar(self, symbol: str, start_ns: int, end_ns: int) -> Bar | None:
        walk = self._walks.get(symbol)
        first_ns = max(start_ns, FIRST_NS)
        if walk is None or end_ns <= first_ns:
            return None
        first = _last_slot(walk, first_ns - 1) + 1
        last = _last_slot(walk, end_ns - 1)
        opened, closed = self._level(symbol, walk, first), self._level(symbol, walk, last)
        extremes = _Extremes(low=min(opened, closed), high=max(opened, closed))
        for day in range(first // SLOTS_PER_DAY, last // SLOTS_PER_DAY + 1):
            self._widen(extremes, symbol, day, range(first, last + 1))
        high, low, close = _dollars(extremes.high), _dollars(extremes.low), _dollars(closed)
        return Bar(
            start_ns=start_ns,
            open=_dollars(opened),
            high=high,
            low=low,
            close=close,
            volume=walk.lot * (_lots_before(last + 1) - _lots_before(first)),
            trades=last + 1 - first,
            vwap=((high + low + close) / 3).quantize(Decimal("0.0001")),
        )

    def _level(self, symbol: str, walk: _Walk, slot: int) -> float:
        """Return the logarithm of the price of a slot's trade."""
        day, within = divmod(slot, SLOTS_PER_DAY)
        left, right = walk.level(day), walk.level(day + 1)
        scale = walk.volatility * _UNIFORM / 2
        shift = 15
        for depth in range(3):
            rest = within & ((1 << shift) - 1)
            if rest == 0:
                break
            # The upper stretches are shared by many instants, the lowest by hardly any.
            index = within >> shift
            noise = self._noise(symbol, depth, day, index) if depth < 2 else walk.noise(depth, day, index)
            shift -= 5
            digit = rest >> shift
            node = 1
            for bit in (16, 8, 4, 2, 1):
                middle = (left + right) * 0.5 + scale * (noise[node] - _CENTRE)
                if digit & bit:
                    left, node = middle, node + node + 1
                else:
                    right, node = middle, node + node
                scale *= _SHRINK
        return left

    def _widen(self, extremes: "_Extremes", symbol: str, day: int, slots: range) -> None:
        """Widen the extremes to a day's trades in some slots, entering only stretches that can matter."""
        walk = self._walks[symbol]
        parents = [(0, [walk.level(day), walk.level(day + 1)], range(1))]
        for depth in range(3):
            spread = walk.volatility * _LENGTH_ROOT[depth]
            reach, scale = _REACH * spread, spread * _UNIFORM / 2
            width = 32 ** (2 - depth)
            entered = []
            for parent, ends, children in parents:
                if not extremes.can_widen(max(ends) + reach, min(ends) - reach):
                    continue
                for child in children:
                    left, right = ends[child], ends[child + 1]
                    if not extremes.can_widen(max(left, right) + reach, min(left, right) - reach):
                        continue
                    index = parent * 32 + child
                    noise = (
                        self._noise(symbol, depth, day, index) if depth < 2 else walk.noise(depth, day, index)
                    )
                    points = _points(left, right, noise, scale)
                    base = day * SLOTS_PER_DAY + index * 32 * width
                    begin = max(0, (slots.start - base) // width)
                    end = min(32, -((base - slots.stop) // width))
                    # The trade at the begin of the first child may be before the first slot.
                    inside = points[begin + (base + begin * width < slots.start) : end]
                    if inside:
                        extremes.include(min(inside), max(inside))
                    entered.append((index, points, range(begin, end)))
            parents = entered


class _Extremes:
    __slots__ = ("high", "low")

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        self.high = high

    def can_widen(self, high: float, low: float) -> bool:
        """Tell whether values up to these bounds could be new extremes."""
        return high > self.high or low < self.low

    def include(self, low: float, high: float) -> None:
        self.low = min(self.low, low)
        self.high = max(self.high, high)


def _points(left: float, right: float, noise: bytes, scale: float) -> list[float]:
    """Return the 33 points that divide a stretch, its ends among them."""
    points = [left] * 32 + [right]
    node = 1
    for half in (16, 8, 4, 2, 1):
        for middle in range(half, 32, 2 * half):
            ends = points[middle - half] + points[middle + half]
            points[middle] = ends * 0.5 + scale * (noise[node] - _CENTRE)
            node += 1
        scale *= _SHRINK
    return points


def _trade_ns(walk: _Walk, slot: int) -> int:
    """Return when a slot's trade happens: somewhere within the slot."""
    return slot * SLOT_NS + ((slot * _JITTER ^ walk.key) & 0xFFFFFFFFFFFFFFFF) * SLOT_NS // 2**64


def _last_slot(walk: _Walk, at_ns: int) -> int:
    """Return the last slot whose trade is not after an instant."""
    slot = at_ns // SLOT_NS
    return slot if _trade_ns(walk, slot) <= at_ns else slot - 1


def _lots_before(slot: int) -> int:
    """Return the lots of all trades before a slot."""
    rounds, rest = divmod(slot, len(_LOTS))
    return rounds * _LOTS_BEFORE[-1] + _LOTS_BEFORE[rest]


def _dollars(level: float) -> Decimal:
    return Decimal(max(1, round(math.exp(level) * 100))).scaleb(-2)
