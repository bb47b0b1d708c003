"""Clients of the portfolio stream, who go on elsewhere when theirs is lost, and must end with what `/current` says."""

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp
import jwt

from tests.faults.population import User
from tests.faults.readers import judge_portfolio
from tests.faults.system import System
from tests.gateway import Gateway
from tests.streams import Stream, sse

PAUSE_SECONDS = 0.3
SILENCE_SECONDS_MAX = 20.0
"""Longer than a heartbeat takes to come: then the stream is given up."""
AGREEMENT_SECONDS_MAX = 15.0
_COMPARED = ("ticker", "shares", "price_per_share", "current_value")


@dataclass
class Watchers:
    """Those who watch, one stream each; what each shows is judged whenever it changes."""

    system: System
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _shown: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def run(self, watchers: int, stop: asyncio.Event, seed: int) -> None:
        """Watch so many portfolios, those with orders first, until `stop`."""
        chance = random.Random(seed)
        population = self.system.population
        rest = [user for user in population.active if user not in population.ordering]
        chosen = [*population.ordering, *chance.sample(rest, len(rest))][:watchers]
        watching = [asyncio.create_task(self._watch(user, random.Random(seed))) for user in chosen]
        await stop.wait()
        self.wrong += await self._disagreeing(chosen)
        for task in watching:
            task.cancel()
        for outcome in await asyncio.gather(*watching, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                raise outcome if isinstance(outcome, BaseException) else AssertionError("ended by itself")

    async def _watch(self, user: User, chance: random.Random) -> None:
        last_id = ""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_connect=3)) as http:
            while True:
                port = chance.choice(list(self.system.gateway_ports.values()))
                headers = {"Authorization": f"Bearer {self._token(user)}"}
                with suppress(aiohttp.ClientError, TimeoutError, OSError, AssertionError):
                    async with sse(Gateway(port, http), None, **headers, Last_Event_ID=last_id) as stream:
                        self.counts["streams"] += 1
                        # A stream that is resumed goes on from what was shown.
                        stream.shown = self._shown.get(user.subject, {})
                        while True:
                            last_id = await self._next(stream, user) or last_id
                self.counts["lost"] += 1
                await asyncio.sleep(PAUSE_SECONDS)

    async def _next(self, stream: Stream, user: User) -> str:
        async with asyncio.timeout(SILENCE_SECONDS_MAX):
            event = await stream.next()
        self.counts[event.name] += 1
        if stream.shown and event.name in ("portfolio", "change"):
            self._shown[user.subject] = stream.shown
            orders = user.orders_between(0.0, time.monotonic())
            found = judge_portfolio(stream.shown, user, orders)
            self.wrong += [f"stream of {user.subject} after {event.name}: {each}" for each in found]
        return event.id

    async def _disagreeing(self, users: list[User]) -> list[str]:
        """Return who is shown something else than `/current` answers, though there was time to settle."""
        until = time.monotonic() + AGREEMENT_SECONDS_MAX
        waiting = {user.subject: user for user in users}
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
            while waiting and time.monotonic() < until:
                for user in list(waiting.values()):
                    current = await self._current(http, user)
                    shown = self._shown.get(user.subject)
                    if current and shown and _essence(shown) == _essence(current):
                        del waiting[user.subject]
                await asyncio.sleep(0.1)
        return [f"{subject} is shown {self._shown.get(subject)}" for subject in waiting]

    async def _current(self, http: aiohttp.ClientSession, user: User) -> dict[str, Any] | None:
        port = next(iter(self.system.gateway_ports.values()))
        url = f"http://127.0.0.1:{port}/api/portfolio/current"
        try:
            async with http.get(url, headers={"Authorization": f"Bearer {self._token(user)}"}) as answer:
                text = await answer.text()
                return json.loads(text, parse_float=Decimal) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    def _token(self, user: User) -> str:
        return jwt.encode(
            {"sub": user.subject, "exp": int(time.time()) + 3600}, self.system.jwt_secret, "HS256"
        )


def _essence(portfolio: dict[str, Any]) -> Any:
    positions = sorted(tuple(each[name] for name in _COMPARED) for each in portfolio["positions"])
    return portfolio["total_value"], portfolio["cash_balance"], positions
