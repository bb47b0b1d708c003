"""What can go wrong between us and NATS, in one place for all modules that speak with it."""

import asyncio

import nats.errors
import nats.js.errors


class BusUnavailable(Exception):
    """NATS did not acknowledge; the message may or may not have been stored, so publishing again must be harmless."""


FAILURES = (
    nats.errors.Error,
    nats.js.errors.Error,
    OSError,
    TimeoutError,
    asyncio.InvalidStateError,
)
"""What the library raises when the server is away, slow, or says no."""


def reason(error: BaseException) -> str:
    """Return an error in words; some of the library's have none."""
    return str(error) or type(error).__name__
