"""What every process says of itself in `/metrics`, beside memory, CPU and open files, which prometheus_client adds."""

import asyncio
import os
import platform
from collections import deque
from typing import Self

from prometheus_client import Gauge, Info

LAG_LOOK_SECONDS = 0.5
LAG_REMEMBERED = 60
"""Looks that are remembered: half a minute, more than the usual time between two scrapes."""

TASKS = Gauge("foliotick_tasks", "Asyncio tasks that have not ended.")
THREADS = Gauge("foliotick_threads", "Threads of the process, those of libraries as well.")
LAG = Gauge(
    "foliotick_event_loop_lag_seconds",
    "How late the event loop has come back to what was due, at the worst of the last 30 seconds.",
)
BUILD = Info(
    "foliotick_build", "What runs here: the service, the schema that it needs, and Python's version."
)


def describe(service: str, schema: str) -> None:
    """Say what runs here."""
    BUILD.info({"service": service, "schema": schema, "python": platform.python_version()})


class Vitals:
    """Watches the event loop while the block runs, at the cost of one timer."""

    def __init__(self) -> None:
        self._lags: deque[float] = deque(maxlen=LAG_REMEMBERED)
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._look_later(asyncio.get_running_loop())
        return self

    def __exit__(self, *_: object) -> None:
        assert self._timer is not None
        self._timer.cancel()

    def take(self) -> None:
        """Bring the gauges up to date."""
        TASKS.set(len(asyncio.all_tasks()))
        THREADS.set(len(os.listdir("/proc/self/task")))
        LAG.set(max(self._lags, default=0.0))

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        due_at = loop.time() + LAG_LOOK_SECONDS

        def look() -> None:
            self._lags.append(max(0.0, loop.time() - due_at))
            self._look_later(loop)

        self._timer = loop.call_at(due_at, look)
