"""Messages on the bus that are not believed: each is counted, and one is said now and then, however many they are."""

import math
import time
from collections.abc import Callable

from prometheus_client import Counter
from pydantic import ValidationError

from shared import logs

SAID_EVERY_SECONDS = 10.0

log = logs.get_logger()
doubtful = Counter("gateway_messages_doubtful", "Messages on the bus that were not believed")


class Doubts:
    """Says of one listener's messages which it did not believe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at = -math.inf
        self._unsaid = 0

    def add(self, subject: str, reason: str) -> None:
        """Count a message that is not believed."""
        doubtful.inc()
        now = self._clock()
        if now - self._said_at < SAID_EVERY_SECONDS:
            self._unsaid += 1
            return
        log.warning(
            "message_doubtful",
            subject=subject,
            reason=reason,
            unsaid_before=self._unsaid,
            advice="see who else publishes on our subjects, and set the clocks; PostgreSQL is read instead",
        )
        self._said_at, self._unsaid = now, 0

    def add_malformed(self, subject: str, payload: bytes, error: ValidationError) -> None:
        """Count a message that cannot be read."""
        self.add(subject, f"malformed: {error.errors()[0]['msg']} ({len(payload)} bytes)")
