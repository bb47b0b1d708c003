"""Why a request to Alpaca brought no prices. Each text is one line that stays the same while the cause does."""

from datetime import datetime


class MarketDataError(Exception):
    """A request brought no prices."""

    outcome = "unavailable"
    """How the request is counted."""
    advice = "it is tried in every round; if it lasts: ALPACA_DATA_URL, the network's way out, Alpaca's status page"
    """What to do, for the log."""


class MarketDataUnavailable(MarketDataError):
    """Alpaca did not answer, or with something that is not an answer; it may next time."""


class BadRequest(MarketDataUnavailable):
    """Alpaca refused the request as it is, most likely for one of its symbols."""

    outcome = "refused"
    advice = "see symbols_rejected; if whole batches are refused, ALPACA_FEED"

    def __init__(self, problem: str, message: str) -> None:
        super().__init__(problem)
        self.message = message


class RateLimited(MarketDataError):
    """Alpaca wants to be asked nothing until `retry_at`."""

    outcome = "rate_limited"
    advice = (
        "it rests as long as Alpaca wants; if that comes again: stop what else uses this key, or lower"
        " ALPACA_REQUESTS_PER_MINUTE"
    )

    def __init__(self, problem: str, retry_at: datetime) -> None:
        super().__init__(problem)
        self.retry_at = retry_at


class Unauthorized(MarketDataError):
    """Alpaca does not accept the key, or the key does not cover what was asked; someone must look."""

    outcome = "unauthorized"
    advice = "set the right ALPACA_API_KEY and ALPACA_SECRET_KEY, and an ALPACA_FEED that the plan has, and restart it"


class Unsent(Exception):
    """The request stayed here: the budget is spent, or a pause is on, for the reason given as `pause`."""

    def __init__(self, pause: MarketDataError | None) -> None:
        super().__init__(str(pause or "the budget is spent"))
        self.pause = pause
