"""The operator's commands: users, cash, positions, bearer tokens and dead letters, from the command line.

Reads and writes `users` and `positions` in PostgreSQL; deleting a user also deletes that user's snapshots. Reads and
deletes dead letters on the bus, and publishes their messages again, where they were. Exit codes: 0 done, 1 not done
(one line on stderr says why), 2 wrong usage or settings.
"""
