"""Wait for a state instead of sleeping."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError

T = TypeVar("T")


async def eventually(probe: Callable[[], Awaitable[T]], *, timeout: float = 10.0, every: float = 0.02) -> T:
    """Return the first truthy result of `probe`; an AssertionError of it counts as not yet."""
    deadline = time.monotonic() + timeout
    while True:
        problem: AssertionError | None = None
        try:
            result = await probe()
            if result:
                return result
        except AssertionError as error:
            problem = error
        if time.monotonic() > deadline:
            said = f" ({problem})" if problem else ""
            raise AssertionError(f"not within {timeout:g} s: {_source(probe)}{said}") from problem
        await asyncio.sleep(every)


def _source(probe: Callable[..., object]) -> str:
    return inspect.getsource(probe.func if isinstance(probe, partial) else probe).strip()


async def settled(client: Client) -> None:
    """Wait until the server has taken all that `client` has sent so far, its subscriptions above all.

    The library's flush does not see to that: its ping is written at once, and overtakes what still waits to be written.
    """
    echo = await client.subscribe(client.new_inbox())
    await client.publish(echo.subject)
    await echo.next_msg(timeout=10)
    await echo.unsubscribe()


async def answered(client: Client, subject: str, payload: bytes) -> Msg:
    """Return the answer to a request, as soon as there is somebody who answers."""

    async def answer() -> Msg | None:
        with suppress(NoRespondersError):
            return await client.request(subject, payload, timeout=10)
        return None

    found = await eventually(answer)
    assert found is not None
    return found
