"""Times in which something is refused again and again: a line at their beginning and end, a note meanwhile."""

import asyncio
import time

from shared import health, logs

CALM_SECONDS = 3.0
"""An episode is over when nothing was refused for so long."""

log = logs.get_logger()


class Episode:
    """Counts refusals of one sort, however many a second they are, and says so twice."""

    def __init__(self, began: str, ended: str, *, says: str, advice: str) -> None:
        """Take the names of the two log events, and the words of the note and of the advice."""
        self._began_event = began
        self._ended_event = ended
        self._says = says
        self._advice = advice
        self._began_at = 0.0
        self._last_at = 0.0
        self._ending: asyncio.TimerHandle | None = None
        self.refused = 0
        """How many were refused since it began."""

    @property
    def is_on(self) -> bool:
        return self._ending is not None

    def refuse(self, **data: float) -> None:
        """Count a refusal; `data` is for the line of the first one."""
        self._last_at = time.monotonic()
        if self._ending is None:
            self._began_at, self.refused = self._last_at, 0
            self._ending = asyncio.get_running_loop().call_later(CALM_SECONDS, self._look)
            log.warning(self._began_event, **data, advice=self._advice)
        self.refused += 1

    def note(self) -> health.Degraded | None:
        """Say what is going on, for readiness."""
        if self._ending is None:
            return None
        seconds = time.monotonic() - self._began_at
        return health.Degraded(f"{self._says}: {self.refused:,} in {seconds:.0f} s; {self._advice}")

    def end(self) -> None:
        """End it now, if there is one."""
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
            seconds = round(self._last_at - self._began_at, 1)
            log.info(self._ended_event, refused=self.refused, seconds=seconds)

    def _look(self) -> None:
        remaining = self._last_at + CALM_SECONDS - time.monotonic()
        if remaining > 0:
            self._ending = asyncio.get_running_loop().call_later(remaining, self._look)
        else:
            self.end()
