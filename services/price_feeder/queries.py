"""The price feeder's SQL."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType

import asyncpg

from services.price_feeder.trades import LastTrade
from shared import refreshes
from shared.database import Connection, Database
from shared.messages import PriceTick
from shared.refreshes import Kind


@dataclass(frozen=True)
class CachedPrice:
    """A row of the price cache: the last trade, and when the feed last confirmed that it is the last."""

    tick: PriceTick
    confirmed_at: datetime


@dataclass(frozen=True)
class Term:
    """The time of one feeder that holds the lease; every write carries it."""

    holder: str
    number: int
    """Grows with every term, whoever has it."""


class LeaseLost(Exception):
    """Another feeder has the lease, or nobody: what was to be written was not."""


@dataclass(frozen=True)
class Stored:
    """What a batch of trades did to the cache."""

    changed: tuple[PriceTick, ...]
    confirmed: frozenset[str]
    """Symbols whose cached price is now known to be the last, the changed ones included."""


LEASE = "price_feed"
POSITIONS_COUNTED_MAX = 300_000

_NONE_WITHDRAWN: Mapping[str, datetime] = MappingProxyType({})

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

# Counts all positions while they are few, and else those on a share of the pages, always the same ones: a good estimate
# of who is most widely held, whose cost does not grow.
MOST_WIDELY_HELD = """
SELECT ticker
FROM positions TABLESAMPLE SYSTEM ($3) REPEATABLE (0)
WHERE shares > 0 AND (strpos(ticker, '/') > 0) = $1
GROUP BY ticker
ORDER BY count(*) DESC, ticker
LIMIT $2
"""

POSITIONS_ESTIMATE = """
SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'positions'::regclass
"""

# Per symbol one of three things happens.
# - The trade is newer than the cached one, or one of the two is simulated and the other real: it replaces the cached
#   one. (A recorded market must not hide the real one behind its dates, nor the other way round.) So it does when the
#   cached one is among the withdrawn ($10, $11), however old the trade is.
# - It is as old as the cached one: that is confirmed to be the last. The cached price stays also when this one's
#   differs: of several trades in one microsecond the first seen counts, so that the price cannot swing. Only trades
#   that are known to come in their order ($9) go on from the first to the last of them.
# - It is older: the answer came out of order and says nothing. The row stays as it is, unconfirmed.
# A confirmation from the future, left by a clock that was wrong, does not outlast the next one.
# Rows are written in symbol order, so that two writers cannot deadlock. Written twice, the second time says the same.
# All this only while the writer holds the lease: else nothing is written, and `holds` says so.
STORE_TRADES = """
WITH held AS MATERIALIZED (
    SELECT FROM leases
    WHERE name = $6 AND holder = $7 AND term = $8 AND expires_at > clock_timestamp()
),
stored AS (
    INSERT INTO asset_prices AS cached (symbol, price, traded_at, received_at, updated_at, feed)
    SELECT trade.symbol, trade.price, trade.traded_at, $5, $5, trade.feed
    FROM unnest($1::text[], $2::numeric[], $3::timestamptz[], $4::text[])
        AS trade (symbol, price, traded_at, feed)
    WHERE EXISTS (SELECT FROM held)
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
                OR (
                    EXCLUDED.price <> cached.price
                    AND $9 AND EXCLUDED.traded_at = cached.traded_at AND EXCLUDED.feed = cached.feed
                )
                OR (
                    (EXCLUDED.price, EXCLUDED.traded_at) <> (cached.price, cached.traded_at)
                    AND (cached.symbol, cached.traded_at) IN (SELECT * FROM unnest($10::text[], $11::timestamptz[]))
                )
            )
        )
    WHERE EXCLUDED.traded_at >= cached.traded_at
        OR (EXCLUDED.feed = 'simulated') <> (cached.feed = 'simulated')
        OR (cached.symbol, cached.traded_at) IN (SELECT * FROM unnest($10::text[], $11::timestamptz[]))
    RETURNING symbol, sequence, received_at = $5 AS changed
)
SELECT lease.holds, stored.*
FROM (SELECT EXISTS (SELECT FROM held) AS holds) AS lease
LEFT JOIN stored ON TRUE
"""

# A term is granted when there is no holder, when his has run out, or when it lasts longer than any is granted for: then
# the server's clock has gone back. Who has held it last may have it again at once.
ACQUIRE_LEASE = """
WITH taken AS (
    INSERT INTO leases AS lease (name, holder, term, expires_at)
    VALUES ($1, $2, 1, clock_timestamp() + $3)
    ON CONFLICT (name) DO UPDATE SET
        holder = EXCLUDED.holder,
        term = lease.term + 1,
        expires_at = clock_timestamp() + $3
    WHERE lease.holder = EXCLUDED.holder
        OR lease.expires_at <= clock_timestamp()
        OR lease.expires_at > clock_timestamp() + $3
    RETURNING term
)
SELECT
    (SELECT term FROM taken) AS term,
    (SELECT holder FROM leases WHERE name = $1 AND expires_at > '-infinity') AS holder_before
