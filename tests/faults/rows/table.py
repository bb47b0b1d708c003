"""All rows, in their order."""

from tests.faults.rows import feeders, market, servers, snapshots
from tests.faults.rows.row import Row

ROWS: tuple[Row, ...] = tuple(
    sorted((*snapshots.ROWS, *feeders.ROWS, *servers.ROWS, *market.ROWS), key=lambda row: row.number)
)
