"""All rows, in their order."""

from tests.faults.rows import clients, feeders, market, market_streams, servers, snapshots
from tests.faults.rows.row import Row

ROWS: tuple[Row, ...] = tuple(
    sorted(
        (*snapshots.ROWS, *feeders.ROWS, *servers.ROWS, *market.ROWS, *market_streams.ROWS, *clients.ROWS),
        key=lambda row: row.number,
    )
)
