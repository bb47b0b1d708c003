"""Publishing to JetStream with many messages in flight, each acknowledged or reported."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.bus_failures import FAILURES, reason
from shared.inbox import NO_RESPONDERS, Inbox, status
from shared.messages import Message

PUBLISH_TIMEOUT_SECONDS = 3.0
"""A batch of which nothing more is acknowledged for so long has failed."""
PUBLISHES_IN_FLIGHT_MAX = 256
"""Of all callers together."""

SENT_AT_ONCE = 32
"""After so many messages what is ready is written: the first must not wait until all are."""

LOST = "connection lost"
LATE = "no acknowledgement came in time"
NO_STREAM = "no stream takes the subject"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish; `message_id` lets the stream discard a second copy within two minutes."""

    subject: str
    message: Message | bytes
    """Bytes are published as they are."""
    message_id: str | None = None

    @property
    def payload(self) -> bytes:
        if isinstance(self.message, bytes):
            return self.message
        return self.message.model_dump_json().encode()


class Publisher:
    """Publishes over one connection."""

    def __init__(self, client: Client, inbox: Inbox) -> None:
        self._client = client
        self._inbox = inbox
        self._in_flight = 0
        self._room = asyncio.Event()

    async def publish_all(self, outgoing: Iterable[Outgoing]) -> list[tuple[Outgoing, str]]:
        """Publish a batch; return those without an acknowledgement, in their order, and why."""
        batch = _Batch(list(outgoing), self._release)
        try:
            await self._send(batch)
            while batch.unanswered:
                batch.finished.clear()
                if not await batch.progresses(batch.finished.wait):
                    batch.fail(batch.unanswered.values(), LATE)
                    break
        finally:
            self._inbox.forget(batch.unanswered)
            self._release(len(batch.unanswered))
        return [(batch.messages[index], batch.problems[index]) for index in sorted(batch.problems)]

    async def _send(self, batch: "_Batch") -> None:
        for index, outgoing in enumerate(batch.messages):
            while self._in_flight >= PUBLISHES_IN_FLIGHT_MAX:
                self._room.clear()
                if not await batch.progresses(self._room.wait) and self._in_flight >= PUBLISHES_IN_FLIGHT_MAX:
                    batch.fail(range(index, len(batch.messages)), LATE)
                    return
            if not self._client.is_connected:  # the library would keep it, and send it one day
                batch.fail(range(index, len(batch.messages)), LOST)
                return
            headers = {"Nats-Msg-Id": outgoing.message_id} if outgoing.message_id else None
            reply = self._inbox.expect(batch)
            batch.unanswered[reply] = index
            self._in_flight += 1
            try:
                await self._client.publish(outgoing.subject, outgoing.payload, reply=reply, headers=headers)
            except FAILURES as error:
                self._inbox.forget([reply])
                batch.close(reply, reason(error))
            if index % SENT_AT_ONCE == SENT_AT_ONCE - 1:
                await asyncio.sleep(0)  # the library writes when it has its turn, and others wait for theirs

    def _release(self, messages: int) -> None:
        self._in_flight -= messages
        if self._in_flight <= PUBLISHES_IN_FLIGHT_MAX // 2:  # so that who waits wakes up for many at once
            self._room.set()


class _Batch:
    """What is known of a caller's messages."""

    def __init__(self, messages: list[Outgoing], release: Callable[[int], None]) -> None:
        self.messages = messages
        self.unanswered: dict[str, int] = {}
        self.problems: dict[int, str] = {}
        self.finished = asyncio.Event()
        self._release = release
        self._closed = 0

    def answered(self, reply: str, answer: Msg | None) -> None:
        self.close(reply, LOST if answer is None else _problem(answer))

    def close(self, reply: str, problem: str | None) -> None:
        """Note what became of a message that was in flight."""
        index = self.unanswered.pop(reply)
        if problem is not None:
            self.problems[index] = problem
        self._closed += 1
        if not self.unanswered:
            self.finished.set()
        self._release(1)

    def fail(self, indexes: Iterable[int], problem: str) -> None:
        self.problems |= dict.fromkeys(indexes, problem)

    async def progresses(self, wait: Callable[[], Awaitable[object]]) -> bool:
        """Wait; tell whether the wait was over, or a message of the batch was closed meanwhile."""
        closed = self._closed
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
                await wait()
        except TimeoutError:
            return self._closed > closed
        return True


def _problem(answer: Msg) -> str | None:
    """Return None for an acknowledgement."""
    if answer.data.startswith(b'{"stream":') and b'"error"' not in answer.data:
        return None  # as the server writes it: no need to look closer
    if status(answer) == NO_RESPONDERS:
        return NO_STREAM
    try:
        said = json.loads(answer.data)
        error = said.get("error")
        if error:
            return f"{error.get('description')} (code {error.get('code')}, {error.get('err_code')})"
        return None if "stream" in said else "the answer is no acknowledgement"
    except (ValueError, AttributeError):
        return "the answer is no acknowledgement"
