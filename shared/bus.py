"""NATS: one connection that heals for ever; publishing, consuming, listening, asking and answering over it.

All that speaks with NATS is here and in the modules just below: `publishing`, `requests`, `streams` and `inbox`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, Protocol, Self
from urllib.parse import unquote, urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.client import JetStreamContext as _Context

from shared import clock, logs, requests, streams
from shared.bus_failures import FAILURES, BusUnavailable, reason
from shared.inbox import Inbox
from shared.messages import STREAMS, Message, Stream
from shared.publishing import PUBLISH_TIMEOUT_SECONDS, Outgoing, Publisher
from shared.requests import Refused, Reply, Unanswered
from shared.streams import StreamUnfit

__all__ = [  # all that a service needs of NATS comes from here
    "Bus",
    "BusUnavailable",
    "Delivery",
    "Listener",
    "Outgoing",
    "Refused",
    "StreamUnfit",
    "Unanswered",
]

PING_INTERVAL_SECONDS = 10
PINGS_OUTSTANDING_MAX = 2
RECONNECT_WAIT_SECONDS = 0.5
FETCH_WAIT_SECONDS = 2.0
FAILURE_PAUSE_SECONDS = 1.0
READY_POLL_SECONDS = 0.2
STREAMS_CHECK_SECONDS = 30.0
PROBLEMS_SAID_MAX = 20
CONNECT_TIMEOUT_SECONDS = 2
CANCEL_PAUSE_SECONDS = 0.2
CLOSE_SECONDS_MAX = 1.0
"""What the end may take; the connection of a server that does not read is cut then."""
LISTEN_CHECK_SECONDS = 1.0
LISTEN_ANSWER_SECONDS_MAX = 2.0
"""A listener is told within these two that a server has frozen; the pings above take up to 30 s to notice it."""
LISTEN_WAITING_MAX = 65_536
LISTEN_WAITING_BYTES_MAX = 16 * 1024 * 1024

_NOT_CONNECTED = "not connected"

log = logs.get_logger()


class Delivery:
    """A message that a durable consumer delivered; it comes again unless acknowledged in time."""

    def __init__(self, received: Msg) -> None:
        self._received = received
        self.payload: bytes = received.data
        self.deliveries: int = received.metadata.num_delivered or 1

    async def acknowledge(self) -> None:
        """Say that the work is done and committed."""
        await self._answer(self._received.ack)

    async def postpone(self, delay_seconds: float) -> None:
        """Ask for the message again after `delay_seconds`."""
        await self._answer(lambda: self._received.nak(delay=delay_seconds))

    async def discard(self) -> None:
        """Say that the message can never be handled."""
        await self._answer(self._received.term)

    async def keep_alive(self, every_seconds: float) -> None:
        """Tell the server, until cancelled, that the work goes on, so that no other replica is given it."""
        while True:
            await asyncio.sleep(every_seconds)
            await self._answer(self._received.in_progress)

    async def _answer(self, answer: Callable[[], Awaitable[None]]) -> None:
        try:
            await answer()
        except FAILURES as error:  # the message will be delivered again, which must be harmless
            log.warning("bus_answer_failed", error=reason(error))


class Listener(Protocol):
    """Hears messages; every method is called in the event loop, must be quick and must not raise."""

    def heard(self, subject: str, payload: bytes) -> None:
        """Take a message, in the order of its subject, once while nothing is interrupted."""

    def interrupted(self) -> None:
        """Learn that messages may have been missed, and may be until `resumed`."""

    def resumed(self) -> None:
        """Learn that from now on every message is heard."""


class _Ear:
    """What a listener's subscriptions and the connection's callbacks share."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.hears = False
        self.lost = asyncio.Event()

    async def hear(self, message: Msg) -> None:
        self.listener.heard(message.subject, message.data)

    def resume(self) -> None:
        if not self.lost.is_set():
            self.hears = True
            self.listener.resumed()

    def lose(self) -> None:
        self.lost.set()
        if self.hears:
            self.hears = False
            self.listener.interrupted()


