"""How late the event loop is: what waits for the processor is seen by no queue of ours."""

import asyncio
import time

from prometheus_client import Gauge

LOOK_SECONDS = 0.1
WINDOW_SECONDS = 10.0
"""The worst of this time, at most twice as long, is what is told; a scrape every 15 seconds hardly misses one."""

lag_seconds = Gauge("gateway_loop_lag_seconds", "How late the event loop was at worst in the last seconds")


class LoopLag:
    """Looks ten times a second how much later than asked for it was called."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._window_ends_at = 0.0
        self._worst = self._worst_before = 0.0
        lag_seconds.set_function(lambda: self.seconds)

    @property
    def seconds(self) -> float:
        return max(self._worst, self._worst_before)

    def start(self) -> None:
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._due_at = time.monotonic() + LOOK_SECONDS
        self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._window_ends_at:
            self._worst_before, self._worst = self._worst, 0.0
            self._window_ends_at = now + WINDOW_SECONDS
        self._worst = max(self._worst, now - self._due_at)
        self._wait()
