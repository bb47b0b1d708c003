"""What the feeder says of its rounds: each problem when it begins and when it is over, not in every round."""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import islice

from services.price_feeder import metrics
from services.price_feeder.budget import WINDOW_SECONDS
from services.price_feeder.trades import Rejection
from shared import logs

LOUD_EVERY = timedelta(minutes=5)
BUDGET_SUFFICES_AFTER = timedelta(seconds=WINDOW_SECONDS)
"""A budget that is spent is so in a part of each minute only."""
REJECTED_SHOWN_MAX = 20

log = logs.get_logger()


class Reports:
    """What was said last, so that the same is not said again."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._said_loudly_at: datetime | None = None
        self._rejected: Mapping[str, Rejection] = {}
        self._spent_at: datetime | None = None
        self.budget_problem: str | None = None
        """That the budget does not suffice, in words, until it has sufficed for a minute."""

    def say_problem(self, problem: str | None, *, advice: str = "", loud: bool = False, at: datetime) -> None:
        """Log a problem when it begins and when it is over; one that someone must see to, again and again."""
        changed = problem != self._problem
        if loud and (changed or self._said_loudly_at is None or at - self._said_loudly_at >= LOUD_EVERY):
            log.error("market_data_unauthorized", problem=problem, advice=advice)
            self._said_loudly_at = at
        elif changed and problem and not loud:
            log.warning("prices_not_updated", problem=problem, advice=advice)
        elif changed and not problem:
            log.info("prices_recovered")
        self._problem = problem

    def say_budget(self, beyond: int, at: datetime) -> None:
        """Log that the budget does not suffice for so many symbols of a round, when that begins and is over."""
        if beyond:
            if self.budget_problem is None:
                log.warning(
                    "request_budget_spent",
                    symbols=beyond,
                    advice="prices come in turns; with a larger plan raise ALPACA_REQUESTS_PER_MINUTE, else"
                    " PRICE_UPDATE_INTERVAL_SECONDS",
                )
            self.budget_problem = f"spent: {beyond} symbols wait for the next round"
            self._spent_at = at
        elif self._spent_at is not None and at - self._spent_at >= BUDGET_SUFFICES_AFTER:
            self.budget_problem = self._spent_at = None
            log.info("request_budget_suffices")

    def say_rejected(self, rejected: Mapping[str, Rejection]) -> None:
        """Count rejections, and log them when they are others than in the last round."""
        for reason, count in Counter(rejected.values()).items():
            metrics.REJECTED.labels(reason).inc(count)
        odd = {
            symbol: reason for symbol, reason in rejected.items() if reason is not Rejection.OUTSIDE_SESSION
        }
        if odd != self._rejected:
            shown = dict(islice(sorted(odd.items()), REJECTED_SHOWN_MAX))
            log.warning(
                "symbols_rejected",
                count=len(odd),
                reasons=shown,
                advice="their old prices stay: correct tickers that Alpaca does not know; see to garbage if it lasts",
            )
        self._rejected = odd
