"""Answers what symbols cost, from the cache; every feeder does, also one that does not hold the lease."""

import asyncio

from services.price_feeder import queries
from shared.bus import Bus, Refused
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.messages import PRICES_REQUESTED, CurrentPrice, PricesReply, PricesRequested

QUEUE = "price_feeder"
AT_ONCE_MAX = 256
ANSWER_SECONDS_MAX = 5.0
RETRY_SECONDS = 2


async def run(database: Database, bus: Bus, stop: asyncio.Event) -> None:
    """Answer until `stop`, one after the other: of the few connections to the database, polling needs the rest."""
    turn = asyncio.Lock()

    async def answer(payload: bytes) -> PricesReply:
        symbols = PricesRequested.model_validate_json(payload).symbols
        async with turn:
            return await prices(database, symbols)

    await bus.serve(
        PRICES_REQUESTED,
        answer,
        stop,
        queue=QUEUE,
        at_once_max=AT_ONCE_MAX,
        answer_seconds_max=ANSWER_SECONDS_MAX,
    )


async def prices(database: Database, symbols: tuple[str, ...]) -> PricesReply:
    """Return the cached prices of `symbols`, each once; raises Refused while the cache cannot be read."""
    wanted = list(dict.fromkeys(symbols))
    try:
        cached = await queries.cached_prices(database, wanted)
    except (DatabaseUnavailable, SchemaMissing) as error:
        raise Refused(503, "the price cache cannot be read", RETRY_SECONDS) from error
    return PricesReply(
        prices=tuple(
            CurrentPrice(**dict(cached[symbol].tick), confirmed_at=cached[symbol].confirmed_at)
            for symbol in wanted
            if symbol in cached
        ),
        unknown=tuple(symbol for symbol in wanted if symbol not in cached),
    )
