"""Run a service: settings, logs, signals, exit code.

Exit codes: 0 after SIGTERM or SIGINT, 1 after a failure, 2 when a setting is wrong.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import uvloop

from shared import logs, settings
from shared.settings import LogSettings, SettingsError

STOP_GRACE_SECONDS = 10.0
"""What a service may take from a signal to its end; then it is cancelled."""
CANCEL_SECONDS = 1.0
"""What a cancelled service may still take."""
END_SECONDS_MAX = STOP_GRACE_SECONDS + CANCEL_SECONDS + 2.0
"""After a signal or a failure the process has ended by then, also when a task does not let itself be cancelled."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

S = TypeVar("S", bound=LogSettings)
log = logs.get_logger()


class Stop(asyncio.Event):
    """Set by the first signal: come to an end. `at_once` is set by the second: wait for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = asyncio.Event()


def run(service: str, settings_type: type[S], serve: Callable[[S, Stop], Awaitable[None]]) -> NoReturn:
    """Run `serve(settings, stop)` until it returns, which it must do soon after `stop` is set; never returns.

    A SettingsError from `serve` means a setting that only its use could show to be wrong.
    """
    try:
        loaded = settings.load(settings_type)
        logs.configure(service, loaded.log_level)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                code = runner.run(_supervise(loaded, serve))
        finally:  # the loop's handlers have gone with it; the process ends already, whoever asks for it now
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        sys.exit(code)
    except SettingsError as error:
        problems = "".join(f"\n  {line}" for line in str(error).splitlines())
        sys.stderr.write(f"{service} cannot start, its settings are wrong:{problems}\n")
        sys.exit(2)


async def finish(work: Coroutine[Any, Any, object], stop: asyncio.Event, *, stop_seconds_max: float) -> None:
    """Do the work; once `stop` is set it has `stop_seconds_max` to end by itself before it is cancelled."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await asyncio.wait({working}, timeout=stop_seconds_max)
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.wait({working, stopping})
    if not working.cancelled():
        working.result()


async def _supervise(loaded: S, serve: Callable[[S, Stop], Awaitable[None]]) -> int:
    stop = Stop()
    loop = asyncio.get_running_loop()

    def on_signal(name: str) -> None:
        if not stop.is_set():
            stop.set()
            _end_at_last()  # whatever happens now
            log.info("stopping", signal=name)
        elif not stop.at_once.is_set():
            stop.at_once.set()
            log.info("stopping_at_once", signal=name)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number.name)
    log.info("starting")
    served = asyncio.ensure_future(serve(loaded, stop))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({served, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not served.done():
            await asyncio.wait({served}, timeout=STOP_GRACE_SECONDS)
        if not served.done():
            log.error(
                "stop_overran",
                advice="report it with the lines before: something did not let itself be ended",
                grace_seconds=STOP_GRACE_SECONDS,
            )
            served.cancel()
            await asyncio.wait({served}, timeout=CANCEL_SECONDS)
            return 1
        await served
    except SettingsError:
        raise
    except Exception as error:
        for cause in _causes(error):
            # What the system refuses, a port say, is said by the error itself; the rest is a bug to be traced.
            traced = None if isinstance(cause, OSError) else cause
            log.error(
                "service_failed",
                advice="mend what the error names; with a traceback it is a bug to report",
                error=f"{type(cause).__name__}: {cause}",
                exc_info=traced,
            )
        return 1
    finally:
        stopped.cancel()
        _end_at_last()
    log.info("stopped")
    return 0


def _end_at_last() -> None:
    """See to it that the process ends: what nothing can cancel must not keep it until somebody kills it."""

    def end() -> None:
        with suppress(OSError):
            os.set_blocking(2, False)  # nobody may read it any more
            os.write(2, f"not ended {END_SECONDS_MAX:g} s after it was to: given up\n".encode())
        os._exit(1)

    ending = threading.Timer(END_SECONDS_MAX, end)
    ending.daemon = True
    ending.start()


def _causes(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [cause for member in error.exceptions for cause in _causes(member)]
    return [error]
