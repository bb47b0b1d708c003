"""Asks the market for a user's prices when he wants them now; only the feeder that holds the lease does.

Who asks at once is answered by one round, and rounds take a share of the requests alone: polling must not wait because
many users have pressed a button.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import timedelta

from prometheus_client import Counter

from services.price_feeder import queries
from services.price_feeder.feed import Refreshed
from services.price_feeder.market_data import BATCH_SIZE_MAX
from services.price_feeder.queries import LeaseLost
from shared import clock, logs
from shared.bus import Bus, Refused
from shared.clock import Now
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.messages import REFRESH_REQUESTED, PricesRefreshed, RefreshRequested
from shared.refreshes import check_time

QUEUE = "price_feeder"
AT_ONCE_MAX = 256
ANSWER_SECONDS_MAX = 4.4
"""Its turn, the market and the prices stored; a gateway waits 4.5 s."""
MARKET_SECONDS_MAX = 2.5
"""What a round waits for Alpaca, so that whoever asked is still there."""
SYMBOLS_MAX = 500
"""Of one request: those whose prices were confirmed longest ago."""
REQUESTS_SHARE = 0.25
"""Of the requests that Alpaca allows, how many may be sent for users who ask."""
PAUSE_SECONDS_MAX = 1.5
"""A request that would wait longer for its round is refused."""
RETRY_SECONDS = 2

Refresh = Callable[[Sequence[str], asyncio.Event], Awaitable[Refreshed]]
"""Asks for the last trades of these symbols, until the event is set, stores and publishes them."""

requests_handled = Counter(
    "price_feeder_refreshes",
    "Requests for prices now, by outcome: refreshed, refused, failed (no price came, or none could be stored).",
    ["outcome"],
)
rounds_taken = Counter("price_feeder_refresh_rounds", "Rounds that answered them.")

log = logs.get_logger()


class _Round:
    """One question to the market, for all who came before it began."""

    def __init__(self) -> None:
        self.symbols: dict[str, None] = {}  # in their order, each once
        self.brought: Refreshed | None = None
        self.failed: Exception | None = None


class Rounds:
    """Asks for all who wait together, one round after the other, and not more often than their share allows."""

    def __init__(self, refresh: Refresh, holds: Callable[[], bool], requests_per_minute: int) -> None:
        self.granting = asyncio.Lock()
        """One request has a connection to the database: of the few that there are, polling needs the rest."""
        self._refresh = refresh
        self._holds = holds
        self._seconds_per_request = 60 / (requests_per_minute * REQUESTS_SHARE)
        self._next = _Round()
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    def check(self) -> None:
        """Raise Refused when the next round is not for this feeder, or too far away."""
        if not self._holds():
            raise Refused(503, "another price feeder takes over", RETRY_SECONDS)
        pause_seconds = self._pause_seconds()
        if pause_seconds > PAUSE_SECONDS_MAX:
            raise Refused(503, "many have asked for prices", math.ceil(pause_seconds))

    def _pause_seconds(self) -> float:
        return max(0.0, self._free_at - time.monotonic())

    async def join(self, symbols: Collection[str]) -> Refreshed:
        """Return what the next round brings of all its symbols; raises what it fails with.

        Whoever has the turn first takes it for the others; if he is cut off, another one of them does.
        """
        joined = self._next
        joined.symbols.update(dict.fromkeys(symbols))
        async with self._turn:
            if joined.brought is None and joined.failed is None:
                await asyncio.sleep(self._pause_seconds())
                await self._take(joined)
        if joined.failed is not None:
            raise joined.failed
        assert joined.brought is not None
        return joined.brought

    async def _take(self, joined: _Round) -> None:
        self._next = _Round()
        requests = math.ceil(len(joined.symbols) / BATCH_SIZE_MAX)
        self._free_at = time.monotonic() + requests * self._seconds_per_request
        rounds_taken.inc()
        ended = asyncio.Event()
        ending = asyncio.get_running_loop().call_later(MARKET_SECONDS_MAX, ended.set)
        try:
            joined.brought = await self._refresh(list(joined.symbols), ended)
        except (DatabaseUnavailable, SchemaMissing, LeaseLost) as error:
            joined.failed = error
        finally:
            ending.cancel()


async def run(
    database: Database,
    bus: Bus,
    refresh: Refresh,
    holds: Callable[[], bool],
    over: asyncio.Event,
    *,
    cooldown: timedelta,
    requests_per_minute: int,
    now: Now = clock.utc_now,
) -> None:
    """Answer requests until `over` is set; `holds` tells whether this feeder has the lease."""
    rounds = Rounds(refresh, holds, requests_per_minute)

    async def answer(payload: bytes) -> PricesRefreshed:
        requested = RefreshRequested.model_validate_json(payload)
        try:
            return await refreshed(database, rounds, requested, cooldown, now)
        except Refused as refusal:
            requests_handled.labels("failed" if refusal.code == 503 else "refused").inc()
            log.info("price_refresh_refused", user_id=requested.user_id, reason=str(refusal))
            raise

    await bus.serve(
        REFRESH_REQUESTED,
        answer,
        over,
        queue=QUEUE,
        at_once_max=AT_ONCE_MAX,
        answer_seconds_max=ANSWER_SECONDS_MAX,
    )


async def refreshed(
    database: Database, rounds: Rounds, requested: RefreshRequested, cooldown: timedelta, now: Now
) -> PricesRefreshed:
    """Ask the market for what the user holds; raises Refused.

    The request counts before the market is asked, and stays counted when that brings nothing: a market that is in
    trouble is not asked more often for it.
    """
    began = time.monotonic()
    check_time(requested.requested_at, now())
    rounds.check()
    again_seconds = max(RETRY_SECONDS, math.ceil(cooldown.total_seconds()))
    try:
        async with rounds.granting:
            held = await queries.grant_refresh(database, requested.user_id, requested.requested_at, cooldown)
    except (DatabaseUnavailable, SchemaMissing) as error:
        raise Refused(503, "the database does not answer", RETRY_SECONDS) from error
    if not held:
        return PricesRefreshed(refreshed_at=now(), symbols=0, confirmed=0, changed=0, rejected=0)
    try:
        brought = await rounds.join(held[:SYMBOLS_MAX])
    except (DatabaseUnavailable, SchemaMissing, LeaseLost) as error:
        raise Refused(503, "prices cannot be stored now", again_seconds) from error
    confirmed, rejected = brought.confirmed.intersection(held), brought.rejected.keys() & set(held)
    if not confirmed and not rejected:
        raise Refused(503, f"no price came: {brought.problem or 'not in time'}", again_seconds)
    requests_handled.labels("refreshed").inc()
    reply = PricesRefreshed(
        refreshed_at=brought.at,
        symbols=len(held),
        confirmed=len(confirmed),
        changed=len(brought.changed.intersection(held)),
        rejected=len(rejected),
    )
    log.info(
        "prices_refreshed",
        user_id=requested.user_id,
        symbols=reply.symbols,
        confirmed=reply.confirmed,
        changed=reply.changed,
        rejected=reply.rejected,
        duration_ms=round((time.monotonic() - began) * 1000),
    )
    return reply
