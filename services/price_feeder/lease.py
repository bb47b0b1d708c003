"""The lease: of all price feeders on a database one has it; he alone asks Alpaca, writes prices and publishes them."""

import asyncio
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

from services.price_feeder import metrics, queries
from services.price_feeder.queries import Term
from shared import clock, health, logs
from shared.database import Database, DatabaseUnavailable, SchemaMissing

LASTS = timedelta(seconds=10)
"""How long a term lasts from its last renewal, by the clock of the database."""
HELD_SECONDS_MAX = 8.0
"""How long its holder acts on it, by his own clock and from before he sent the renewal: he ends before others begin."""
NOBODY_SECONDS = 1.0
"""For so long after it has stopped, nobody else can have begun."""
RENEW_EVERY_SECONDS = 2.5
RENEW_AGAIN_SECONDS = 0.5
ACQUIRE_EVERY_SECONDS = 1.0
RELEASE_SECONDS_MAX = 1.0

_FAILURES = (DatabaseUnavailable, SchemaMissing)

log = logs.get_logger()


def now() -> float:
    """Return seconds of a clock that never goes back and also counts while the process or the machine is asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The right to feed prices, held or waited for.

    `database` is a connection of its own: a store that waits must not cost the lease. A holder that loses it, because
    the database is away or the process was frozen, knows so by its own clock before anybody else can have it.
    """

    def __init__(self, database: Database, *, holder: str | None = None) -> None:
        self._database = database
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._term: Term | None = None
        self._held_until = 0.0
        self._over = asyncio.Event()
        self._standby_for: str | None = None
        self._ran_out_for: str | None = None
        """Who had the lease before, and neither renewed nor released it."""
        self._said_standby = False

    @property
    def term(self) -> Term:
        """The term that is held; ask only what runs inside `lead`."""
        assert self._term is not None
        return self._term

    def holds(self) -> bool:
        """Tell whether the lease is held right now; cheap enough to ask before every step."""
        return now() < self._held_until

    def has_just_run_out(self) -> bool:
        """Tell whether the lease could not be renewed, so short a while ago that nobody else can have it yet."""
        return not self.holds() and now() < self._held_until + NOBODY_SECONDS

    def lose(self) -> None:
        """End the term here and now: the database has said that it is over."""
        self._held_until = 0.0
        self._over.set()

    async def check(self) -> str | None:
        """Say that this process is a standby. For readiness: a standby is ready."""
        if self.holds():
            return None
        return health.Note(f"standby: {self._standby_for or 'nobody'} has the lease")

    async def lead(self, work: Callable[[asyncio.Event], Awaitable[None]], stop: asyncio.Event) -> None:
        """Run `work(over)` once for every term that this process gets, until `stop` is set.

        `over` is set when the term ends or `stop` is set; `work` must end soon after. What it still does then must
        ask `holds()`: with `stop` the lease is kept until `work` has ended, and then released.
        """
        while not stop.is_set():
            if not await self._acquire():
                await clock.wait_for_stop(stop, ACQUIRE_EVERY_SECONDS)
                continue
            self._over = over = asyncio.Event()
            metrics.LEASE_HELD.set(1)
            self._say_acquired()
            keeping = [asyncio.create_task(self._renew()), asyncio.create_task(self._watch(over, stop))]
            try:
                await work(over)
            finally:
                for task in keeping:
                    task.cancel()
                await asyncio.wait(keeping)
                metrics.LEASE_HELD.set(0)
                if self.holds():
                    await self._release()
                else:
                    log.warning(
                        "lease_lost",
                        term=self.term.number,
                        advice="see PostgreSQL and the way to it, or what froze this process; a standby takes over",
                    )
                self._held_until = 0.0
            for task in keeping:
                if not task.cancelled():
                    task.result()  # an unexpected failure goes on to the top

    async def _acquire(self) -> bool:
        asked_at = now()
        try:
            self._term, holder = await queries.acquire_lease(self._database, self._holder, LASTS)
        except _FAILURES:  # readiness says so, and prices_not_updated would say no more
            return False
        self._ran_out_for = holder if holder != self._holder else None
        if self._term is None:
            self._standby_for = holder
            if not self._said_standby:
                log.info("standby", holder=holder)
            self._said_standby = True
            return False
        self._said_standby = False
        self._held_until = asked_at + HELD_SECONDS_MAX
        return self.holds()

    def _say_acquired(self) -> None:
        if self._ran_out_for is None:
            log.info("lease_acquired", term=self.term.number)
        else:
            log.warning(
                "lease_acquired",
                term=self.term.number,
                ran_out_for=self._ran_out_for,
                advice="nothing for the prices; that feeder was killed, frozen or cut off from PostgreSQL: see to it",
            )

    async def _renew(self) -> None:
        """Renew for ever; a failure is tried again soon, and a refusal ends the term."""
        pause = RENEW_EVERY_SECONDS
        while True:
            await asyncio.sleep(pause)
            asked_at = now()
            pause = RENEW_AGAIN_SECONDS
            with suppress(*_FAILURES):
                if not await queries.renew_lease(self._database, self.term, LASTS):
                    self.lose()
                    return
                if self.holds():  # what had run out stays so: the work is ending already
                    self._held_until = asked_at + HELD_SECONDS_MAX
                pause = RENEW_EVERY_SECONDS

    async def _watch(self, over: asyncio.Event, stop: asyncio.Event) -> None:
        """Set `over` when the term runs out or `stop` is set, whatever the renewal is waiting for."""
        while self.holds() and not await clock.wait_for_stop(stop, self._held_until - now()):
            pass
        over.set()

    async def _release(self) -> None:
        """Let a standby have the lease at once; without that it runs out by itself."""
        with suppress(*_FAILURES, TimeoutError):
            async with asyncio.timeout(RELEASE_SECONDS_MAX):
                await queries.release_lease(self._database, self.term)
            log.info("lease_released", term=self.term.number)