class Bus:
    """A connection to NATS that is made, and made again, in the background, with the project's streams on it.

    Use as an async context manager; entering does not wait for the server. `check()` tells whether it is there.
    """

    def __init__(self, url: str, *, name: str, owned: Iterable[Stream] = ()) -> None:
        """Take the streams of which this service says how much is kept as `owned`, in place of those in `STREAMS`."""
        self._servers, self._credentials = _servers_and_credentials(url)
        self._name = name
        self._owned = {stream.name: stream for stream in owned}
        self._client = Client()
        self._inbox: Inbox | None = None
        self._publisher: Publisher | None = None
        self._js: JetStreamContext | None = None
        self._streams_made_at: list[str] | None = None
        self._doubtful = asyncio.Event()  # something failed: look at the streams again
        self._closed = asyncio.Event()
        self._closing = False
        self._problem = _NOT_CONNECTED
        self._consumer_problem: str | None = None
        self._said: set[str] = set()
        self._ears: set[_Ear] = set()
        self._keeping: asyncio.Task[None] | None = None
        self.streams_found = 0
        """Grows with every connection and whenever a stream was made anew: what was in it may be lost."""

    async def __aenter__(self) -> Self:
        self._keeping = asyncio.create_task(self._keep_connected())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._keeping is not None
        self._closing = True
        while not self._keeping.done():  # a wait_for that ends at the same moment swallows the cancellation
            self._keeping.cancel()
            await asyncio.wait({self._keeping}, timeout=CANCEL_PAUSE_SECONDS)
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self._js is None:  # never connected: the library has nothing to close
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await self._client.close()
        except FAILURES as error:
            log.warning("bus_close_failed", error=reason(error))

    async def check(self) -> str | None:
        """Return None when NATS, the streams and our consumer are there, else why not. For readiness."""
        return self._consumer_problem if self._is_usable() else self._problem

    async def wait_until_ready(self, stop: asyncio.Event) -> bool:
        """Wait until the bus can be used or `stop` is set; tell whether it can be used."""
        while not stop.is_set():
            if self._is_usable():
                return True
            await clock.wait_for_stop(stop, READY_POLL_SECONDS)
        return False

    def _is_usable(self) -> bool:
        assert self._keeping is not None
        if self._keeping.done() and not self._closing:
            self._keeping.result()  # it ends by a bug alone, which must not stay unseen
        return self._client.is_connected and self._streams_made_at is not None

    async def publish(self, outgoing: Outgoing) -> None:
        """Publish to JetStream and wait for the acknowledgement; raises BusUnavailable without one."""
        failed = await self.publish_all([outgoing])
        if failed:
            raise BusUnavailable(failed[0][1])

    async def publish_all(self, batch: Iterable[Outgoing]) -> list[tuple[Outgoing, str]]:
        """Publish a batch with many in flight; return those without an acknowledgement, in their order, and why.

        A message without one may have been stored all the same. Fails when nothing of the batch was acknowledged for
        PUBLISH_TIMEOUT_SECONDS, or at once when the connection is lost.
        """
        if self._publisher is None or not self._client.is_connected:
            return [(outgoing, self._problem) for outgoing in batch]
        failed = await self._publisher.publish_all(batch)
        if failed:
            self._doubtful.set()  # the streams may have gone with the server's disk
        return failed

    async def put(self, stream: Stream, subject: str, message: Message) -> None:
        """Store a message, to be taken once; raises BusUnavailable without an acknowledgement."""
        assert any(fnmatchcase(subject, pattern) for pattern in stream.subjects)
        await self.publish(Outgoing(subject, message))

    async def last(self, stream: Stream, subject: str) -> bytes | None:
        """Return the payload of the last message that a stream keeps of a subject, if any; raises BusUnavailable."""
        if not self._client.is_connected:
            raise BusUnavailable(self._problem)
        try:
            return await streams.read_last(self._client, stream, subject)
        except FAILURES as error:
            self._doubtful.set()
            raise BusUnavailable(reason(error)) from error

    async def take(self, stream: Stream, subject: str) -> bytes | None:
        """Delete the last message that was put on `subject` and return its payload; of many takers one gets it.

        Returns None when there is none (any more). Raises BusUnavailable; the message may then be gone.
        """
        if not self._client.is_connected:
            raise BusUnavailable(self._problem)
        try:
            return await streams.take_last(self._client, stream, subject)
        except FAILURES as error:
            self._doubtful.set()
            raise BusUnavailable(reason(error)) from error

    async def request(
        self, subject: str, message: Message, reply_type: type[Reply], *, timeout_seconds: float
    ) -> Reply:
        """Ask whoever serves `subject` and return the answer; nothing is stored, and nobody may have heard it.

        Raises Unanswered (no responder, no connection, not in time), or Refused with what the responder said.
        """
        if self._inbox is None or not self._client.is_connected:
            raise Unanswered(self._problem)
        return await requests.request(
            self._client,
            self._inbox,
            subject,
            message,
            reply_type=reply_type,
            timeout_seconds=timeout_seconds,
        )

    async def serve(
        self,
        subject: str,
        answer: requests.Answer,
        stop: asyncio.Event,
        *,
        queue: str = "",
        at_once_max: int = requests.ANSWERS_AT_ONCE_MAX,
        answer_seconds_max: float = requests.ANSWER_SECONDS_MAX,
    ) -> None:
        """Answer requests with what `answer` makes of their payload, until `stop`; in a `queue` one replica does.

        `answer` may raise Refused; a ValidationError of the payload is refused with 400, too many requests at once and
        one that takes too long with 503, an unexpected error with 500. Those under way at the end are finished.
        """
        responder = requests.Responder(
            subject, answer, queue=queue, at_once_max=at_once_max, seconds_max=answer_seconds_max
        )
        try:
            while not stop.is_set():
                if not self._client.is_connected:
                    await clock.wait_for_stop(stop, READY_POLL_SECONDS)
                    continue
                try:
                    await responder.answer_until(stop, self._client)
                except FAILURES as error:
                    self._say_problem(f"answering {subject}: {reason(error)}")
                    await clock.wait_for_stop(stop, FAILURE_PAUSE_SECONDS)
        finally:
            await responder.finish()

    async def consume(
        self, stream: Stream, *, durable: str, ack_wait_seconds: float, stop: asyncio.Event
    ) -> AsyncIterator[Delivery]:
        """Yield the stream's messages one at a time, shared with all consumers of the same name, until `stop`.

        Survives a server that restarts, freezes or loses its disk: the consumer is made again.
        """
        assert len(stream.subjects) == 1
        subscription: _Context.PullSubscription | None = None
        while not stop.is_set():
            if not await self.wait_until_ready(stop):
                return
            try:
                if subscription is None:
                    subscription = await self._subscribe(stream, durable, ack_wait_seconds)
                    self._consumer_problem = None
                messages = await subscription.fetch(1, timeout=FETCH_WAIT_SECONDS)
            except TimeoutError:
                continue
            except FAILURES as error:
                await self._lose(subscription)
                subscription = None
                problem = f"consumer {durable} of {stream.name}: {reason(error)}"
                if problem != self._consumer_problem and not stop.is_set():
                    log.warning("bus_consumer_lost", problem=problem)
                self._consumer_problem = problem
                self._doubtful.set()
                await clock.wait_for_stop(stop, FAILURE_PAUSE_SECONDS)
                continue
            for message in messages:
                yield Delivery(message)

    async def _subscribe(
        self, stream: Stream, durable: str, ack_wait_seconds: float
    ) -> _Context.PullSubscription:
        assert self._js is not None
        config = ConsumerConfig(
            durable_name=durable,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ack_wait_seconds,
            max_deliver=-1,
            filter_subject=stream.subjects[0],
        )
        await self._js.add_consumer(stream.name, config=config)
        return await self._js.pull_subscribe_bind(durable, stream=stream.name)

    async def _lose(self, subscription: _Context.PullSubscription | None) -> None:
        """Take back what a subscription left at the server, if that still can be."""
        if subscription is not None:
            with suppress(*FAILURES):
                await subscription.unsubscribe()

    async def listen(
        self,
        subjects: Sequence[str],
        listener: Listener,
        stop: asyncio.Event,
        *,
        waiting_max: int = LISTEN_WAITING_MAX,
    ) -> None:
        """Let `listener` hear what is published on the subjects, from now on and not durably, until `stop`.

        What JetStream stores is heard as well. A message costs one call: none is parsed, acknowledged or asked for
        again. Instead the listener is told when messages may have been missed: the connection is lost, the server
        does not answer within LISTEN_CHECK_SECONDS and LISTEN_ANSWER_SECONDS_MAX, or more than `waiting_max` messages
        wait for this process. It is told again once every message is heard.
        """
        while not stop.is_set():
            client = self._client
            if not client.is_connected:
                await clock.wait_for_stop(stop, READY_POLL_SECONDS)
                continue
            ear = _Ear(listener)
            self._ears.add(ear)
            try:
                await self._listen(client, subjects, ear, stop, waiting_max)
            except FAILURES as error:
                self._say_problem(f"listening: {reason(error)}")
                ear.lose()
                await clock.wait_for_stop(stop, FAILURE_PAUSE_SECONDS)
            finally:
                ear.lose()
                self._ears.discard(ear)

    async def _listen(
        self, client: Client, subjects: Sequence[str], ear: _Ear, stop: asyncio.Event, waiting_max: int
    ) -> None:
        """Listen until `stop`, or until messages may have been missed."""
        subscriptions = []
        echo = asyncio.Event()
        echo_subject = client.new_inbox()

        async def hear_echo(_: Msg) -> None:
            echo.set()

        try:
            for subject in subjects:
                subscriptions.append(
                    await client.subscribe(
                        subject,
                        cb=ear.hear,
                        pending_msgs_limit=waiting_max,
                        pending_bytes_limit=LISTEN_WAITING_BYTES_MAX,
                    )
                )
            subscriptions.append(await client.subscribe(echo_subject, cb=hear_echo))
            stopping = asyncio.ensure_future(stop.wait())
            losing = asyncio.ensure_future(ear.lost.wait())
            try:
                while not (stopping.done() or losing.done()):
                    # It comes back after all that the server has sent before, and after the subscriptions. Not a flush:
                    # the pong of one that was given up ends the library's reading for good, without a word.
                    echo.clear()
                    async with asyncio.timeout(LISTEN_ANSWER_SECONDS_MAX):
                        await client.publish(echo_subject)
                        await echo.wait()
                    if not ear.hears:
                        ear.resume()
                    await asyncio.wait(
                        {stopping, losing}, timeout=LISTEN_CHECK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
            finally:
                stopping.cancel()
                losing.cancel()
        finally:
            for subscription in subscriptions:
                with suppress(*FAILURES):
                    await subscription.unsubscribe()

    async def _keep_connected(self) -> None:
        """Connect, and again with a new client should the library give one up (a refused password, say)."""
        while True:
            self._closed.clear()
            try:
                await self._client.connect(
                    servers=self._servers,
                    **self._credentials,
                    name=self._name,
                    connect_timeout=CONNECT_TIMEOUT_SECONDS,
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RECONNECT_WAIT_SECONDS,  # type: ignore[arg-type]  # a fraction works
                    ping_interval=PING_INTERVAL_SECONDS,
                    max_outstanding_pings=PINGS_OUTSTANDING_MAX,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    closed_cb=self._on_closed,
                )
                inbox = Inbox(self._client)
                await inbox.open()
                self._inbox, self._publisher = inbox, Publisher(self._client, inbox)
                self._js = self._client.jetstream(timeout=PUBLISH_TIMEOUT_SECONDS)
                log.info("bus_connected")
                await self._keep_streams()
            except FAILURES as error:
                await self._on_error(error)
            self._streams_made_at = None
            self._client = Client()
            await asyncio.sleep(FAILURE_PAUSE_SECONDS)

    async def _keep_streams(self) -> None:
        """See to it that the streams are there, after every failure and now and then, until the client is closed."""
        self.streams_found += 1
        while not self._closed.is_set():
            self._doubtful.clear()
            found = await self._find_streams()
            pause = STREAMS_CHECK_SECONDS if found else FAILURE_PAUSE_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._doubtful.wait()
                    await asyncio.sleep(READY_POLL_SECONDS)  # so that many failures are one look

    async def _find_streams(self) -> bool:
        """Find or create the streams, and bring up to date what is ours of them."""
        try:
            made_at = [
                await streams.find_stream(
                    self._client, self._owned.get(stream.name, stream), owned=stream.name in self._owned
                )
                for stream in STREAMS
            ]
        except (*FAILURES, StreamUnfit) as error:
            self._say_problem(f"JetStream: {reason(error)}")
            self._streams_made_at = None
            return False
        if self._streams_made_at not in (None, made_at):
            self.streams_found += 1
        self._streams_made_at = made_at
        self._said.clear()
        return True

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self._lose_ears()  # messages of one of them were dropped
        self._say_problem(reason(error))

    def _lose_connection(self) -> None:
        self._lose_ears()
        if self._inbox is not None:
            self._inbox.lose()

    def _lose_ears(self) -> None:
        for ear in tuple(self._ears):
            ear.lose()

    async def _on_closed(self) -> None:
        self._lose_connection()
        self._closed.set()
        self._doubtful.set()

    async def _on_disconnected(self) -> None:
        self._lose_connection()
        self._say_problem("connection lost")

    async def _on_reconnected(self) -> None:
        log.info("bus_reconnected")
        self._problem = _NOT_CONNECTED
        self.streams_found += 1
        self._doubtful.set()

    def _say_problem(self, problem: str) -> None:
        """Log each problem once until all is well again; a refused password outlasts the resets that follow it."""
        if problem not in self._said and not self._closing and len(self._said) < PROBLEMS_SAID_MAX:
            log.warning("bus_problem", problem=problem)
            self._said.add(problem)
        if "uthorization" not in self._problem or "uthorization" in problem:
            self._problem = problem


def _servers_and_credentials(url: str) -> tuple[list[str], dict[str, Any]]:
    """Take user and password, percent-encoded in the URL, out of it; the library would leave them encoded."""
    credentials: dict[str, Any] = {}
    servers = []
    for server in url.split(","):
        parts = urlsplit(server.strip())
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if password:
            credentials = {"user": user, "password": password}
        elif user:
            credentials = {"token": user}
        servers.append(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    return servers, credentials
