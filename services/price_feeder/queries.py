"""The price feeder's SQL."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from services.price_feeder.trades import LastTrade
from shared.database import Database
from shared.messages import PriceTick


@dataclass(frozen=True)
class CachedPrice:
    """A row of the price cache: the last trade, and when the feed last confirmed that it is the last."""

    tick: PriceTick
    confirmed_at: datetime


@dataclass(frozen=True)
class Stored:
    """What a batch of trades did to the cache."""

    changed: tuple[PriceTick, ...]
    confirmed: frozenset[str]
    """Symbols whose cached price is now known to be the last, the changed ones included."""


# Steps from one held ticker to the next through positions_held_ticker_idx: the work follows the symbols, not the
# positions, of which every symbol may have 100,000.
HELD_SYMBOLS = """
WITH RECURSIVE held (symbol) AS (
    (SELECT ticker FROM positions WHERE shares > 0 ORDER BY ticker LIMIT 1)
    UNION ALL
    SELECT (SELECT ticker FROM positions WHERE shares > 0 AND ticker > held.symbol ORDER BY ticker LIMIT 1)
    FROM held
    WHERE held.symbol IS NOT NULL
)
SELECT held.symbol
FROM held
LEFT JOIN asset_prices ON asset_prices.symbol = held.symbol
WHERE held.symbol IS NOT NULL
ORDER BY asset_prices.updated_at NULLS FIRST, held.symbol
"""

# Per symbol one of three things happens.
# - The trade is newer than the cached one, or one of the two is simulated and the other real: it replaces the cached
#   one. (A recorded market must not hide the real one behind its dates, nor the other way round.)
# - It is as old as the cached one: that is confirmed to be the last. The cached price stays also when this one's
#   differs: of several trades in one microsecond the first seen counts, so that the price cannot swing.
# - It is older: the answer came out of order and says nothing. The row stays as it is, unconfirmed.
# A confirmation from the future, left by a clock that was wrong, does not outlast the next one.
# Rows are written in symbol order, so that two writers cannot deadlock. Written twice, the second time says the same.
STORE_TRADES = """
INSERT INTO asset_prices AS cached (symbol, price, traded_at, received_at, updated_at, feed)
SELECT trade.symbol, trade.price, trade.traded_at, $5, $5, trade.feed
FROM unnest($1::text[], $2::numeric[], $3::timestamptz[], $4::text[])
    AS trade (symbol, price, traded_at, feed)
ORDER BY trade.symbol
ON CONFLICT (symbol) DO UPDATE SET
    updated_at = CASE
        WHEN cached.updated_at > EXCLUDED.updated_at + interval '1 minute' THEN EXCLUDED.updated_at
        ELSE GREATEST(cached.updated_at, EXCLUDED.updated_at)
    END,
    (price, traded_at, received_at, feed, sequence) = (
        SELECT chosen.price, chosen.traded_at, chosen.received_at, chosen.feed, chosen.sequence
        FROM (VALUES
            (TRUE, EXCLUDED.price, EXCLUDED.traded_at, EXCLUDED.received_at, EXCLUDED.feed, cached.sequence + 1),
            (FALSE, cached.price, cached.traded_at, cached.received_at, cached.feed, cached.sequence)
        ) AS chosen (replaces, price, traded_at, received_at, feed, sequence)
        WHERE chosen.replaces = (
            EXCLUDED.traded_at > cached.traded_at
            OR (EXCLUDED.feed = 'simulated') <> (cached.feed = 'simulated')
        )
    )
WHERE EXCLUDED.traded_at >= cached.traded_at
    OR (EXCLUDED.feed = 'simulated') <> (cached.feed = 'simulated')
RETURNING symbol, price, traded_at, received_at, feed, sequence, received_at = $5 AS changed
"""

CACHED_PRICES = """
SELECT symbol, price, traded_at, received_at, feed, sequence, updated_at
FROM asset_prices
WHERE symbol = ANY ($1::text[])
ORDER BY symbol
"""


async def held_symbols(database: Database) -> list[str]:
    """Return every symbol that somebody holds, the least recently confirmed first."""
    return [row["symbol"] for row in await database.fetch(HELD_SYMBOLS)]


async def store_trades(database: Database, trades: Iterable[LastTrade], received_at: datetime) -> Stored:
    """Merge trades, one per symbol, into the cache, and commit; the newer trade wins."""
    batch = list(trades)
    if not batch:
        return Stored((), frozenset())
    rows = await database.fetch(
        STORE_TRADES,
        [trade.symbol for trade in batch],
        [trade.price for trade in batch],
        [trade.traded_at for trade in batch],
        [trade.feed for trade in batch],
        received_at,
    )
    return Stored(
        tuple(_tick(row) for row in rows if row["changed"]), frozenset(row["symbol"] for row in rows)
    )


async def cached_prices(database: Database, symbols: Sequence[str]) -> dict[str, CachedPrice]:
    """Return the cached prices of those of `symbols` that have one."""
    rows = await database.fetch(CACHED_PRICES, symbols)
    return {row["symbol"]: CachedPrice(_tick(row), row["updated_at"]) for row in rows}


async def cached_price(database: Database, symbol: str) -> CachedPrice | None:
    """Return the cached price of `symbol`, or None when it has none."""
    return (await cached_prices(database, [symbol])).get(symbol)


def _tick(row: asyncpg.Record) -> PriceTick:
    return PriceTick(
        symbol=row["symbol"],
        price=row["price"],
        traded_at=row["traded_at"],
        received_at=row["received_at"],
        feed=row["feed"],
        sequence=row["sequence"],
    )
