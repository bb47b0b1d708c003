"""A snapshotter's statement, held when it has written all rows of a shard and before it is committed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, TypeAlias

import asyncpg

from tests.faults.rows.row import STRUCK_SECONDS_MAX
from tests.faults.system import SHARDS
from tests.waiting import eventually

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
HELD = 1
"""The advisory lock that a held statement waits for."""
# The trigger is the last thing before the commit. Of all statements only the first is held; by the other advisory lock
# that it takes it says which slot it is of, and one of the users.
_HOLD = """
CREATE SEQUENCE statements_to_hold;
CREATE FUNCTION hold_statement() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    slot INTEGER := (SELECT extract(epoch FROM min(timestamp)) FROM written);
    user_id INTEGER := (SELECT min(written.user_id) FROM written);
BEGIN
    IF slot IS NOT NULL AND nextval('statements_to_hold') = 1 THEN
        PERFORM pg_advisory_xact_lock_shared(slot, user_id);
        PERFORM pg_advisory_xact_lock_shared(1);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER hold_statement AFTER INSERT ON position_snapshots
REFERENCING NEW TABLE AS written
FOR EACH STATEMENT EXECUTE FUNCTION hold_statement();
"""
_HOLD_NO_MORE = """
DROP TRIGGER hold_statement ON position_snapshots;
DROP FUNCTION hold_statement;
DROP SEQUENCE statements_to_hold;
"""
_HELD_STATEMENT = """
SELECT waiting.pid, client_port, shard.classid::bigint AS slot, shard.objid::bigint AS user_id
FROM pg_locks AS waiting
JOIN pg_locks AS shard ON shard.pid = waiting.pid AND shard.locktype = 'advisory' AND shard.objsubid = 2
JOIN pg_stat_activity AS activity ON activity.pid = waiting.pid
WHERE waiting.locktype = 'advisory' AND NOT waiting.granted
"""


class Held(NamedTuple):
    """A statement that is held."""

    pid: int
    """Of the process of PostgreSQL that carries it out."""
    client_port: int
    slot: datetime
    shard: int


@asynccontextmanager
async def held(connection: Connection) -> AsyncIterator[Held]:
    """Hold the next statement that has written all rows of a shard until the block ends, and it alone."""
    await connection.execute("SELECT pg_advisory_lock($1)", HELD)
    await connection.execute(_HOLD)
    try:
        found = await eventually(partial(_held_statement, connection), timeout=STRUCK_SECONDS_MAX)
        assert found is not None
        yield found
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", HELD)
        await connection.execute(_HOLD_NO_MORE)


async def _held_statement(connection: Connection) -> Held | None:
    row = await connection.fetchrow(_HELD_STATEMENT)
    if row is None:
        return None
    slot = datetime.fromtimestamp(row["slot"], UTC)
    return Held(row["pid"], row["client_port"], slot, row["user_id"] % SHARDS)
