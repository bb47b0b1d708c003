"""How often each user may ask, so that one of them does not take what is there for all."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from services.api_gateway import problems
from services.api_gateway.episodes import Episode
from services.api_gateway.problems import Problem
from services.api_gateway.refusals import Bucket, refused

USERS_MAX = 10_000
"""Users whose buckets are kept, some 3 MB; who is not among them has a full one."""


class UserRates:
    """A token bucket for each user who has asked lately."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the requests a second, 0 for any number, and how many of them may come at once."""
        self._clock = clock
        self._per_second = per_second
        self._burst = burst
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self.episode = Episode(
            "users_limited",
            "users_limited_no_more",
            says="users over USER_REQUESTS_PER_SECOND, requests refused",
            advice="one client asks too often; gateway_requests_refused_total says how much, the access lines when",
        )

    def check(self, subject: str) -> None:
        """Count a request of the user; raises Problem when there were too many."""
        if not self._per_second:
            return
        now = self._clock()
        bucket = self._buckets.get(subject)
        if bucket is None:
            bucket = self._buckets[subject] = Bucket(self._per_second, self._burst)
            if len(self._buckets) > USERS_MAX:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(subject)
        wait = bucket.take(now)
        if wait:
            refused("user_rate")
            self.episode.refuse(per_second=self._per_second, burst=self._burst)
            seconds = max(math.ceil(wait), 1)
            raise Problem(
                problems.TOO_MANY_REQUESTS,
                f"A user may ask {self._per_second:g} times a second. Try again in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )

    async def check_readiness(self) -> str | None:
        """Say for readiness whether users are being limited."""
        return self.episode.note()
