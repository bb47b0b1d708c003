"""The snapshotter: on every slot, values and stores all portfolios with their positions.

Reads `users`, `positions` and `asset_prices` (through the views that hold the valuation) and the subject
`timer.v1.snapshot`; answers `portfolio.v1.snapshot_requested`. Writes `portfolio_snapshots`, `position_snapshots` and
`refreshes`, makes rollups (`portfolio_rollups_*`) and partitions, and drops what is expired. Publishes
`timer.v1.snapshot` (its timer), `portfolio.v1.snapshots_taken` and `portfolio.v1.requested_snapshot_taken`.

Any number of replicas may run: the stream makes one message of their timers' copies, gives each shard to one of them,
and the unique key (user, slot) turns a second delivery into nothing.
"""
