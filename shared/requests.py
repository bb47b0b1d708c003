"""Requests over NATS: asking, answering, and the refusals that travel instead of an answer.

A refusal is an empty message with the headers of NATS's service convention, `Nats-Service-Error-Code` (a number as in
HTTP) and `Nats-Service-Error` (text), and `Retry-After` (seconds) where trying again may help.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from pydantic import ValidationError

from shared import clock, logs
from shared.bus_failures import FAILURES, BusUnavailable, reason
from shared.inbox import NO_RESPONDERS, Inbox, status
from shared.messages import Message

ERROR_CODE_HEADER = "Nats-Service-Error-Code"
ERROR_HEADER = "Nats-Service-Error"
RETRY_AFTER_HEADER = "Retry-After"
ANSWERS_AT_ONCE_MAX = 64
ANSWER_SECONDS_MAX = 10.0
STOP_SECONDS_MAX = 3.0
"""What answers under way may still take when the service is to stop."""
OVERLOADED_RETRY_SECONDS = 1
DRAIN_SECONDS_MAX = 1.0
"""What the server may take to show that it is there, and then to send what it has for us still."""
CONNECTION_CHECK_SECONDS = 0.5

Reply = TypeVar("Reply", bound=Message)
Answer = Callable[[bytes], Awaitable[Message]]

log = logs.get_logger()


class Unanswered(BusUnavailable):
    """Nobody answered a request: no responder, no connection, or not in time. It may have been carried out."""


class Refused(Exception):
    """A request was answered with a refusal."""

    def __init__(self, code: int, text: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(code, text, retry_after_seconds)
        self.code = code
        """As in HTTP: 400, 403, 404, 413, 429, 500 or 503."""
        self.text = text
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


# ---- asking --------------------------------------------------------------------------------------


class _Question:
    """A request that waits for its answer."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Msg | None] = asyncio.get_running_loop().create_future()

    def answered(self, reply: str, answer: Msg | None) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


async def request(
    client: Client,
    inbox: Inbox,
    subject: str,
    message: Message,
    *,
    reply_type: type[Reply],
    timeout_seconds: float,
) -> Reply:
    """Ask, and return the answer; raises Unanswered or Refused."""
    question = _Question()
    reply = inbox.expect(question)
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.publish(subject, message.model_dump_json().encode(), reply=reply)
            answer = await question.answer
    except TimeoutError as error:
        raise Unanswered(f"no answer on {subject} within {timeout_seconds:g} s") from error
    except FAILURES as error:
        raise Unanswered(reason(error)) from error
    finally:
        inbox.forget([reply])
    if answer is None:
        raise Unanswered("connection lost")
    if status(answer) == NO_RESPONDERS:
        raise Unanswered(f"nobody answers {subject}")
    _raise_refusal(answer)
    try:
        return reply_type.model_validate_json(answer.data)
    except ValidationError as error:
        raise Unanswered(f"the answer on {subject} is no {reply_type.__name__}: {error}") from error


async def hears_itself(client: Client, inbox: Inbox, *, timeout_seconds: float) -> bool:
    """Say something to ourselves, and tell whether the server brought it back in time."""
    question = _Question()
    reply = inbox.expect(question)
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.publish(reply)
            return await question.answer is not None
    except FAILURES:
        return False
    finally:
        inbox.forget([reply])


def _raise_refusal(answer: Msg) -> None:
    headers = answer.headers or {}
    code = headers.get(ERROR_CODE_HEADER)
    if code is not None:
        seconds = headers.get(RETRY_AFTER_HEADER, "")
        raise Refused(
            int(code) if code.isdecimal() else 500,
            headers.get(ERROR_HEADER, ""),
            int(seconds) if seconds.isdecimal() else None,
        )


# ---- answering -----------------------------------------------------------------------------------


