"""Whether JetStream stores what it is told.

A server whose disk is full says nothing: publishing times out, and everything else goes on as if all were well.
"""

import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

from shared import bus_metrics, logs
from shared.messages import PROBES, STREAMS
from shared.publishing import LATE, LOST, NO_STREAM, Outgoing

ADVICE = (
    "make room where nats-server keeps its streams, then restart it if its /healthz stays 503: after a failed write it "
    "does not write again by itself"
)
NO_LEADER_ADVICE = "no server leads the stream: see that most of the cluster's servers run"
FORBIDDEN = "the user in NATS_URL may not publish there"
FORBIDDEN_ADVICE = (
    "allow the user in NATS_URL to publish to the stream's subjects: see the server's authorization"
)
FULL = "10077"
"""The error of a stream that has reached its own bound: what it refuses says nothing of the server."""
DOUBTFUL_SECONDS = 20.0
"""Who is not acknowledged tries again far sooner, as long as he has something to publish."""
SUBJECTS_REMEMBERED_MAX = 10_000

log = logs.get_logger()


class Storing:
    """Which streams do not acknowledge: from the first message that is not acknowledged to the next one that is.

    Who publishes no more, as a feeder that has lost its lease, would wait for that one for ever. So what failed more
    than DOUBTFUL_SECONDS ago is over, too, once a probe is stored: all streams were found just before, with a leader.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._silent: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}

    @property
    def problem(self) -> str | None:
        """Return in words what is not acknowledged; None while all is."""
        if not self._silent:
            return None
        streams = ", ".join(sorted(self._silent))
        return f"JetStream does not store what is published to {streams}: {next(iter(self._silent.values()))}"

    def note(self, batch: Iterable[Outgoing], failed: Iterable[tuple[Outgoing, str]]) -> None:
        """Learn what became of a batch."""
        problems: dict[str, str] = {}
        for outgoing, reason in failed:
            stream, why = stream_of(outgoing.subject), _why(reason)
            if why == "silent" or (why == "refused" and FULL not in reason):
                problems.setdefault(stream, reason)
            else:  # it says nothing of whether the server can store
                problems.setdefault(stream, "")
        for stream in {stream_of(outgoing.subject) for outgoing in batch}:
            self._set(stream, problems.get(stream))
            if stream == PROBES.name and stream not in problems:
                self._end_doubts()

    def _end_doubts(self) -> None:
        now = self._clock()
        for stream in tuple(self._silent):
            if now - self._failed_at[stream] > DOUBTFUL_SECONDS:
                self._set(stream, None)

    def forget(self) -> None:
        """Begin anew, as it is another server, or the same one after a restart."""
        for stream in tuple(self._silent):
            self._set(stream, None)

    def _set(self, stream: str, problem: str | None) -> None:
        if problem == "":
            return
        if problem is None:
            bus_metrics.storing.labels(stream).set(1)
            if self._silent.pop(stream, None):
                log.info("bus_stores_again", stream=stream)
            return
        bus_metrics.storing.labels(stream).set(0)
        if stream not in self._silent:
            advice = {NO_STREAM: NO_LEADER_ADVICE, FORBIDDEN: FORBIDDEN_ADVICE}.get(problem, ADVICE)
            log.warning("bus_does_not_store", stream=stream, reason=problem, advice=advice)
        self._silent[stream] = problem
        self._failed_at[stream] = self._clock()


def count_unacknowledged(failed: Iterable[tuple[Outgoing, str]], *, lost: bool = False) -> None:
    """Count what was not acknowledged; `lost` says that there was no connection to begin with."""
    for outgoing, reason in failed:
        why = "lost" if lost else _why(reason)
        bus_metrics.unacknowledged.labels(stream_of(outgoing.subject), why).inc()


@lru_cache(maxsize=SUBJECTS_REMEMBERED_MAX)
def stream_of(subject: str) -> str:
    """Return the name of the stream that keeps a subject; `none` when none does."""
    for stream in STREAMS:
        if any(fnmatchcase(subject, pattern.replace(">", "*")) for pattern in stream.subjects):
            return stream.name
    return "none"


def _why(reason: str) -> str:
    if reason in (LATE, NO_STREAM):
        return "silent"
    return "lost" if reason == LOST else "refused"
