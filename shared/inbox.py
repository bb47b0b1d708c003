"""Where the answers to what a connection sends arrive: one subscription for all of them."""

from collections.abc import Iterable
from itertools import count
from typing import Protocol

from nats.aio.client import Client
from nats.aio.msg import Msg

NO_RESPONDERS = "503"
"""The status of the answer that the server itself gives when nobody listens to a subject."""


class Asker(Protocol):
    """Expects answers."""

    def answered(self, reply: str, answer: Msg | None) -> None:
        """Take the answer that was expected at `reply`; None when the connection was lost, so that none will come."""


class Inbox:
    """The answers that a connection waits for.

    A future, a timer and a task for each of them, as the library makes them, would cost several times as much.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._prefix = f"{client.new_inbox()}."
        self._numbers = count(1)
        self._askers: dict[str, Asker] = {}

    async def open(self) -> None:
        """Subscribe; whenever it connects anew the library does so again."""
        await self._client.subscribe(f"{self._prefix}*", cb=self._hear)

    def expect(self, asker: Asker) -> str:
        """Return a reply subject that no other message has; its answer is given to `asker`, once."""
        reply = f"{self._prefix}{next(self._numbers)}"
        self._askers[reply] = asker
        return reply

    def forget(self, replies: Iterable[str]) -> None:
        """Expect these answers no more; one that comes after all is dropped."""
        for reply in replies:
            self._askers.pop(reply, None)

    def lose(self) -> None:
        """Tell everybody that no answer will come: those to what was sent went with the connection."""
        askers, self._askers = self._askers, {}
        for reply, asker in askers.items():
            asker.answered(reply, None)

    async def _hear(self, answer: Msg) -> None:
        asker = self._askers.pop(answer.subject, None)
        if asker is not None:
            asker.answered(answer.subject, answer)


def status(answer: Msg) -> str | None:
    """Return the status that the server itself has given an answer; None for an answer of a responder."""
    return answer.headers.get("Status") if answer.headers else None