class Responder:
    """Answers the requests on a subject, at most `at_once_max` at a time; the others are refused with 503."""

    def __init__(
        self, subject: str, answer: Answer, *, queue: str, at_once_max: int, seconds_max: float
    ) -> None:
        self._subject = subject
        self._answer = answer
        self._queue = queue
        self._at_once_max = at_once_max
        self._seconds_max = seconds_max
        self._under_way: set[asyncio.Task[None]] = set()

    async def answer_until(self, stop: asyncio.Event, client: Client, inbox: Inbox) -> None:
        """Answer until `stop`, or until `client` is closed for good; short of that it finds its server again."""
        subscription = await client.subscribe(
            self._subject, queue=self._queue, cb=partial(self._take, client)
        )
        try:
            while not (stop.is_set() or client.is_closed):
                await clock.wait_for_stop(stop, CONNECTION_CHECK_SECONDS)
        finally:
            await _leave(subscription, client, inbox)

    async def finish(self) -> None:
        """Let the answers under way come to their end, or refuse them after a while."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=STOP_SECONDS_MAX)
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _take(self, client: Client, asked: Msg) -> None:
        if len(self._under_way) >= self._at_once_max:
            await self._send(
                client, asked, Refused(503, "too many requests at once", OVERLOADED_RETRY_SECONDS)
            )
            return
        task = asyncio.create_task(self._respond(client, asked))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _respond(self, client: Client, asked: Msg) -> None:
        try:
            async with asyncio.timeout(self._seconds_max):
                answer: Message | Refused = await self._answer(asked.data)
        except Refused as refusal:
            answer = refusal
        except ValidationError as error:
            log.info("request_malformed", subject=self._subject, problems=error.error_count())
            answer = Refused(400, _in_words(error))
        except TimeoutError:
            log.warning(
                "request_took_too_long",
                advice="who asked was told to try again; see what is slow: PostgreSQL most likely",
                subject=self._subject,
                seconds=self._seconds_max,
            )
            answer = Refused(503, "the answer took too long", OVERLOADED_RETRY_SECONDS)
        except asyncio.CancelledError:
            await self._send(client, asked, Refused(503, "the service stops", OVERLOADED_RETRY_SECONDS))
            raise
        except Exception:  # one request must not end a process that does more than answer
            log.exception(
                "request_failed", advice="this is a bug: report it with the traceback", subject=self._subject
            )
            answer = Refused(500, "the request failed")
        await self._send(client, asked, answer)

    async def _send(self, client: Client, asked: Msg, answer: Message | Refused) -> None:
        if not asked.reply:
            return
        if isinstance(answer, Refused):
            payload, headers = b"", _headers(answer)
        else:
            payload, headers = answer.model_dump_json().encode(), None
        try:
            if len(payload) > client.max_payload:
                payload, headers = b"", _headers(Refused(413, "the answer is too long; ask for less"))
            await client.publish(asked.reply, payload, headers=headers)
        except FAILURES as error:  # who asked gives up by himself
            log.warning(
                "request_answer_not_sent",
                advice="nothing: who asked gives up by himself; see nats-server if it lasts",
                subject=self._subject,
                problem=reason(error),
            )


async def _leave(subscription: Subscription, client: Client, inbox: Inbox) -> None:
    """End a subscription; what the server has given us already is answered as well, if it answers itself.

    Draining waits for a pong. One that is not awaited to its end takes the library's reading with it when it comes, and
    leaves the subscription to be made again with the next connection: so a server that is mute is not asked for one,
    and draining is never cut off.
    """
    with suppress(*FAILURES):
        if not await hears_itself(client, inbox, timeout_seconds=DRAIN_SECONDS_MAX):
            await subscription.unsubscribe()
            return
        draining = asyncio.ensure_future(subscription.drain())  # type: ignore[no-untyped-call]
        await asyncio.wait({draining}, timeout=DRAIN_SECONDS_MAX)
        if draining.done():
            draining.result()


def _headers(refusal: Refused) -> dict[str, str]:
    headers = {ERROR_CODE_HEADER: str(refusal.code), ERROR_HEADER: refusal.text}
    if refusal.retry_after_seconds is not None:
        headers[RETRY_AFTER_HEADER] = str(refusal.retry_after_seconds)
    return headers


def _in_words(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
