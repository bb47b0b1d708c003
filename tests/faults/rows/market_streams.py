"""Streams of the market that end, go mute, freeze or are refused: polling is the floor that prices never fall below."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import chain, pairwise

from local.settings import SIMULATED_KEYS
from shared.clock import utc_now
from tests.faults.mix import Life
from tests.faults.parts import Service
from tests.faults.rows.feeders import change_lease_holder, lease_holder
from tests.faults.rows.market import (
    STREAM,
    STREAMS,
    attempts,
    faulty,
    streams_are_lost,
    streams_carry,
)
from tests.faults.rows.row import Row, control, session, total
from tests.faults.signs import Lookout, Sign, shown
from tests.faults.system import MARKET_SEED, System
from tests.faults.truth import Market, traded_at
from tests.waiting import eventually

FLOOR_SECONDS_MAX = 5.0
"""How old a price may be, with rounds of a second and a machine that is busy."""
LOOK_SECONDS = 0.25
STOCKS_PATH = "/v2/iex"
REFUSED_TIMES, REFUSED_SECONDS_MAX = 3, 40.0
STAGES = 2
"""After the first failure the feeder waits up to 4 s, then up to 8 s."""
MUTE_SEEN_SECONDS_MAX = 40.0
SPREAD_SECONDS_MIN = 0.25
"""Between the longest and the shortest of six pauses, drawn from 3 s at least: it is less in one case of 40,000."""
PAUSE_SECONDS_MIN, OTHER_CONNECTION_PAUSE_SECONDS_MIN = 1.0, 4.0
"""What the feeder waits, at least, before it tries again; what comes on top is random, and grows."""
FROZEN_SEEN_SECONDS_MAX = 20.0
"""A socket without a pong is given up after ten seconds."""
OTHER_SEEN_SECONDS_MAX = 20.0
SYMBOLS_MAX = 5
REFUSED_FOR_OTHER = 'price_feeder_stream_failures_total{code="406",stream="equity"}'
LOST = Sign("streams", "price_feeder_stream_failures_total", "market_stream_lost")
LIMITED = Sign(metric='price_feeder_stream_symbols_max{stream="equity"}', line="stream_symbols_limited")
CARRIED = 'price_feeder_streamed_symbols{stream="equity"}'


@dataclass
class Floor:
    """How old prices became while somebody looked."""

    oldest_seconds: float = 0.0
    """Since a price was confirmed."""
    missed: set[str] = field(default_factory=set)
    """Symbols whose last trade was not there in time."""


@asynccontextmanager
async def watched(system: System) -> AsyncIterator[Floor]:
    """Look at all prices while the block runs, and compare them with those of the market."""
    floor, stop = Floor(), asyncio.Event()
    watching = asyncio.create_task(_watch(system, floor, stop))
    try:
        yield floor
    finally:
        stop.set()
        await watching


async def _watch(system: System, floor: Floor, stop: asyncio.Event) -> None:
    market = Market(MARKET_SEED)
    async with session(system) as connection:
        while not stop.is_set():
            now = utc_now()
            rows = await connection.fetch("SELECT symbol, traded_at, updated_at FROM asset_prices")
            for row in rows:
                seconds = (now - row["updated_at"]).total_seconds()
                floor.oldest_seconds = max(floor.oldest_seconds, seconds)
                last = market.latest_trade(row["symbol"], now - timedelta(seconds=FLOOR_SECONDS_MAX))
                if row["traded_at"] < traded_at(last):
                    floor.missed.add(row["symbol"])
            await asyncio.sleep(LOOK_SECONDS)


async def _streams(system: System, _: Life) -> str:
    await streams_carry(system)
    async with watched(system) as floor:
        seen = [
            await _dropped(system),
            await _mute(system),
            await _handshakes_refused(system),
            await _frozen(system),
            await _second_connection(system),
            await _symbol_limit(system),
        ]
    assert floor.oldest_seconds <= FLOOR_SECONDS_MAX, f"a price of {floor.oldest_seconds:.1f} s"
    assert not floor.missed, f"trades of {sorted(floor.missed)} were not there within {FLOOR_SECONDS_MAX:g} s"
    return f"{'; '.join(seen)}; no price older than {floor.oldest_seconds:.1f} s, and no trade missed"


async def _dropped(system: System) -> str:
    """Break the streams off: they are there again soon, each with one attempt."""
    async with _shown_by(system, await lease_holder(system)):
        since = utc_now()
        await control(system, "POST", STREAM, {"kind": "drop"})
        await eventually(lambda: streams_are_lost(system))
        seconds = await streams_carry(system)
        tried = len(await attempts(system, since))
        assert tried == 2, f"{tried} attempts for two streams"
    return f"dropped: carried again after {seconds:.1f} s"


async def _handshakes_refused(system: System) -> str:
    """Refuse both streams several times: of each the first pauses are drawn from the same stretch, by chance."""
    stages: list[list[float]] = [[] for _ in range(STAGES)]
    for _ in range(REFUSED_TIMES):
        holder = await _begin_anew(system)
        async with _shown_by(system, holder), faulty(system, "refuse_handshake", door=STREAM, status=503):
            since = utc_now()
            await control(system, "POST", STREAM, {"kind": "drop"})
            pauses = await eventually(partial(_pauses, system, since), timeout=REFUSED_SECONDS_MAX, every=0.2)
        for found in pauses.values():
            for stage, pause in zip(stages, found, strict=False):
                stage.append(pause)
    _check_no_storm(chain.from_iterable(stages), PAUSE_SECONDS_MIN)
    for stage in stages:
        # Several clients that lost their streams together must not come back together.
        spread = max(stage) - min(stage)
        assert spread >= SPREAD_SECONDS_MIN, f"pauses without chance: {sorted(stage)}"
    return f"refused {REFUSED_TIMES} times: tried {'; then '.join(map(_in_words, stages))}"


async def _mute(system: System) -> str:
    began = time.monotonic()
    holder = await lease_holder(system)
    async with _shown_by(system, holder) as lookout, faulty(system, "mute", door=STREAM):
        await lookout.wait_until_shown(MUTE_SEEN_SECONDS_MAX)
        seconds = time.monotonic() - began
    await streams_carry(system)
    return f"mute: found out after {seconds:.0f} s"


async def _frozen(system: System) -> str:
    """Freeze the streams, their pongs too: they are given up, and made anew when they go on."""
    holder = await _begin_anew(system)
    async with _shown_by(system, holder), faulty(system, "freeze", door=STREAM):
        since = utc_now()
        await eventually(lambda: streams_are_lost(system), timeout=FROZEN_SEEN_SECONDS_MAX)
        seconds = (utc_now() - since).total_seconds()
    back = await streams_carry(system)
    return f"frozen: given up after {seconds:.0f} s, carried again {back:.1f} s after"


async def _second_connection(system: System) -> str:
    """Take the account's place at the stream of stocks: Alpaca lets one in."""
    holder = await _begin_anew(system)
    since = utc_now()
    headers = {
        "APCA-API-KEY-ID": SIMULATED_KEYS["ALPACA_API_KEY"],
        "APCA-API-SECRET-KEY": SIMULATED_KEYS["ALPACA_SECRET_KEY"],
    }

    async def is_free() -> bool:
        streams = (await control(system, "GET", "status"))["streams"]
        return all(stream["path"] != STOCKS_PATH for stream in streams)

    refused = replace(LOST, metric=REFUSED_FOR_OTHER, words="connection limit")
    async with shown(system, refused, by=[holder]) as lookout:
        await control(system, "POST", STREAM, {"kind": "drop", "path": STOCKS_PATH})
        await eventually(is_free)  # long before the feeder comes back
        async with system.http.ws_connect(
            f"{system.market.health_url}{STOCKS_PATH}", headers=headers
        ) as other:
            greetings = [await other.receive_json() for _ in range(2)]
            assert greetings[1][0]["msg"] == "authenticated", greetings
            await lookout.wait_until_shown(OTHER_SEEN_SECONDS_MAX)
    seconds = await streams_carry(system)
    pauses = _between((await _attempts_by_path(system, since))[STOCKS_PATH])[1:]  # the first attempt is ours
    _check_no_storm(pauses, OTHER_CONNECTION_PAUSE_SECONDS_MIN)
    return f"second connection (406): carried again {seconds:.0f} s after it left"


