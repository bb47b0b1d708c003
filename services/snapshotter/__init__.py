"""The snapshotter: on every slot, values and stores all portfolios with their positions.

Reads `users`, `positions` and `asset_prices` (through the views that hold the valuation) and the subject
`timer.v1.snapshot`. Writes `portfolio_snapshots` and `position_snapshots`, makes their rollups
(`portfolio_rollups_*`) and partitions, and drops what is expired. Publishes `timer.v1.snapshot` (its timer)
and `portfolio.v1.snapshots_taken`.

Any number of replicas may run: the stream makes one message of their timers' copies, gives each shard to one of them,
and the unique key (user, slot) turns a second delivery into nothing.
"""
