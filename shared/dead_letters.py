"""The dead letters as an operator has them: listed, published again, discarded."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from nats.aio.client import Client
from pydantic import ValidationError

from shared import streams
from shared.messages import DEAD_LETTERS, DeadLetter
from shared.publishing import Outgoing

LISTED_MAX = 1000
"""As many as the stream keeps."""


class NumberedLetter(NamedTuple):
    """A dead letter and its number, which stays its own."""

    number: int
    letter: DeadLetter | None
    """None when what is there is no dead letter, but was written by somebody else."""


class NotReplayable(Exception):
    """A dead letter cannot be published again; the text says why."""


async def listed(client: Client) -> list[NumberedLetter]:
    """Return all dead letters, the oldest first."""
    letters: list[NumberedLetter] = []
    number = 1
    while len(letters) < LISTED_MAX:
        stored = await streams.read_from(client, DEAD_LETTERS, number)
        if stored is None:
            break
        letters.append(NumberedLetter(stored.sequence, _read(stored.payload)))
        number = stored.sequence + 1
    return letters


async def found(client: Client, number: int) -> NumberedLetter | None:
    """Return the letter of that number; None when there is none (any more)."""
    stored = await streams.read_from(client, DEAD_LETTERS, number)
    if stored is None or stored.sequence != number:
        return None
    return NumberedLetter(number, _read(stored.payload))


async def replay(
    client: Client, publish: Callable[[Outgoing], Awaitable[None]], numbered: NumberedLetter
) -> None:
    """Publish a letter's message where it was published, and delete the letter once that is acknowledged.

    Two who do so at once, or one who does it again, publish one message. Raises NotReplayable.
    """
    number, letter = numbered
    if letter is None:
        raise NotReplayable("it is no dead letter")
    if not letter.is_whole:
        raise NotReplayable(f"only the first {len(letter.content)} of its {letter.size} bytes were kept")
    message_id = f"dead_letter/{number}/{letter.put_aside_at.isoformat()}"
    await publish(Outgoing(letter.subject, letter.content, message_id))
    await streams.delete(client, DEAD_LETTERS, number)


async def discard(client: Client, number: int) -> bool:
    """Delete a letter; tell whether it was there."""
    return await streams.delete(client, DEAD_LETTERS, number)


def _read(payload: bytes) -> DeadLetter | None:
    try:
        return DeadLetter.model_validate_json(payload)
    except ValidationError:
        return None