async def _symbol_limit(system: System) -> str:
    """Let fewer symbols in (405): the feeder finds out how many, and polls the rest."""
    feeders = system.services["price_feeder"]
    since = utc_now()
    async with (
        shown(system, LIMITED, by=[await lease_holder(system)]),
        faulty(system, "symbol_limit", door=STREAM, symbols_max=SYMBOLS_MAX),
    ):
        await control(system, "POST", STREAM, {"kind": "drop"})

        async def is_found() -> bool:
            limit = await total(feeders, 'price_feeder_stream_symbols_max{stream="equity"}')
            return limit == await total(feeders, CARRIED) == SYMBOLS_MAX

        await eventually(is_found, timeout=40)
        tried = len(await attempts(system, since))
        assert tried <= 4, f"{tried} attempts for two streams"
    await change_lease_holder(system)  # a limit is remembered for an hour

    async def are_all() -> bool:
        return await total(feeders, CARRIED) > SYMBOLS_MAX

    await eventually(are_all, timeout=30)
    await streams_carry(system)
    return f"symbol limit (405): {SYMBOLS_MAX} carried, the rest polled"


async def _begin_anew(system: System) -> Service:
    """Let another feeder have the streams, whose pauses have not grown by what went before; return it."""
    holder = await change_lease_holder(system)
    await streams_carry(system)
    return holder


def _shown_by(system: System, holder: Service) -> AbstractAsyncContextManager[Lookout]:
    """Demand that the feeder which has the streams shows that they are lost."""
    return shown(system, LOST, by=[holder])


async def _attempts_by_path(system: System, since: datetime) -> dict[str, list[datetime]]:
    at = defaultdict(list)
    for path, moment in await attempts(system, since):
        at[path].append(moment)
    return at


async def _pauses(system: System, since: datetime) -> dict[str, list[float]]:
    """Return by path the seconds between the attempts to open it; each must have been tried often enough."""
    pauses = {path: _between(at) for path, at in (await _attempts_by_path(system, since)).items()}
    assert [len(found) >= STAGES for found in pauses.values()] == [True] * len(STREAMS), (
        f"tried after {pauses}"
    )
    return pauses


def _between(at: Sequence[datetime]) -> list[float]:
    return [(later - earlier).total_seconds() for earlier, later in pairwise(at)]


def _check_no_storm(pauses: Iterable[float], seconds_min: float) -> None:
    shortest = min(pauses, default=None)
    assert shortest is not None, "nobody tried again"
    assert shortest >= seconds_min, f"tried again after {shortest:.2f} s"


def _in_words(pauses: Iterable[float]) -> str:
    return f"after {', '.join(f'{pause:.1f}' for pause in sorted(pauses))} s"


ROWS = (
    Row(
        19,
        "streams drop, are mute, frozen, refused (406, 405)",
        "by the market, and a second connection",
        _streams,
        signs=(LOST,),
    ),
)
