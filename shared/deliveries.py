"""Messages that a durable consumer delivers: acknowledged, handed back, or put aside for an operator."""

import asyncio
from base64 import b64encode
from collections.abc import Awaitable, Callable
from datetime import datetime

from nats.aio.msg import Msg

from shared import bus_metrics, clock, logs
from shared.bus_failures import FAILURES, BusUnavailable, reason
from shared.messages import DEAD_LETTER_PAYLOAD_BYTES_MAX, DeadLetter, dead_letter_subject
from shared.publishing import Outgoing

DELIVERIES_MAX = 5
"""A message that was delivered so often and not answered is put aside: it may be what its handlers die of.

Who waits for PostgreSQL or NATS keeps the message meanwhile, which is no delivery; a kill is one, a stop may be one.
"""
SERVER_DELIVERIES_MAX = 100
"""The server itself stops then. It is far more, as putting aside may have to wait until JetStream stores again."""
RETRY_SECONDS = 2.0
REASON_LENGTH_MAX = 500

log = logs.get_logger()


class Delivery:
    """A message that a durable consumer delivered; it comes again unless it is answered in time.

    Three answers are there: `acknowledge`, `postpone` and `put_aside`.
    """

    def __init__(
        self, received: Msg, publish: Callable[[Outgoing], Awaitable[None]], *, service: str, consumer: str
    ) -> None:
        self._received = received
        self._publish = publish
        self._service = service
        self._consumer = consumer
        self.subject: str = received.subject
        self.payload: bytes = received.data
        self.published_at: datetime = received.metadata.timestamp
        self.deliveries: int = received.metadata.num_delivered or 1
        self.is_answered = False

    async def acknowledge(self) -> None:
        """Say that the work is done and committed."""
        await self._settle(self._received.ack)

    async def postpone(self, delay_seconds: float) -> None:
        """Ask for the message again after `delay_seconds`, which another replica may get."""
        await self._settle(lambda: self._received.nak(delay=delay_seconds))

    async def put_aside(self, why: str, stop: asyncio.Event) -> None:
        """Keep the message as a dead letter, then say that it can never be handled.

        In that order, so that it is never nowhere. While JetStream does not store the letter the message stays here;
        when `stop` is set it is handed back.
        """
        letter = self._letter(why)
        stored = self._received.metadata.sequence.stream
        message_id = f"{self._received.metadata.stream}/{stored}/{self.published_at.isoformat()}"
        outgoing = Outgoing(dead_letter_subject(self._consumer), letter, message_id)
        was_said = False
        while True:
            try:
                await self._publish(outgoing)
                break
            except BusUnavailable as error:
                if not was_said:
                    log.warning(
                        "dead_letter_not_stored",
                        advice="it is held until JetStream stores it: see /readyz and nats-server",
                        subject=self.subject,
                        problem=str(error),
                    )
                    was_said = True
            await self._answer(self._received.in_progress)
            if await clock.wait_for_stop(stop, RETRY_SECONDS):
                await self.postpone(0)
                return
        await self._settle(self._received.term)
        bus_metrics.dead_letters.labels(self._consumer).inc()
        log.error(
            "message_put_aside",
            subject=self.subject,
            consumer=self._consumer,
            deliveries=self.deliveries,
            size=letter.size,
            reason=letter.reason,
            advice="`admin dead-letters` shows it; mend the cause, then `admin replay-dead-letter`, or discard it",
        )

    async def keep_alive(self, every_seconds: float) -> None:
        """Tell the server, until cancelled, that the work goes on, so that no other replica is given it."""
        while True:
            await asyncio.sleep(every_seconds)
            await self._answer(self._received.in_progress)

    def _letter(self, why: str) -> DeadLetter:
        return DeadLetter(
            subject=self.subject,
            payload=b64encode(self.payload[:DEAD_LETTER_PAYLOAD_BYTES_MAX]).decode(),
            size=len(self.payload),
            reason=why[:REASON_LENGTH_MAX],
            deliveries=self.deliveries,
            published_at=self.published_at,
            put_aside_at=clock.utc_now(),
            put_aside_by=self._service,
        )

    async def _settle(self, answer: Callable[[], Awaitable[None]]) -> None:
        self.is_answered = True
        await self._answer(answer)

    async def _answer(self, answer: Callable[[], Awaitable[None]]) -> None:
        try:
            await answer()
        except FAILURES as error:  # the message will be delivered again, which must be harmless
            log.warning(
                "bus_answer_failed",
                advice="nothing: the message comes again, harmlessly",
                error=reason(error),
            )
