"""One logging pipeline for our records and the libraries': constant event names, data as keywords, JSON lines.

On a terminal the lines are for a person instead. Tracebacks never show local variables, which may hold secrets.
"""

import io
import logging
import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import FilteringBoundLogger, Processor

_QUIET_LIBRARIES = ("asyncio", "aiohttp", "nats", "urllib3", "alembic", "sqlalchemy")


class _LastingStream(io.TextIOBase):
    """Standard output, of which nobody need be left to read: a service goes on without its log, and stops as asked."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()


def get_logger() -> FilteringBoundLogger:
    """Return the logger to use; bind nothing to it at import time."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def configure(service: str, level: str) -> None:
    """Set up logging for the process; to be called once, before the first record."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    for_people = sys.stdout.isatty()
    exceptions: Processor = (
        structlog.dev.set_exc_info
        if for_people
        else structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    )
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if for_people
        else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[*common, exceptions, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _LastingStream())),
        cache_logger_on_first_use=True,
    )
    library_records = logging.StreamHandler(_LastingStream())
    library_records.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, exceptions, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [library_records]
    root.setLevel(level)
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
