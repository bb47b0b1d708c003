"""All rows, in their order."""

from tests.faults.rows import clock, disk, feeders, network, servers, snapshots, stopping
from tests.faults.rows.row import Row

ROWS: tuple[Row, ...] = tuple(
    sorted(
        (
            *snapshots.ROWS,
            *feeders.ROWS,
            *servers.ROWS,
            *disk.ROWS,
            *network.ROWS,
            *clock.ROWS,
            *stopping.ROWS,
        ),
        key=lambda row: row.number,
    )
)
