"""How often prices are asked for: on every interval while their market is open, seldom while it is not. Pure."""

from collections.abc import Iterable
from datetime import datetime, timedelta

from shared.market_hours import MarketHours, is_session_bound

BEFORE_OPEN = timedelta(minutes=5)
AFTER_CLOSE = timedelta(minutes=15)
"""The last trades of a session are reported late, and the feed that lags fifteen minutes has them then."""


class Pace:
    """When symbols whose market is closed are due again; all others are due in every round."""

    def __init__(self, feed: str, closed_interval: timedelta) -> None:
        self.feed = feed
        """Where equity prices come from; the first answers may say that it is a simulated market."""
        self._closed_interval = closed_interval
        self._began_at: datetime | None = None
        self._answered: frozenset[str] = frozenset()

    def is_bound(self, symbol: str) -> bool:
        """Tell whether a symbol has prices during sessions only."""
        return is_session_bound(symbol, self.feed)

    def due(self, held: Iterable[str], hours: MarketHours, at: datetime) -> list[str]:
        """Return which of the held symbols to ask for now, in their order."""
        if self._is_due_for_all(hours, at):
            return list(held)
        # What somebody has begun to hold since, or nobody has answered, is asked for at once.
        return [symbol for symbol in held if symbol not in self._answered or not self.is_bound(symbol)]

    def note_answered(self, symbols: Iterable[str], hours: MarketHours, at: datetime) -> None:
        """Note for which symbols an answer came to the round that began at `at`; only those may rest."""
        answered = frozenset(symbols)
        if not self._is_due_for_all(hours, at):
            self._answered |= answered
        elif answered:
            self._began_at, self._answered = at, answered

    def _is_due_for_all(self, hours: MarketHours, at: datetime) -> bool:
        began_at = self._began_at
        rested = began_at is None or not timedelta(0) <= at - began_at < self._closed_interval
        return rested or hours.is_near_session(at, before=BEFORE_OPEN, after=AFTER_CLOSE)
