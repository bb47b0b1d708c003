"""What an operator sees of the term that runs, in `/readyz`; of a standby nothing but that it is one.

None of it makes the feeder unready: old prices stay in use, polling goes on without streams, and prices are stored
without NATS. What it cannot do without, PostgreSQL above all, has checks of its own.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from services.price_feeder import metrics
from services.price_feeder.feed import Feed
from shared.health import Check, Degraded
from shared.messages import FeedState


class Signals:
    """The checks of the term that runs, if one does."""

    def __init__(self) -> None:
        self._feed: Feed | None = None

    @asynccontextmanager
    async def of(self, feed: Feed) -> AsyncIterator[None]:
        """Speak of this term while the block runs."""
        self._feed = feed
        try:
            yield
        finally:
            self._feed = None
            metrics.end_term()

    @property
    def checks(self) -> Mapping[str, Check]:
        return {
            "prices": self.prices,
            "rounds": self.rounds,
            "budget": self.budget,
            "streams": self.streams,
            "publishing": self.publishing,
        }

    async def prices(self) -> str | None:
        """Say since when no price was confirmed, if that is too long ago."""
        status = self._feed and self._feed.outbox.status
        if not self._feed or not status or status.state is not FeedState.STALE:
            return None
        at = self._feed.confirmed_at
        since = f"since {at:%Y-%m-%dT%H:%M:%SZ}" if at else "so far"
        return Degraded(f"none confirmed {since}: {self._feed.problem or status.detail}")

    async def rounds(self) -> str | None:
        """Say why the last round did not bring all prices."""
        return Degraded(self._feed.problem) if self._feed and self._feed.problem else None

    async def budget(self) -> str | None:
        """Say that the budget does not suffice for all symbols."""
        problem = self._feed and self._feed.budget_problem
        return Degraded(problem) if problem else None

    async def streams(self) -> str | None:
        """Say which streams have a problem; while one connects for the first time it has none."""
        streaming = self._feed and self._feed.streaming
        problems = streaming.problems if streaming else {}
        words = "; ".join(f"{name} {problem}" for name, problem in problems.items())
        return Degraded(f"{words}; polling goes on") if words else None

    async def publishing(self) -> str | None:
        """Say that NATS does not take what is to be published."""
        outbox = self._feed and self._feed.outbox
        if not outbox or not outbox.problem:
            return None
        return Degraded(f"NATS does not take prices, {len(outbox)} wait: {outbox.problem}")
