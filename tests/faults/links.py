"""The links between parts: each passes through a proxy, and can be disturbed like a part."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.faults.parts import Spell
from tests.faults.proxy import FAIR, Proxy, Weather

RESET_EVERY_SECONDS = 0.3
RESET_SHARE = 0.5


@dataclass
class Link:
    """From a service, or the readers, to a server or a gateway."""

    source: str
    target: str
    proxy: Proxy
    spells: list[Spell] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.source} → {self.target}"

    def joins(self, kind: str, target: str) -> bool:
        """Tell whether it leads from a replica of this kind to this server, or to a replica of it."""
        return kind_of(self.source) == kind and kind_of(self.target) == target

    def disturb(self, weather: Weather) -> None:
        """Let it be bad weather, until `heal`."""
        self._begin()
        self.proxy.weather = weather

    async def refuse(self) -> None:
        """Refuse new connections, until `heal`."""
        self._begin()
        await self.proxy.refuse()

    async def heal(self) -> None:
        self.proxy.weather = FAIR
        await self.proxy.accept()
        if self.spells and self.spells[-1].ended_at is None:
            self.spells[-1].ended_at = time.monotonic()

    def _begin(self) -> None:
        if not self.spells or self.spells[-1].ended_at is not None:
            self.spells.append(Spell("disturbed", time.monotonic()))


@asynccontextmanager
async def disturbed(links: Sequence[Link], weather: Weather, *, resets: bool = False) -> AsyncIterator[None]:
    """Disturb links while the block runs; with `resets` each open connection is reset every now and then."""
    for link in links:
        link.disturb(weather)
    resetting = asyncio.create_task(_reset_at_random(links)) if resets else None
    try:
        yield
    finally:
        if resetting is not None:
            resetting.cancel()
            await asyncio.gather(resetting, return_exceptions=True)
        for link in links:
            await link.heal()


async def _reset_at_random(links: Sequence[Link]) -> None:
    while True:
        for link in links:
            link.proxy.reset(RESET_SHARE)
        await asyncio.sleep(RESET_EVERY_SECONDS)


def kind_of(name: str) -> str:
    """Return the service of a replica: `api_gateway` of `api_gateway-1`."""
    return name.partition("-")[0]
