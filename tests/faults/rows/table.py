"""All rows, in their order."""

from tests.faults.rows import (
    clients,
    clock,
    disk,
    feeders,
    market,
    market_streams,
    network,
    redundancy,
    servers,
    snapshots,
    stopping,
)
from tests.faults.rows.row import Row

_MODULES = (
    clients,
    clock,
    disk,
    feeders,
    market,
    market_streams,
    network,
    redundancy,
    servers,
    snapshots,
    stopping,
)

ROWS: tuple[Row, ...] = tuple(
    sorted((row for module in _MODULES for row in module.ROWS), key=lambda row: row.number)
)
