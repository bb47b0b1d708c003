"""What the feeder says of its rounds: each problem when it begins and when it is over, not in every round."""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import islice

from services.price_feeder import metrics
from services.price_feeder.trades import Rejection
from shared import logs

LOUD_EVERY = timedelta(minutes=5)
REJECTED_SHOWN_MAX = 20

log = logs.get_logger()


class Reports:
    """What was said last, so that the same is not said again."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._said_loudly_at: datetime | None = None
        self._rejected: Mapping[str, Rejection] = {}

    def say_problem(self, problem: str | None, *, loud: bool, at: datetime) -> None:
        """Log a problem when it begins and when it is over; one that someone must see to, again and again."""
        changed = problem != self._problem
        if loud and (changed or self._said_loudly_at is None or at - self._said_loudly_at >= LOUD_EVERY):
            log.error("market_data_unauthorized", problem=problem)
            self._said_loudly_at = at
        elif changed and problem and not loud:
            log.warning("prices_not_updated", problem=problem)
        elif changed and not problem:
            log.info("prices_recovered")
        self._problem = problem

    def say_rejected(self, rejected: Mapping[str, Rejection]) -> None:
        """Count rejections, and log them when they are others than in the last round."""
        for reason, count in Counter(rejected.values()).items():
            metrics.REJECTED.labels(reason).inc(count)
        odd = {
            symbol: reason for symbol, reason in rejected.items() if reason is not Rejection.OUTSIDE_SESSION
        }
        if odd != self._rejected:
            shown = dict(islice(sorted(odd.items()), REJECTED_SHOWN_MAX))
            log.warning("symbols_rejected", count=len(odd), reasons=shown)
        self._rejected = odd
