"""What users may ask for by hand, and how often: `refreshes` holds the last request of each that was granted."""

import math
from datetime import datetime, timedelta
from enum import StrEnum

from shared.database import Connection
from shared.requests import Refused

AGE_MAX = timedelta(seconds=10)
"""How far a request's time may be from the responder's clock: a gateway waits for eight seconds, and clocks differ."""

# Held until the end of the transaction, so that the user is not deleted before it commits.
HOLD_USER = "SELECT is_active FROM users WHERE id = $1 FOR KEY SHARE"

# The same request again is granted again, so that asking twice does no harm. One from the future was left by a clock
# that was wrong; it does not count. Of many at once the first is granted, and the others find its row.
GRANT = """
INSERT INTO refreshes AS last (user_id, kind, requested_at)
VALUES ($1, $2, $3)
ON CONFLICT (user_id, kind) DO UPDATE SET requested_at = EXCLUDED.requested_at
WHERE last.requested_at = EXCLUDED.requested_at
    OR last.requested_at <= EXCLUDED.requested_at - $4::interval
    OR last.requested_at > EXCLUDED.requested_at + $5::interval
RETURNING TRUE
"""

LAST_GRANTED = "SELECT requested_at FROM refreshes WHERE user_id = $1 AND kind = $2"


class Kind(StrEnum):
    PRICES = "prices"
    SNAPSHOT = "snapshot"


def check_time(requested_at: datetime, now: datetime) -> None:
    """Raise Refused for a request that is not of `now`."""
    if abs(now - requested_at) > AGE_MAX:
        raise Refused(400, f"requested_at is more than {AGE_MAX.total_seconds():g} s away from now")


async def grant(
    connection: Connection, kind: Kind, user_id: int, requested_at: datetime, cooldown: timedelta
) -> None:
    """Count a user's request, inside a transaction that then holds him; raises Refused when it may not be granted."""
    is_active = await connection.fetchval(HOLD_USER, user_id)
    if is_active is None:
        raise Refused(404, "there is no such user")
    if not is_active:
        raise Refused(403, "the user is deactivated")
    if await connection.fetchval(GRANT, user_id, kind, requested_at, cooldown, 2 * AGE_MAX):
        return
    last = await connection.fetchval(LAST_GRANTED, user_id, kind)
    wait_seconds = max(1, math.ceil((last + cooldown - requested_at).total_seconds()))
    raise Refused(429, f"granted once in {cooldown.total_seconds():g} s", wait_seconds)
