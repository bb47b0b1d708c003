"""Demo portfolios, and a year of their history valued at the simulated market's own past prices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from services.market_simulator.synthetic import SyntheticMarket
from shared.clock import last_boundary
from shared.database import Connection, Database

DETAILS_REACH = timedelta(days=35)
"""For how long the snapshotter keeps the details of positions, by default."""
HISTORY_TIMEOUT_SECONDS = 60.0
REPLAYED_POSITIONS_MAX = 10


@dataclass(frozen=True)
class DemoUser:
    subject: str
    cash: str
    positions: tuple[tuple[str, str, str], ...]
    """Ticker, shares, cost basis."""


DEMO_USERS = (
    DemoUser(
        "demo",
        "5000.50",
        (
            ("AAPL", "40", "7600.00"),
            ("MSFT", "15", "6150.00"),
            ("BRK.B", "12", "5280.00"),
            ("SPY", "25", "13250.00"),
            ("BTC/USD", "0.35", "24500.00"),
        ),
    ),
    DemoUser(
        "alice",
        "12850.00",
        (("NVDA", "120", "15600.00"), ("TSLA", "30", "7950.00"), ("ETH/USD", "4.25", "12750.00")),
    ),
    DemoUser("bob", "2500.00", (("QQQ", "18.5", "8880.00"), ("JPM", "60", "13200.00"))),
)

# How far back each width of slot reaches: every timeframe's buckets are filled, no denser than they show.
_DENSITIES = (
    (timedelta(minutes=5), timedelta(days=2)),
    (timedelta(minutes=30), timedelta(days=8)),
    (timedelta(hours=1), timedelta(days=31)),
    (timedelta(hours=3), timedelta(days=91)),
    (timedelta(days=1), timedelta(days=366)),
)


def users_of_replay(symbols: Sequence[str]) -> tuple[DemoUser, ...]:
    """Portfolios of what a replay has prices for."""
    held = tuple((symbol, "100", "10000.00") for symbol in symbols[:REPLAYED_POSITIONS_MAX])
    return tuple(DemoUser(user.subject, user.cash, held) for user in DEMO_USERS)


async def fill(
    database: Database,
    now: datetime,
    *,
    history: SyntheticMarket | None,
    users: Sequence[DemoUser] = DEMO_USERS,
) -> int:
    """Create the demo users, with a year of history when a market is given; return the snapshots made.

    Does nothing when the database has any user. All or nothing: it is one transaction.
    """
    async with database.transaction() as connection:
        if await connection.fetchval("SELECT EXISTS (SELECT FROM users)"):
            return 0
        await _create_users(connection, users)
        if history is None:
            return 0
        await _load_prices(connection, history, users, now)
        return await _value_history(connection)


async def _create_users(connection: Connection, users: Sequence[DemoUser]) -> None:
    for user in users:
        user_id = await connection.fetchval(
            "INSERT INTO users (subject, cash_balance) VALUES ($1, $2) RETURNING id",
            user.subject,
            Decimal(user.cash),
        )
        await connection.executemany(
            "INSERT INTO positions (user_id, ticker, shares, cost_basis) VALUES ($1, $2, $3, $4)",
            [(user_id, ticker, Decimal(shares), Decimal(cost)) for ticker, shares, cost in user.positions],
        )


async def _load_prices(
    connection: Connection, market: SyntheticMarket, users: Sequence[DemoUser], now: datetime
) -> None:
    await connection.execute(
        "CREATE TEMPORARY TABLE past_prices (symbol TEXT, at TIMESTAMPTZ, price NUMERIC(15, 4)) ON COMMIT DROP"
    )
    symbols = {ticker for user in users for ticker, _, _ in user.positions}
    instants = list(history_instants(now))
    await connection.copy_records_to_table(
        "past_prices",
        records=((symbol, at, market.price(symbol, at)) for symbol in sorted(symbols) for at in instants),
        timeout=HISTORY_TIMEOUT_SECONDS,
    )
    await connection.execute("ANALYZE past_prices")


async def _value_history(connection: Connection) -> int:
    """Value the portfolios at past prices as the snapshotter values them at current ones."""
    await connection.fetch(
        """
        SELECT
            make_history_partitions(min(at), max(at), '{raw,30m,1h,3h}'),
            make_history_partitions(max(at) - $1::interval, max(at), '{details}')
        FROM past_prices
        """,
        DETAILS_REACH,
        timeout=HISTORY_TIMEOUT_SECONDS,
    )
    made = await connection.fetch(
        """
        INSERT INTO portfolio_snapshots
            (timestamp, user_id, cash_balance, investment_value, total_value, simulated)
        SELECT at, users.id, cash_balance, sum(round(shares * price, 2)),
            cash_balance + sum(round(shares * price, 2)), TRUE
        FROM users
        JOIN positions ON positions.user_id = users.id
        JOIN past_prices ON past_prices.symbol = positions.ticker
        GROUP BY users.id, at
        ORDER BY at, users.id
        RETURNING user_id
        """,
        timeout=HISTORY_TIMEOUT_SECONDS,
    )
    await connection.execute(
        """
        INSERT INTO position_snapshots
            (timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share)
        SELECT at, user_id, ticker, shares, cost_basis, round(shares * price, 2), price
        FROM positions
        JOIN past_prices ON past_prices.symbol = ticker
        WHERE at >= (SELECT max(at) FROM past_prices) - $1::interval
        ORDER BY at, user_id
        """,
        DETAILS_REACH,
        timeout=HISTORY_TIMEOUT_SECONDS,
    )
    return len(made)


def history_instants(now: datetime) -> Iterator[datetime]:
    """Yield a year of slots before the current one, oldest first: days, then ever narrower up to five minutes."""
    slots: set[datetime] = set()
    for width, reach in _DENSITIES:
        at = last_boundary(now, width)
        while at > now - reach:
            slots.add(at)
            at -= width
    slots.discard(last_boundary(now, _DENSITIES[0][0]))  # the snapshotter's own
    yield from sorted(slots)
