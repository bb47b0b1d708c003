"""All rows, in their order."""

from tests.faults.rows import disk, feeders, servers, snapshots
from tests.faults.rows.row import Row

ROWS: tuple[Row, ...] = tuple(
    sorted((*snapshots.ROWS, *feeders.ROWS, *servers.ROWS, *disk.ROWS), key=lambda row: row.number)
)
