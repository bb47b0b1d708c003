"""Wait until the system can be used."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from shared.clock import wait_for_stop

READY_SECONDS_MAX = 60.0
PRICES_SECONDS_MAX = 10.0
POLL_SECONDS = 0.1


class StartFailed(Exception):
    """The system could not be started, or a part of it has ended; the text is for a person."""


async def wait_for_services(
    session: aiohttp.ClientSession, urls: Mapping[str, str], stop: asyncio.Event
) -> None:
    """Wait until each service says that it is ready; raises StartFailed when one takes too long."""
    deadline = time.monotonic() + READY_SECONDS_MAX
    for name, url in urls.items():
        problem = await _service_problem(session, name, url)
        while problem and not await wait_for_stop(stop, POLL_SECONDS):
            if time.monotonic() > deadline:
                raise StartFailed(f"not ready after {READY_SECONDS_MAX:g} s: {problem}")
            problem = await _service_problem(session, name, url)


async def wait_for_prices(
    session: aiohttp.ClientSession, url: str, token: str, simulated: bool, stop: asyncio.Event
) -> str | None:
    """Wait for fresh prices of everything that the token's user holds; return what is missing after a while.

    Missing prices do not keep the system from running: a symbol may be unknown, a key wrong, the market away.
    """
    deadline = time.monotonic() + PRICES_SECONDS_MAX
    problem = await _prices_problem(session, url, token, simulated)
    while problem and time.monotonic() < deadline and not await wait_for_stop(stop, POLL_SECONDS):
        problem = await _prices_problem(session, url, token, simulated)
    return problem


async def _service_problem(session: aiohttp.ClientSession, name: str, url: str) -> str | None:
    try:
        async with session.get(url) as answer:
            return None if answer.status == 200 else f"{name} is not ready: {await answer.text()}"
    except (aiohttp.ClientError, TimeoutError):
        return f"{name} does not answer"


async def _prices_problem(
    session: aiohttp.ClientSession, url: str, token: str, simulated: bool
) -> str | None:
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with session.get(f"{url}/api/portfolio/current", headers=headers) as answer:
            body: dict[str, Any] = await answer.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return "the gateway does not answer"
    if answer.status != 200:  # the user demo may have been removed on purpose
        return None
    if body["unpriced"]:
        return f"no price for {', '.join(position['ticker'] for position in body['unpriced'])}"
    if not body["price_fresh"]:
        return "prices are not updating"
    if body["simulated"] and not simulated:
        return "prices are still those of the simulated market: Alpaca has not answered"
    return None