"""

RENEW_LEASE = """
UPDATE leases
SET expires_at = clock_timestamp() + $4
WHERE name = $1 AND holder = $2 AND term = $3
RETURNING term
"""

# The row stays, and with it the count of terms.
RELEASE_LEASE = """
UPDATE leases
SET expires_at = '-infinity'
WHERE name = $1 AND holder = $2 AND term = $3
"""

SYMBOLS_OF_USER = """
SELECT ticker
FROM positions
LEFT JOIN asset_prices ON asset_prices.symbol = positions.ticker
WHERE user_id = $1 AND shares > 0
ORDER BY asset_prices.updated_at NULLS FIRST, ticker
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


async def most_widely_held(database: Database, *, is_pair: bool, count_max: int) -> list[str]:
    """Return the symbols that most users hold, the first the most, ties by name; of crypto pairs or of equities."""
    positions: int = await database.fetch_value(POSITIONS_ESTIMATE)
    percent = min(100.0, 100.0 * POSITIONS_COUNTED_MAX / max(positions, 1))
    rows = await database.fetch(MOST_WIDELY_HELD, is_pair, count_max, percent)
    return [row["ticker"] for row in rows]


async def store_trades(
    database: Database,
    term: Term,
    trades: Iterable[LastTrade],
    received_at: datetime,
    *,
    in_order: bool = False,
    withdrawn: Mapping[str, datetime] = _NONE_WITHDRAWN,
) -> Stored:
    """Merge trades, one per symbol, into the cache, and commit; the newer trade wins.

    `in_order` says that of trades of one instant the later batch has the later one. `withdrawn` maps symbols to the
    time of a trade that does not count any more: if it is the cached one, any other takes its place. Raises LeaseLost
    when `term` is over; then nothing was written.
    """
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
        LEASE,
        term.holder,
        term.number,
        in_order,
        list(withdrawn),
        list(withdrawn.values()),
    )
    if not rows[0]["holds"]:
        raise LeaseLost(f"term {term.number} is over")
    if rows[0]["symbol"] is None:
        return Stored((), frozenset())
    stored = {trade.symbol: trade for trade in batch}
    changed = (
        _stored_tick(stored[symbol], received_at, sequence) for _, symbol, sequence, is_new in rows if is_new
    )
    return Stored(tuple(changed), frozenset(row["symbol"] for row in rows))


async def acquire_lease(database: Database, holder: str, lasts: timedelta) -> tuple[Term | None, str | None]:
    """Take the lease if it is free; return the new term, or None, and who had it before and did not release it."""
    row = await database.fetch_row(ACQUIRE_LEASE, LEASE, holder, lasts)
    assert row is not None
    term = None if row["term"] is None else Term(holder, row["term"])
    return term, row["holder_before"]


async def renew_lease(database: Database, term: Term, lasts: timedelta) -> bool:
    """Let a term last longer; return False when another one has begun."""
    renewed = await database.fetch_value(RENEW_LEASE, LEASE, term.holder, term.number, lasts)
    return renewed is not None


async def release_lease(database: Database, term: Term) -> None:
    """End a term, so that another feeder need not wait until it runs out."""
    await database.fetch(RELEASE_LEASE, LEASE, term.holder, term.number)


async def grant_refresh(
    database: Database, user_id: int, requested_at: datetime, cooldown: timedelta
) -> list[str]:
    """Count a user's request for prices, and commit; return what he holds, the least recently confirmed first.

    Raises Refused for an unknown or deactivated user, and for a request within `cooldown` of the last one.
    """

    async def grant(connection: Connection) -> list[str]:
        await refreshes.grant(connection, Kind.PRICES, user_id, requested_at, cooldown)
        return [row["ticker"] for row in await connection.fetch(SYMBOLS_OF_USER, user_id)]

    return await database.transact(grant)


async def cached_prices(database: Database, symbols: Sequence[str]) -> dict[str, CachedPrice]:
    """Return the cached prices of those of `symbols` that have one."""
    rows = await database.fetch(CACHED_PRICES, symbols)
    return {row["symbol"]: CachedPrice(_tick(row), row["updated_at"]) for row in rows}


async def cached_price(database: Database, symbol: str) -> CachedPrice | None:
    """Return the cached price of `symbol`, or None when it has none."""
    return (await cached_prices(database, [symbol])).get(symbol)


def _stored_tick(trade: LastTrade, received_at: datetime, sequence: int) -> PriceTick:
    """Return the tick of a stored trade; reading back what was just sent would cost twice as much."""
    return PriceTick(
        symbol=trade.symbol,
        price=trade.price,
        traded_at=trade.traded_at,
        received_at=received_at,
        feed=trade.feed,
        sequence=sequence,
    )


def _tick(row: asyncpg.Record) -> PriceTick:
    return PriceTick(
        symbol=row["symbol"],
        price=row["price"],
        traded_at=row["traded_at"],
        received_at=row["received_at"],
        feed=row["feed"],
        sequence=row["sequence"],
    )
