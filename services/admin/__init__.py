"""The operator's commands: users, cash, positions and bearer tokens, from the command line.

Reads and writes `users` and `positions` in PostgreSQL; deleting a user also deletes that user's snapshots.
Publishes nothing. Exit codes: 0 done, 1 not done (one line on stderr says why), 2 wrong usage or settings.
"""
