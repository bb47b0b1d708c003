"""A tiny load balancer: it sends each request to a gateway that says it is ready, and asks another when one refuses."""

import asyncio
import random
import time
from dataclasses import dataclass, field

import aiohttp

from tests.faults.population import User
from tests.faults.readers import DEADLINE_SECONDS, LATE_SECONDS_MAX, PATHS, PAUSE_SECONDS, Asked, Readers
from tests.faults.system import System
from tests.waiting import eventually

LOOK_SECONDS = 0.1
READY_SECONDS_MAX = 2.0
"""What a gateway may take to say it, on a machine that is busy."""


@dataclass
class Balancer:
    """Follows `/readyz` of the gateways, and reads through those that are ready."""

    system: System
    readers: Readers = field(init=False)
    """Of whom nobody may be refused or left without an answer."""
    retries: int = 0
    """Requests for which a gateway refused the connection, and that another one was asked."""
    _ready: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.readers = Readers(self.system)

    async def run(self, readers: int, stop: asyncio.Event, seed: int) -> None:
        """Let so many clients read until `stop`, as soon as all gateways are ready."""
        async with asyncio.TaskGroup() as tasks:
            watching = [tasks.create_task(self._watch(gateway)) for gateway in self.system.gateway_ports]
            await eventually(self._knows_all)
            for number in range(readers):
                tasks.create_task(self._read(random.Random(seed + number), stop))
            await stop.wait()
            for task in watching:
                task.cancel()

    async def _knows_all(self) -> bool:
        return len(self._ready) == len(self.system.gateway_ports)

    def lost(self) -> list[str]:
        """Return which requests were refused, or got no answer."""
        return [
            f"{each.gateway}: {each.problem}" for each in (*self.readers.unanswered, *self.readers.refused)
        ]

    async def _watch(self, gateway: str) -> None:
        """Ask a gateway again and again whether it is ready, on the port that it serves."""
        url = f"http://127.0.0.1:{self.system.gateway_ports[gateway]}/readyz"
        timeout = aiohttp.ClientTimeout(total=READY_SECONDS_MAX)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                try:
                    async with http.get(url) as answer:
                        is_ready = answer.status == 200
                except (aiohttp.ClientError, TimeoutError, OSError):
                    is_ready = False
                (self._ready.add if is_ready else self._ready.discard)(gateway)
                await asyncio.sleep(LOOK_SECONDS)

    async def _read(self, chance: random.Random, stop: asyncio.Event) -> None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_SECONDS + LATE_SECONDS_MAX)
        # A connection for each request: one that is kept may be closed by the gateway while a request is on its way.
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            while not stop.is_set():
                await self._ask(http, chance, chance.choice(self.system.population.active))
                await asyncio.sleep(PAUSE_SECONDS)

    async def _ask(self, http: aiohttp.ClientSession, chance: random.Random, user: User) -> None:
        """Ask a gateway that is ready, and another one when it refuses the connection; while none is, it is lost."""
        path = chance.choice(PATHS)
        gateways = sorted(self._ready)
        if not gateways:
            now = time.monotonic()
            self.readers.unanswered.append(Asked("no gateway", now, now, "none was ready"))
            self.readers.counts["unanswered"] += 1
        chance.shuffle(gateways)
        for gateway in gateways:
            failed = await self.readers.ask(http, gateway, user, path)
            if failed is None or failed.was_connected or gateway == gateways[-1]:
                return
            self.readers.unanswered.remove(failed)
            self.retries += 1
