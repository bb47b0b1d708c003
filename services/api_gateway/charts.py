"""Finished charts, kept for as long as they are true, and read from the database once for all who ask at once.

A kept chart has two layers. Its points change when a snapshot of the user's shard is taken or the window moves on; the
whole answer changes with every price too, and with what no message tells: positions, cash, a deactivated user.
"""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import NamedTuple
from zoneinfo import ZoneInfo

from prometheus_client import Counter, Gauge
from pydantic import ValidationError

from services.api_gateway import performance, problems, queries, replica
from services.api_gateway.admission import Admission
from services.api_gateway.doubts import Doubts
from services.api_gateway.negotiation import Representation, Stem
from services.api_gateway.performance import Buckets, MarketDays, Timeframe
from services.api_gateway.queries import Source
from shared import logs
from shared.messages import (
    ALL_PRICES,
    REQUESTED_SNAPSHOT_TAKEN,
    SNAPSHOTS_TAKEN,
    SnapshotsTaken,
    SnapshotTaken,
)

SUBJECTS = (ALL_PRICES, SNAPSHOTS_TAKEN, REQUESTED_SNAPSHOT_TAKEN)
"""What `News` is to hear."""

ANSWER_SECONDS_MAX = 1.0
"""How old an answer may be: no message tells that positions or cash changed, or that a user was deactivated."""
POINTS_SECONDS_MAX = 60.0
"""How old points may be while all news are heard. They change with a snapshot alone; the bound is for what the bus does
not promise (a route between two servers that is down, an announcement that its snapshotter cannot publish yet) and for
history that is written by hand. One series a minute for each chart that is looked at costs next to nothing."""
IMMUTABLE_AGE = timedelta(hours=24)
"""A range that ended this long ago has all its snapshots: none is stored later than the longest snapshot interval."""
DIVISIONS_MAX = 16
"""Numbers of shards that are told apart; there are two when the number is being changed."""
SHARDS_MAX = 1024
REQUESTED_MAX = 4096
"""Users whose requested snapshots are told apart; what the others have kept from before is read again."""

CHARTS_MAX = 20_000
"""Kept at most, however small they are; with the users' subjects about 20 MB beside their bytes."""
CLOSED_SHARE = 4
"""A fourth of the memory is for ranges that are over: who asks for many of them displaces nobody's live chart."""
_FORMS = 3
"""The bytes of a chart are held as its points, as its answer, and at a fraction of that compressed."""
_RECORD_BYTES = 2048

_LIVE = "private, no-cache"
_IMMUTABLE = "private, max-age=31536000, immutable"

log = logs.get_logger()
hits = Counter("gateway_chart_cache_hits", "Charts found kept: the whole answer, or its points", ["layer"])
misses = Counter("gateway_chart_cache_misses", "Charts read from the database, by layer", ["layer"])
joined = Counter("gateway_chart_cache_joined", "Requests that shared the reading of another one")
evictions = Counter("gateway_chart_cache_evictions", "Charts given up for want of room")
charts_kept = Gauge("gateway_chart_cache_entries", "Charts kept")
bytes_kept = Gauge("gateway_chart_cache_bytes", "Bytes of the charts kept, estimated")
_answers_hit, _points_hit = hits.labels("answer"), hits.labels("points")
_answers_missed, _points_missed = misses.labels("answer"), misses.labels("points")


class Asked(NamedTuple):
    """Which chart."""

    subject: str
    timeframe: Timeframe
    until: datetime | None = None
    """The end of a range that is over, on the end of a bucket; None for the live chart."""


