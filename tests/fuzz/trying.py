"""Examples against services that run: Hypothesis in a thread, the services and the check in the test's event loop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest
import structlog
from hypothesis import HealthCheck
from hypothesis.strategies import SearchStrategy

LONG = 20
"""How many times as many examples the long profile tries."""
EXAMPLE_SECONDS_MAX = 60.0


def examples(count: int) -> hypothesis.settings:
    """Return the settings for a test that tries `count` examples in the short profile."""
    is_long = hypothesis.settings.get_current_profile_name() == "long"
    return hypothesis.settings(
        max_examples=count * (LONG if is_long else 1),
        # Data is large here by intent, and nothing is reset between two examples: the services have to bear it.
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
            HealthCheck.function_scoped_fixture,
        ],
    )


async def try_each(
    check: Callable[..., Awaitable[None]], *strategies: SearchStrategy[Any], count: int
) -> None:
    """Await `check` with `count` examples, one after the other, in this event loop."""
    loop = asyncio.get_running_loop()

    def checked(*example: Any) -> None:
        async def awaited() -> None:
            try:
                await check(*example)
            except Exception as error:
                # Not the error itself: on its way into another thread one may lose its cause.
                raise AssertionError(f"{error!r} with {example!r:.2000}") from error

        asyncio.run_coroutine_threadsafe(awaited(), loop).result(EXAMPLE_SECONDS_MAX)

    await try_each_in_thread(checked, *strategies, count=count)


async def try_each_in_thread(
    check: Callable[..., None], *strategies: SearchStrategy[Any], count: int
) -> None:
    """Call `check` with `count` examples, one after the other, in a thread, so that this event loop goes on."""

    @examples(count)
    @hypothesis.given(hypothesis.strategies.tuples(*strategies))
    def each(example: tuple[Any, ...]) -> None:
        check(*example)

    await asyncio.to_thread(each)


@contextmanager
def nothing_unexpected_logged(
    caplog: pytest.LogCaptureFixture, *, but: Collection[str] = ()
) -> Iterator[list[MutableMapping[str, Any]]]:
    """See to it that no traceback is logged in the block, by us or by a library, and no error `but` these events.

    Yields our own lines.
    """
    with structlog.testing.capture_logs() as lines, caplog.at_level(logging.WARNING):
        yield lines
    wrong = [
        line
        for line in lines
        if line.get("exc_info") or (line["log_level"] in ("error", "critical") and line["event"] not in but)
    ]
    assert not wrong, wrong[:5]
    libraries = [
        record
        for record in caplog.records
        if record.levelno >= logging.ERROR
        or (record.exc_info and not record.name.startswith("urllib3"))  # whose warnings `shared.logs` drops
    ]
    assert not libraries, [record.getMessage() for record in libraries[:5]]
