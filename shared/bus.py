"""NATS: one connection that heals for ever; publishing, consuming, listening, asking and answering over it.

All that speaks with NATS is here and in the modules just below: `publishing`, `deliveries`, `dead_letters`,
`requests`, `streams` and `inbox`.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import unquote, urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.client import JetStreamContext as _Context

from shared import bus_metrics, clock, dead_letters, logs, requests, streams
from shared.bus_failures import FAILURES, BusUnavailable, reason
from shared.dead_letters import NotReplayable, NumberedLetter
from shared.deliveries import DELIVERIES_MAX, SERVER_DELIVERIES_MAX, Delivery
from shared.inbox import Inbox
from shared.messages import DEAD_LETTERS, STREAMS, Message, Probe, Stream, probe_subject
from shared.publishing import PUBLISH_TIMEOUT_SECONDS, Outgoing, Publisher
from shared.requests import Refused, Reply, Unanswered
from shared.storing import FORBIDDEN, Storing, count_unacknowledged
from shared.streams import Found, Stored, StreamUnfit

__all__ = [  # all that a service needs of NATS comes from here
    "DELIVERIES_MAX",
    "Bus",
    "BusUnavailable",
    "Delivery",
    "Listener",
    "NotReplayable",
    "NumberedLetter",
    "Outgoing",
    "Refused",
    "Stored",
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

ECHO_EVERY_SECONDS = 1.0
ECHO_WAIT_SECONDS = 2.0
ECHO_AFTER_FAILURE_SECONDS = 1.0
ECHOES_MISSED_MAX = 2
"""A server that misses so many is said to be mute after six seconds; the pings take up to 30 to give it up."""

_NOT_CONNECTED = "not connected"
_MUTE = "the server does not answer"

_FORBIDDEN = re.compile(r'permissions violation for publish to "([^"]+)"')

_ADVICE = {
    "uthorization": "NATS_URL must have the user and password of nats-server",
    "ermissions": "the user in NATS_URL may not use a subject: see the server's authorization",
    "Connect call failed": "nothing listens there: is nats-server up, and NATS_URL its address?",
    "Connection refused": "nothing listens there: is nats-server up, and NATS_URL its address?",
    "JetStream not enabled": "start nats-server with a configuration that has `jetstream`, as ops/nats.conf",
    "exists without the subject": "another program's stream has our name: rename it, or use a server of our own",
    "replicas > 1 not supported": "NATS_STREAM_REPLICAS is more than 1 and this server is in no cluster",
    "no suitable peers": "NATS_STREAM_REPLICAS is more than the servers that run",
    "JetStream: nats: timeout": "a cluster may be choosing a leader; if it lasts, see that most of its servers run",
    "slow consumer": "this process does not keep up with what it hears: look at its CPU",
    _MUTE: "nats-server is frozen or cut off: look at its host; nothing that was acknowledged is lost",
}

T = TypeVar("T")
log = logs.get_logger()


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

    def __init__(
        self,
        url: str,
        *,
        name: str,
        owned: Iterable[Stream] = (),
        sized: Iterable[Stream] = (),
        replicas: int = 1,
    ) -> None:
        """Take the streams of which this service says how much is kept as `owned`, in place of those in `STREAMS`.

        They, and those that are `sized`, are given the bound of their size where they have none. Each stream is kept by
        at least `replicas` of the servers.
        """
        self._servers, self._credentials = _servers_and_credentials(url)
        self._name = name
        self._replicas = replicas
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
        self._is_mute = False
        self._storing = Storing()
        self._sized = frozenset(stream.name for stream in (*self._owned.values(), *sized))
        self._size_asked: set[str] = set()  # for these, over this connection: it may not be had
        self._said: set[str] = set()
        self._forbidden: set[str] = set()  # subjects to publish to, in lower case as the library has them
        self._ears: set[_Ear] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.dead_letters_kept = 0
        """How many there are, as of the last look."""
        self.streams_found = 0
        """Grows with every connection and whenever a stream was made anew: what was in it may be lost."""

    async def __aenter__(self) -> Self:
        bus_metrics.connected.set(0)
        self._keeping = asyncio.create_task(self._keep_connected())
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._keeping is not None
        assert self._watching is not None
        self._closing = True
        tasks = {self._keeping, self._watching}
        while not all(task.done() for task in tasks):
            for task in tasks:  # a wait_for that ends at the same moment swallows the cancellation
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_PAUSE_SECONDS)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._js is None:  # never connected: the library has nothing to close
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await self._client.close()
        except FAILURES as error:
            log.warning("bus_close_failed", advice="nothing: the connection was cut", error=reason(error))

    async def check(self) -> str | None:
        """Return None when NATS, the streams and our consumer are there, else why not. For readiness.

        What JetStream does not acknowledge is said until it does.
        """
        if not self._is_usable():
            return self._problem
        return (_MUTE if self._is_mute else None) or self._consumer_problem or self._storing.problem

    async def wait_until_ready(self, stop: asyncio.Event) -> bool:
        """Wait until the bus can be used or `stop` is set; tell whether it can be used."""
        while not stop.is_set():
            if self._is_usable():
                return True
            await clock.wait_for_stop(stop, READY_POLL_SECONDS)
        return False

    def _is_usable(self) -> bool:
        assert self._keeping is not None
        assert self._watching is not None
        for task in (self._keeping, self._watching):
            if task.done() and not self._closing:
                task.result()  # it ends by a bug alone, which must not stay unseen
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
        messages = list(batch)
        if self._publisher is None or not self._client.is_connected:
            failed = [(outgoing, self._problem) for outgoing in messages]
            count_unacknowledged(failed, lost=True)
            return failed
        failed = self._explained(await self._publisher.publish_all(messages))
        count_unacknowledged(failed)
        if failed:
            self._doubtful.set()  # the streams may have gone with the server's disk
        if not failed or await self._is_heard():
            self._storing.note(messages, failed)
        return failed

    def _explained(self, failed: list[tuple[Outgoing, str]]) -> list[tuple[Outgoing, str]]:
        """Say why of what the user may not publish: the server's word for that comes apart from the message."""
        return [
            (outgoing, FORBIDDEN if outgoing.subject.lower() in self._forbidden else why)
            for outgoing, why in failed
        ]

    async def put(self, stream: Stream, subject: str, message: Message) -> None:
        """Store a message, to be taken once; raises BusUnavailable without an acknowledgement."""
        assert any(fnmatchcase(subject, pattern) for pattern in stream.subjects)
        await self.publish(Outgoing(subject, message))

    async def last(self, stream: Stream, subject: str) -> bytes | None:
        """Return the payload of the last message that a stream keeps of a subject, if any; raises BusUnavailable."""
        if not self._client.is_connected:
            raise BusUnavailable(self._problem)
        try:
            stored = await streams.read_last(self._client, stream, subject)
        except FAILURES as error:
            self._doubtful.set()
            raise BusUnavailable(reason(error)) from error
        return stored.payload if stored else None

    async def backwards(self, stream: Stream, subject: str, messages_max: int) -> AsyncIterator[Stored]:
        """Yield the last messages of a stream that has this one subject, the last one first; raises BusUnavailable."""
        assert stream.subjects == (subject,)
        if not self._client.is_connected:
            raise BusUnavailable(self._problem)
        try:
            last = await streams.read_last(self._client, stream, subject)
            if last is None:
                return
            yield last
            for sequence in range(last.sequence - 1, max(0, last.sequence - messages_max), -1):
                stored = await streams.read(self._client, stream, sequence)
                if stored is not None:
                    yield stored
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
                client, inbox = self._client, self._inbox
                if inbox is None or not client.is_connected:
                    await clock.wait_for_stop(stop, READY_POLL_SECONDS)
                    continue
                try:
                    await responder.answer_until(stop, client, inbox)
                except FAILURES as error:
                    self._say_problem(f"answering {subject}: {reason(error)}")
                    await clock.wait_for_stop(stop, FAILURE_PAUSE_SECONDS)
        finally:
            await responder.finish()

    async def dead_letters(self) -> list[NumberedLetter]:
        """Return all dead letters, the oldest first; raises BusUnavailable."""
        return await self._ask_streams(dead_letters.listed(self._client))

    async def dead_letter(self, number: int) -> NumberedLetter | None:
        """Return a dead letter by its number; raises BusUnavailable."""
        return await self._ask_streams(dead_letters.found(self._client, number))

    async def replay(self, letter: NumberedLetter) -> None:
        """Publish a dead letter's message as it was, then delete the letter; raises NotReplayable or BusUnavailable."""
        await self._ask_streams(dead_letters.replay(self._client, self.publish, letter))

    async def discard(self, number: int) -> bool:
        """Delete a dead letter; tell whether it was there. Raises BusUnavailable."""
        return await self._ask_streams(dead_letters.discard(self._client, number))

    async def _ask_streams(self, question: Coroutine[Any, Any, T]) -> T:
        try:
            return await question
        except FAILURES as error:
            raise BusUnavailable(reason(error)) from error

    async def consume(
        self,
        stream: Stream,
        *,
        durable: str,
        ack_wait_seconds: float,
        stop: asyncio.Event,
        deliveries_max: int = DELIVERIES_MAX,
        postponed: Callable[[Delivery], int] = lambda _: 0,
    ) -> AsyncIterator[Delivery]:
        """Yield the stream's messages one at a time, shared with all consumers of the same name, until `stop`.

        Survives a server that restarts, freezes or loses its disk: the consumer is made again. A message that was
        delivered `deliveries_max` times and not answered is put aside as a dead letter instead. Deliveries of a message
        that `postponed` tells of are not counted: it was not due yet, and handed back for that.
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
                try:
                    messages = await subscription.fetch(1, timeout=FETCH_WAIT_SECONDS)
                except TimeoutError:  # nothing is to be done
                    continue
            except FAILURES as error:
                await self._lose(subscription)
                subscription = None
                problem = f"consumer {durable} of {stream.name}: {reason(error)}"
                if problem != self._consumer_problem and not stop.is_set():
                    log.warning(
                        "bus_consumer_lost",
                        problem=problem,
                        advice="it is made again by itself; if it lasts, another program may have one of its name",
                    )
                bus_metrics.consumers_lost.labels(durable).inc()
                self._consumer_problem = problem
                self._doubtful.set()
                await clock.wait_for_stop(stop, FAILURE_PAUSE_SECONDS)
                continue
            for message in messages:
                delivery = Delivery(message, self._keep_letter, service=self._name, consumer=durable)
                if delivery.deliveries > 1:  # most are not, and need not be looked at
                    delivery.deliveries = max(1, delivery.deliveries - postponed(delivery))
                if delivery.deliveries > 1:
                    bus_metrics.redeliveries.labels(durable).inc()
                if delivery.deliveries > deliveries_max:
                    await delivery.put_aside(
                        f"it was delivered {deliveries_max} times and never answered: what had it died or gave it back",
                        stop,
                    )
                else:
                    yield delivery

    async def _keep_letter(self, letter: Outgoing) -> None:
        await self.publish(letter)
        self._doubtful.set()  # so that it is counted

    async def _subscribe(
        self, stream: Stream, durable: str, ack_wait_seconds: float
    ) -> _Context.PullSubscription:
        assert self._js is not None
        config = ConsumerConfig(
            durable_name=durable,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ack_wait_seconds,
            max_deliver=SERVER_DELIVERIES_MAX,
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
                self._begin_anew()
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
            is_well = await self._find_streams() and await self._probe()
            if is_well:
                self._said.clear()
            pause = STREAMS_CHECK_SECONDS if is_well else FAILURE_PAUSE_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._doubtful.wait()
                    await asyncio.sleep(READY_POLL_SECONDS)  # so that many failures are one look

    async def _find_streams(self) -> bool:
        """Find or create the streams, and bring up to date what is ours of them."""
        try:
            found = {stream.name: await self._find_stream(stream) for stream in STREAMS}
        except (*FAILURES, StreamUnfit) as error:
            self._say_problem(f"JetStream: {reason(error)}")
            self._streams_made_at = None
            return False
        made_at = [stream.made_at for stream in found.values()]
        if self._streams_made_at not in (None, made_at):
            self.streams_found += 1
        self._streams_made_at = made_at
        self.dead_letters_kept = found[DEAD_LETTERS.name].messages
        bus_metrics.dead_letters_kept.set(self.dead_letters_kept)
        return True

    async def _find_stream(self, stream: Stream) -> Found:
        sized = stream.name in self._sized - self._size_asked
        found = await streams.find_stream(
            self._client,
            self._owned.get(stream.name, stream),
            owned=stream.name in self._owned,
            sized=sized,
            replicas=self._replicas,
        )
        if sized:
            self._size_asked.add(stream.name)
        return found

    async def _probe(self) -> bool:
        """See whether something is stored; who publishes seldom, or never, would not know."""
        probe = Outgoing(probe_subject(self._name), Probe(probed_at=clock.utc_now()))
        assert self._publisher is not None
        failed = self._explained(await self._publisher.publish_all([probe]))
        if not failed or await self._is_heard():
            self._storing.note([probe], failed)
        return not failed

    async def _is_heard(self) -> bool:
        """Tell whether the server answers at all: what one that is frozen does not store says nothing of its disk."""
        client, inbox = self._client, self._inbox
        if inbox is None or not client.is_connected:
            return False
        return await requests.hears_itself(client, inbox, timeout_seconds=ECHO_AFTER_FAILURE_SECONDS)

    async def _watch(self) -> None:
        """Notice a server that does not answer, as one that is frozen, before the library's pings do.

        One of a cluster is left for another. A single one is waited for: once it goes on, so does the connection.
        """
        missed = 0
        while True:
            await asyncio.sleep(ECHO_EVERY_SECONDS)
            client, inbox = self._client, self._inbox
            if inbox is None or not client.is_connected:
                missed, self._is_mute = 0, False
                continue
            if await requests.hears_itself(client, inbox, timeout_seconds=ECHO_WAIT_SECONDS):
                if self._is_mute:
                    log.info("bus_answers_again")
                    self._storing.forget()
                    self._doubtful.set()
                missed, self._is_mute = 0, False
                continue
            missed += 1
            if missed < ECHOES_MISSED_MAX or not client.is_connected:
                continue
            self._is_mute = True
            self._say_problem(_MUTE)
            if len(client.servers) > 1:
                await client.force_reconnect()

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self._lose_ears()  # messages of one of them were dropped
        forbidden = _FORBIDDEN.search(str(error))
        if forbidden and len(self._forbidden) < PROBLEMS_SAID_MAX:
            self._forbidden.add(forbidden[1])
        self._say_problem(reason(error))

    def _lose_connection(self) -> None:
        self._lose_ears()
        if self._inbox is not None:
            self._inbox.lose()

    def _lose_ears(self) -> None:
        for ear in tuple(self._ears):
            ear.lose()

    async def _on_closed(self) -> None:
        bus_metrics.connected.set(0)
        self._lose_connection()
        self._closed.set()
        self._doubtful.set()

    async def _on_disconnected(self) -> None:
        bus_metrics.connected.set(0)
        self._lose_connection()
        self._say_problem("connection lost")

    async def _on_reconnected(self) -> None:
        log.info("bus_reconnected")
        bus_metrics.reconnects.inc()
        self._begin_anew()
        self.streams_found += 1
        self._doubtful.set()

    def _begin_anew(self) -> None:
        """Forget what was wrong: the server that lets us in may be another one, or have another configuration."""
        bus_metrics.connected.set(1)
        self._storing.forget()
        self._size_asked.clear()
        self._forbidden.clear()
        self._problem = _NOT_CONNECTED

    def _say_problem(self, problem: str) -> None:
        """Log each problem once until all is well again; a refused password outlasts the resets that follow it."""
        if problem not in self._said and not self._closing and len(self._said) < PROBLEMS_SAID_MAX:
            log.warning("bus_problem", problem=problem, advice=_advice(problem))
            bus_metrics.problems.inc()
            self._said.add(problem)
        if "uthorization" not in self._problem or "uthorization" in problem:
            self._problem = problem


def _advice(problem: str) -> str:
    """Say what to do about a problem."""
    for sign, advice in _ADVICE.items():
        if sign in problem:
            return advice
    return "see nats-server and the network to it; this heals by itself"


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