class News:
    """What the bus has told since the start, as counters: cheap to compare, and nothing of a tick is read.

    A reader takes the counters before it asks the database; what it found is good while they stay the same. Every
    message is published after its commit, so that who hears it finds its change.
    """

    def __init__(self) -> None:
        self.changes = 0
        """Grows with all that may change a live answer."""
        self.announcements = 0
        """Grows with all that may change points."""
        self.announced_at = time.monotonic()
        """When it last grew: what a source shows that lacks nothing from before is as good as what was announced."""
        self.are_complete = False
        """Every message is heard. Else only age tells whether something is still true."""
        self._forgotten_at = 0  # the announcement before which nothing is known
        self._announced: dict[int, dict[int, int]] = {}  # shards: shard: announcement
        self._requested: OrderedDict[int, int] = OrderedDict()  # user: announcement, the oldest first
        self._doubts = Doubts()

    def heard(self, subject: str, payload: bytes) -> None:
        self.changes += 1
        if subject == SNAPSHOTS_TAKEN:
            self._hear_snapshots(payload)
        elif subject == REQUESTED_SNAPSHOT_TAKEN:
            self._hear_requested(payload)

    def interrupted(self) -> None:
        self.are_complete = False
        self._forget()

    def resumed(self) -> None:
        self.are_complete = True
        self._forget()

    def has_snapshot_since(self, announcement: int, user_id: int) -> bool:
        """Tell whether snapshots of the user may have been taken since that announcement."""
        if announcement == self.announcements:
            return False
        return (
            announcement < self._forgotten_at
            or self._requested.get(user_id, 0) > announcement
            or any(
                announced.get(user_id % shards, 0) > announcement
                for shards, announced in self._announced.items()
            )
        )

    def has_requested(self, user_id: int) -> None:
        """Learn that a snapshot of one user is committed. To learn it twice is harmless."""
        self.changes += 1
        self._announce()
        self._requested[user_id] = self.announcements
        self._requested.move_to_end(user_id)
        if len(self._requested) > REQUESTED_MAX:
            _, self._forgotten_at = self._requested.popitem(last=False)

    def _hear_requested(self, payload: bytes) -> None:
        try:
            self.has_requested(SnapshotTaken.model_validate_json(payload).user_id)
        except ValidationError as error:
            self._doubts.add_malformed(REQUESTED_SNAPSHOT_TAKEN, payload, error)
            self._forget()

    def _hear_snapshots(self, payload: bytes) -> None:
        try:
            taken = SnapshotsTaken.model_validate_json(payload)
        except ValidationError as error:
            self._doubts.add_malformed(SNAPSHOTS_TAKEN, payload, error)
            self._forget()
            return
        is_division_new = taken.shards not in self._announced
        if not 0 <= taken.shard < taken.shards <= SHARDS_MAX or (
            is_division_new and len(self._announced) >= DIVISIONS_MAX
        ):
            self._doubts.add(
                SNAPSHOTS_TAKEN,
                f"shard {taken.shard} of {taken.shards}: no such shard, or one division too many",
            )
            self._forget()
            return
        self._announce()
        self._announced.setdefault(taken.shards, {})[taken.shard] = self.announcements

    def _forget(self) -> None:
        """Take everything for changed."""
        self.changes += 1
        self._announce()
        self._forgotten_at = self.announcements
        self._announced.clear()
        self._requested.clear()

    def _announce(self) -> None:
        self.announcements += 1
        self.announced_at = time.monotonic()


@dataclass(slots=True)
class _Points:
    """The points of a chart, and what is needed to know whether they are still true."""

    user_id: int
    window: Buckets | MarketDays
    read_at: datetime
    announcement: int
    stem: Stem
    first_value: Decimal | None
    last_value: Decimal | None
    simulated: bool


@dataclass(slots=True)
class _Kept:
    points: _Points
    answer: Representation
    asked_at: datetime
    good_until: datetime
    changes: int
    size: int


