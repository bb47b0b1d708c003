"""Tickets to the portfolio stream, for browsers, which cannot send a header with an EventSource or a WebSocket.

A ticket stands in the address, where logs and histories may keep it: it is good for half a minute, and for one stream
in the world. The bus keeps what it stands for, under its digest; who takes it there has it alone.
"""

import asyncio
import hashlib
import re
import secrets
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from services.api_gateway.auth import Identity, is_storable
from services.api_gateway.problems import TICKET_INVALID, TICKETS_UNAVAILABLE, Problem
from shared import logs
from shared.bus import Bus, BusUnavailable
from shared.messages import TICKETS, StreamTicket, ticket_subject

TICKET_LIFETIME = timedelta(seconds=30)
_TICKET_BYTES = 32
_TICKET = re.compile(r"[A-Za-z0-9_-]{43}")

log = logs.get_logger()


async def issued(bus: Bus, identity: Identity, now: datetime, *, seconds_max: float) -> tuple[str, datetime]:
    """Return a new ticket and when it ends; raises Problem while the bus is away, or does not answer in time."""
    token_expires_at = datetime.fromtimestamp(identity.expires_at, UTC)
    expires_at = min(now + TICKET_LIFETIME, token_expires_at)
    ticket = secrets.token_urlsafe(_TICKET_BYTES)
    message = StreamTicket(
        subject=identity.subject, ticket_expires_at=expires_at, token_expires_at=token_expires_at
    )
    try:
        async with asyncio.timeout(seconds_max):
            await bus.put(TICKETS, _subject(ticket), message)
    except (BusUnavailable, TimeoutError) as error:
        raise Problem(TICKETS_UNAVAILABLE, "A ticket cannot be made now. Try again soon.") from error
    return ticket, expires_at


async def redeemed(bus: Bus, ticket: str, now: datetime, *, seconds_max: float) -> Identity:
    """Return whose ticket it is, and use it up; raises Problem for one that is not good."""
    if not _TICKET.fullmatch(ticket):
        raise Problem(TICKET_INVALID, "This is not a ticket.")
    try:
        async with asyncio.timeout(
            seconds_max
        ):  # to find it and to delete it are two questions of three seconds each
            payload = await bus.take(TICKETS, _subject(ticket))
    except (BusUnavailable, TimeoutError) as error:
        raise Problem(TICKETS_UNAVAILABLE, "Tickets cannot be looked up now. Try again soon.") from error
    try:
        found = None if payload is None else StreamTicket.model_validate_json(payload)
    except ValidationError as error:
        log.warning(
            "ticket_malformed",
            reason=str(error.errors()[0]["msg"]),
            advice="see who else publishes to TICKETS",
        )
        found = None
    if found is None or found.ticket_expires_at <= now or not is_storable(found.subject):
        raise Problem(TICKET_INVALID, "The ticket is unknown, used already, or too old.")
    return Identity(found.subject, found.token_expires_at.timestamp())


def _subject(ticket: str) -> str:
    return ticket_subject(hashlib.sha256(ticket.encode()).hexdigest())
