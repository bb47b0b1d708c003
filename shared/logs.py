"""One logging pipeline for our records and the libraries': constant event names, data as keywords, JSON lines.

On a terminal the lines are for a person instead. Tracebacks never show local variables, which may hold secrets.
"""

import asyncio
import atexit
import io
import logging
import os
import select
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal, TextIO, cast

import orjson
import structlog
from prometheus_client import Counter
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import FilteringBoundLogger, Processor

_LEAST_LEVELS = {
    **dict.fromkeys(("asyncio", "aiohttp", "nats", "alembic", "sqlalchemy"), logging.WARNING),
    "urllib3": logging.ERROR,  # it warns, with a traceback, of every header that it cannot read
}
"""Of what libraries have to say."""


STUCK_SECONDS_MAX = 0.2
"""What a line waits for a reader that has stopped to read; the lines after it wait no more until he reads again."""

DROPPED = Counter(
    "foliotick_log_lines_dropped", "Log lines that nobody took: the reader has stopped to read."
)


class _LastingStream(io.TextIOBase):
    """Standard output, of which nobody need be left to read: a service goes on without its log, and stops as asked.

    Neither does a reader that stands still hold it up: what he does not take is dropped, counted, and said in the end.
    """

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._unwritten = ""
        self._pipe: int | None = None
        self._is_stuck = False
        self._is_torn = False
        self._dropped = 0

    def look(self) -> None:
        """Find out whether standard output is a pipe or a socket (systemd's journal), which alone can be full."""
        try:
            number = sys.stdout.fileno()
            mode = os.fstat(number).st_mode
            self._pipe = number if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None
        except (OSError, ValueError, AttributeError):
            self._pipe = None

    def write(self, text: str) -> int:
        self._write_waiting()
        self._put(text)
        return len(text)

    def write_soon(self, line: bytes) -> None:
        """Write the line at the end of this turn of the event loop, so that one system call is enough for all of it.

        The order of lines stays: whatever is written before then is written after those that wait.
        """
        if not self._waiting:
            try:
                asyncio.get_running_loop().call_soon(self.flush)
            except RuntimeError:  # no loop, no turn to wait for
                self.write(line.decode())
                self.flush()
                return
        self._waiting.append(line)

    def flush(self) -> None:
        self._write_waiting()
        with suppress(OSError, ValueError):
            if self._pipe is None:
                sys.stdout.flush()
            else:
                text, self._unwritten = self._unwritten, ""
                self._put_into_pipe(self._pipe, text.encode())

    def _write_waiting(self) -> None:
        if self._waiting:
            lines, self._waiting = self._waiting, []
            self._put(b"".join(lines).decode())

    def _put(self, text: str) -> None:
        if self._pipe is not None:
            self._unwritten += text
            return
        with suppress(OSError, ValueError):
            sys.stdout.write(text)

    def _put_into_pipe(self, pipe: int, data: bytes) -> None:
        """Write as much as is taken in time. A pipe that can be written to takes at least PIPE_BUF bytes at once."""
        lines = data.count(b"\n")
        if self._is_torn:
            data = b"\n" + data
        for start in range(0, len(data), select.PIPE_BUF):
            _, writable, _ = select.select([], [pipe], [], 0.0 if self._is_stuck else STUCK_SECONDS_MAX)
            if not writable:
                self._drop(lines - data.count(b"\n", int(self._is_torn), start))
                self._is_torn = self._is_torn if start == 0 else data[start - 1 : start] != b"\n"
                return
            os.write(pipe, data[start : start + select.PIPE_BUF])
        self._is_stuck = self._is_torn = False
        if self._dropped:
            with suppress(RuntimeError):  # without a loop the next line that is written in one says it
                asyncio.get_running_loop().call_soon(self._say_dropped)

    def _drop(self, lines: int) -> None:
        self._is_stuck = True
        self._dropped += lines
        DROPPED.inc(lines)

    def _say_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        if dropped:
            get_logger().warning(
                "log_lines_dropped", lines=dropped, advice="see what reads this log: it stood still"
            )


_output = _LastingStream()
atexit.register(_output.flush)
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING}
_direct: tuple[str, int] | None = None
"""The service, and the least level that is written, while lines are JSON."""


def get_logger() -> FilteringBoundLogger:
    """Return the logger to use; bind nothing to it at import time."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def write(level: Literal["info", "warning"], event: str, data: Mapping[str, str | float | None]) -> None:
    """Write the line that `log.info(event, **data)` writes, for an event of every request: at a tenth of the cost.

    What the pipeline's processors add, this adds by hand; lines for people go
    through the pipeline.
    """
    if _direct is None:
        getattr(get_logger(), level)(event, **data)
        return
    service, level_min = _direct
    if _LEVELS[level] < level_min:
        return
    # The order of the members is that of the pipeline.
    record = {**data, "event": event, "service": service, "level": level, "timestamp": datetime.now(UTC)}
    try:
        line = orjson.dumps(record, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # text that is no Unicode
        line = b""
    if line and line.isascii():
        _output.write_soon(line)
    else:  # the pipeline writes ASCII alone, escaped
        getattr(get_logger(), level)(event, **data)


def configure(service: str, level: str) -> None:
    """Set up logging for the process; to be called once, before the first record."""
    global _direct  # noqa: PLW0603  # as structlog's own configuration, there is one for the process
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    for_people = sys.stdout.isatty()
    _output.look()
    exceptions: Processor = (
        structlog.dev.set_exc_info
        if for_people
        else structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    )
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if for_people
        else structlog.processors.JSONRenderer(default=str, separators=(",", ":"))
    )
    _direct = None if for_people else (service, logging.getLevelNamesMapping()[level])
    structlog.configure(
        processors=[*common, exceptions, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _output)),
        cache_logger_on_first_use=True,
    )
    library_records = logging.StreamHandler(_output)
    library_records.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, exceptions, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [library_records]
    root.setLevel(level)
    for name, least in _LEAST_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, root.level))