class _Shelf:
    """Charts up to a number of bytes; the one that was not looked at for longest makes room."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes = 0
        self.charts: OrderedDict[Asked, _Kept] = OrderedDict()
        self._bytes_max = bytes_max

    def put(self, asked: Asked, kept: _Kept) -> None:
        self.drop(asked)
        if kept.size > self._bytes_max:
            return
        self.charts[asked] = kept
        self.bytes += kept.size
        while self.bytes > self._bytes_max or len(self.charts) > CHARTS_MAX:
            _, evicted = self.charts.popitem(last=False)
            self.bytes -= evicted.size
            evictions.inc()

    def drop(self, asked: Asked) -> None:
        kept = self.charts.pop(asked, None)
        if kept is not None:
            self.bytes -= kept.size


@dataclass(slots=True)
class _Reading:
    """A chart being read for all who ask for it."""

    task: asyncio.Task[Representation]
    changes: int
    began: float


class Charts:
    """The charts of all users: kept ones, and those being read."""

    def __init__(
        self,
        database: Source,
        market_timezone: ZoneInfo,
        news: News,
        admission: Admission,
        *,
        bytes_max: int,
        reading_seconds_max: float,
    ) -> None:
        self._database = database
        self._market_timezone = market_timezone
        self._news = news
        self._admission = admission
        self._reading_seconds_max = reading_seconds_max
        self._readings: dict[Asked, _Reading] = {}
        self._closed = _Shelf(bytes_max // CLOSED_SHARE)
        self._live = _Shelf(bytes_max - bytes_max // CLOSED_SHARE)
        charts_kept.set_function(lambda: len(self._live.charts) + len(self._closed.charts))
        bytes_kept.set_function(lambda: self._live.bytes + self._closed.bytes)

    async def close(self) -> None:
        """End what is being read."""
        tasks = [reading.task for reading in self._readings.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self, user_id: int) -> None:
        """Read a user's points again: a snapshot of his is committed, whether the bus has told of it or not."""
        self._news.has_requested(user_id)

    def asked(self, subject: str, timeframe: Timeframe, until: datetime | None) -> Asked:
        """Return which chart is asked for; the ranges that end in the same bucket are one."""
        if until is None:
            return Asked(subject, timeframe)
        window = performance.buckets_until(timeframe, until, self._market_timezone)
        return Asked(subject, timeframe, performance.end(window, self._market_timezone))

    def kept(self, asked: Asked, now: datetime) -> Representation | None:
        """Return the answer if it is kept and true at `now`. What every request comes through: a few lookups."""
        shelf = self._live if asked.until is None else self._closed
        kept = shelf.charts.get(asked)
        if kept is None or kept.changes != self._changes(asked) or not kept.asked_at <= now < kept.good_until:
            return None
        shelf.charts.move_to_end(asked)
        _answers_hit.inc()
        return kept.answer

    async def answer(self, asked: Asked, now: datetime) -> Representation:
        """Return the answer as it is at `now`, kept or read; raises Problem for a user who has none.

        All who ask at once share one reading, and its failure. It goes on when one of them goes away, and has an end:
        TimeoutError. Who has heard news since it began waits for the next one: there are never two of one chart.
        """
        changes, arrived = self._changes(asked), asyncio.get_running_loop().time()
        while True:
            kept = self.kept(asked, now)
            if kept is not None:
                return kept
            reading = self._readings.get(asked)
            if reading is None:
                return await asyncio.shield(self._begin(asked, now).task)
            if reading.changes >= changes and arrived - reading.began < ANSWER_SECONDS_MAX:
                joined.inc()
                return await asyncio.shield(reading.task)
            await asyncio.wait({reading.task})

    def _changes(self, asked: Asked) -> int:
        """Return the counter of what changes this chart: no price changes one that is over."""
        return self._news.changes if asked.until is None else self._news.announcements

    def _begin(self, asked: Asked, now: datetime) -> _Reading:
        place = self._admission.place()
        _answers_missed.inc()
        task = asyncio.create_task(self._read_in_time(asked, now))
        reading = _Reading(task, self._changes(asked), asyncio.get_running_loop().time())
        self._readings[asked] = reading

        def end(_: asyncio.Task[Representation]) -> None:  # before any who waits goes on
            del self._readings[asked]
            place.leave(None if task.cancelled() else task.exception())

        task.add_done_callback(end)
        return reading

    async def _read_in_time(self, asked: Asked, now: datetime) -> Representation:
        async with asyncio.timeout(self._reading_seconds_max):
            return await self._read(asked, now)

    async def _read(self, asked: Asked, now: datetime) -> Representation:
        """Read what is not kept any more, and keep the answer."""
        # The counters before the database is asked: what is heard from here on may be missing.
        changes, announcement = self._changes(asked), self._news.announcements
        shelf = self._live if asked.until is None else self._closed
        if asked.until is None:
            window = performance.buckets(asked.timeframe, now, self._market_timezone)
        else:
            window = performance.buckets_until(asked.timeframe, asked.until, self._market_timezone)
        kept = shelf.charts.get(asked)
        points = kept.points if kept is not None and self._are_true(kept.points, window, now) else None
        live = await queries.live_value(self._database, asked.subject) if points is not None else None
        if points is not None and live is not None and live.user_id == points.user_id:
            _points_hit.inc()
        else:
            _points_missed.inc()
            source = replica.showing(self._database, self._moment_to_show(asked, now))
            found = await queries.chart(source, asked.subject, window, self._market_timezone.key)
            if found is None:
                shelf.drop(asked)
                raise problems.user_unknown()
            live, series = found
            beginning = performance.answer_beginning(asked.timeframe, series.points, until=asked.until)
            points = _Points(
                live.user_id,
                window,
                now,
                announcement,
                Stem(beginning.encode()),
                series.first_value,
                performance.last_value(series.points),
                series.simulated,
            )
        if not live.is_active:
            shelf.drop(asked)
            raise problems.user_deactivated()
        answer, good_until = self._finished(asked, points, live, now)
        size = len(asked.subject) + _FORMS * len(answer.body) + _RECORD_BYTES
        shelf.put(asked, _Kept(points, answer, now, good_until, changes, size))
        return answer

    def _are_true(self, points: _Points, window: Buckets | MarketDays, now: datetime) -> bool:
        seconds_max = POINTS_SECONDS_MAX if self._news.are_complete else ANSWER_SECONDS_MAX
        return (
            points.window == window
            and timedelta(0) <= now - points.read_at < timedelta(seconds=seconds_max)
            and not self._news.has_snapshot_since(points.announcement, points.user_id)
        )

    def _moment_to_show(self, asked: Asked, now: datetime) -> float:
        """Return the instant, in monotonic seconds, of which all that is committed must be in the points."""
        if asked.until is None:
            return self._news.announced_at
        settled_seconds = (now - asked.until - IMMUTABLE_AGE).total_seconds()  # since they change no more
        return max(self._news.announced_at, time.monotonic() - max(settled_seconds, 0))

    def _finished(
        self, asked: Asked, points: _Points, live: queries.LiveValue, now: datetime
    ) -> tuple[Representation, datetime]:
        """Return the answer, and until when it is good if nothing is heard."""
        good_until = now + timedelta(seconds=ANSWER_SECONDS_MAX)
        if asked.until is None:
            simulated = live.simulated or points.simulated
            end = performance.answer_end(points.first_value, live.total_value, simulated=simulated)
            good_until = min(good_until, performance.end(points.window, self._market_timezone))
            cache_control = _LIVE
        else:
            end = performance.answer_end(points.first_value, points.last_value, simulated=points.simulated)
            is_immutable = points.read_at - asked.until >= IMMUTABLE_AGE
            cache_control = _IMMUTABLE if is_immutable else _LIVE
        return Representation(points.stem, end.encode(), cache_control=cache_control), good_until
