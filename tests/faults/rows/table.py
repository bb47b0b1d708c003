"""All rows, in their order."""

from tests.faults.rows import clients, disk, feeders, market, market_streams, redundancy, servers, snapshots
from tests.faults.rows.row import Row

_MODULES = (clients, disk, feeders, market, market_streams, redundancy, servers, snapshots)

ROWS: tuple[Row, ...] = tuple(
    sorted((row for module in _MODULES for row in module.ROWS), key=lambda row: row.number)
)
