"""The bus: whatever is said on a subject that somebody hears, nobody falls, and nothing wrong is stored or shown."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any

import aiohttp
import nats
import pytest
from hypothesis import strategies as st
from nats.aio.client import Client

from services.api_gateway import live
from services.price_feeder import answers
from services.snapshotter import snapshots
from shared import requests
from shared.bus import Bus
from shared.clock import utc_now
from shared.database import Database
from shared.messages import (
    FEED_STATUS,
    PRICES_CONFIRMED,
    PRICES_REQUESTED,
    REFRESH_REQUESTED,
    REQUESTED_SNAPSHOT_TAKEN,
    SNAPSHOT_DUE,
    SNAPSHOT_REQUESTED,
    SNAPSHOTS_TAKEN,
    price_subject,
    ticket_subject,
)
from tests.contract import validator
from tests.factories import create_user, set_price
from tests.fuzz.strategies import INSTANTS, VALUES, wrong
from tests.fuzz.trying import nothing_unexpected_logged, try_each
from tests.gateway import Gateway, running
from tests.integration.fake_alpaca import running_fake
from tests.integration.leases import held_lease
from tests.integration.responders import feeder, snapshotter
from tests.streams import Stream, sse, trade
from tests.waiting import answered, eventually, settled

INTERVAL = timedelta(minutes=5)
WATCHED, STEADY = "AAPL", "IBM"
STEADY_TOTAL = Decimal("350.25")
"""Of the users with STEADY: 100.25 in cash and 2.5 at 100.00."""
TICKET = "x" * 43
REQUESTS = {
    PRICES_REQUESTED: "PricesReply",
    REFRESH_REQUESTED: "PricesRefreshed",
    SNAPSHOT_REQUESTED: "SnapshotTaken",
}
"""Which answer a request has."""
MALFORMED = ("message_put_aside",)
"""What is said of messages that can never be handled."""
REFUSALS = {"400", "403", "404", "413", "429", "503"}


TEXTS = ["1e400", "99999999999.9999", "0.0001", "NaN", "-1", "A" * 32, "A" * 900_000, "demo\x00", "\x7f"]


def now_text(ahead_seconds: float = 0.0) -> str:
    return (utc_now() + timedelta(seconds=ahead_seconds)).isoformat()


def tick() -> dict[str, Any]:
    at = now_text()
    return {
        "symbol": WATCHED,
        "price": "1.5",
        "traded_at": at,
        "received_at": at,
        "feed": "iex",
        "sequence": 1,
    }


def due() -> dict[str, Any]:
    return {"scheduled_at": now_text(-1), "shard": 0, "shards": 1}


def announced() -> dict[str, Any]:
    return due() | {"portfolios": 1, "positions": 1, "unpriced": 0}


def taken() -> dict[str, Any]:
    amounts = dict.fromkeys(("total_value", "cash_balance", "investment_value"), "1.00")
    return {"user_id": 1, "timestamp": now_text(), **amounts, "unpriced_positions": 0, "simulated": False}


def confirmed() -> dict[str, Any]:
    return {"confirmed_at": now_text(), "symbols": [WATCHED]}


def status() -> dict[str, Any]:
    return {"state": "live", "since": now_text(), "detail": "", "streamed": 1, "polled": 0}


def asked() -> dict[str, Any]:
    return {"user_id": 1, "requested_at": now_text()}


def ticket() -> dict[str, Any]:
    expires_at = now_text(30)
    return {"subject": "demo", "ticket_expires_at": expires_at, "token_expires_at": expires_at}


RIGHT = {
    price_subject(WATCHED): tick,
    price_subject("BTC/USD"): tick,
    "prices.v1.equity.no.symbol": tick,
    SNAPSHOT_DUE: due,
    SNAPSHOTS_TAKEN: announced,
    REQUESTED_SNAPSHOT_TAKEN: taken,
    SNAPSHOT_REQUESTED: asked,
    REFRESH_REQUESTED: asked,
    PRICES_REQUESTED: lambda: {"symbols": [WATCHED, "NONE"]},
    PRICES_CONFIRMED: confirmed,
    FEED_STATUS: status,
    ticket_subject(hashlib.sha256(TICKET.encode()).hexdigest()): ticket,
}
"""Every subject that a service hears, and a message that belongs there."""


@st.composite
def said(draw: st.DrawFn) -> tuple[str, bytes, int]:
    """Return a subject, a payload that does not belong there, and how often it is sent."""
    subject = draw(st.sampled_from(sorted(RIGHT)))
    payload = draw(
        st.one_of(wrong(RIGHT[subject]), st.sampled_from(sorted(RIGHT)).flatmap(lambda s: wrong(RIGHT[s])))
    )
    return subject, payload, draw(st.sampled_from([1, 1, 1, 2, 5]))


@st.composite
def extreme(draw: st.DrawFn) -> tuple[str, bytes, int]:
    """Return a message of the right shape with extreme values."""
    subject = draw(st.sampled_from(sorted(RIGHT)))
    message = RIGHT[subject]()
    for name in draw(st.lists(st.sampled_from(sorted(message)), min_size=1, max_size=2)):
        values: st.SearchStrategy[Any] = {
            str: st.one_of(
                INSTANTS, st.sampled_from(["1e400", "99999999999.9999", "0.0001", "NaN", "-1", "A" * 32])
            ),
            int: st.sampled_from([0, -1, 2, 1023, 1024, 2**31, 2**63 - 1, 2**63, 10**400]),
        }.get(type(message[name]), VALUES)
        message[name] = draw(values)
    return subject, json.dumps(message).encode(errors="surrogatepass"), draw(st.sampled_from([1, 2]))


@dataclass
class System:
    database: Database
    bus: Bus
    client: Client
    gateway: Gateway
    stream: Stream
    began_at: datetime
    prices: Iterator[int]

    async def say(self, subject: str, payload: bytes, times: int) -> None:
        """Publish it, as a request where it is one, whose answer must be as documented or a refusal."""
        headers = {"Nats-Msg-Id": "same"} if times == 5 else None
        for _ in range(times):
            if subject not in REQUESTS:
                await self.client.publish(subject, payload, headers=headers)
                continue
            answer = await self.client.request(subject, payload, timeout=10)
            code = (answer.headers or {}).get(requests.ERROR_CODE_HEADER)
            if code is None:
                validator(REQUESTS[subject]).validate(json.loads(answer.data))
            else:
                assert code in REFUSALS, answer.headers
                assert "Traceback" not in str(answer.headers)

    async def takes_a_slot(self) -> None:
        """A slot that is due now is stored, for everybody, once and right."""
        slot = utc_now()
        message = due() | {"scheduled_at": slot.isoformat()}
        await self.client.publish(SNAPSHOT_DUE, json.dumps(message).encode())

        async def it_is_stored() -> bool:
            rows = await self.database.fetch(
                "SELECT user_id FROM portfolio_snapshots WHERE timestamp = $1", slot
            )
            return len(rows) == 3

        await eventually(it_is_stored, timeout=20)

    async def nothing_wrong_is_stored(self, before: dict[str, tuple[object, ...]]) -> None:
        rows = await self.database.fetch(
            """
            SELECT subject, timestamp, total_value, unpriced_positions
            FROM portfolio_snapshots JOIN users ON users.id = user_id
            """
        )
        for row in rows:
            assert self.began_at - INTERVAL <= row["timestamp"] <= utc_now() + timedelta(seconds=10)
            assert row["unpriced_positions"] == 0
            if row["subject"] != "demo":
                assert row["total_value"] == STEADY_TOTAL
        assert await self.stored_prices() == before

    async def stored_prices(self) -> dict[str, tuple[object, ...]]:
        rows = await self.database.fetch("SELECT symbol, price, traded_at, sequence FROM asset_prices")
        return {row["symbol"]: tuple(row) for row in rows}

    async def answers(self) -> None:
        """A request for prices is answered with what the table has."""
        answer = await self.client.request(PRICES_REQUESTED, b'{"symbols":["IBM"]}', timeout=10)
        (price,) = json.loads(answer.data)["prices"]
        assert (price["symbol"], price["price"]) == (STEADY, "100.0000")

    async def shows_a_trade(self) -> None:
        """A trade reaches the stream, which comes to say what `/current` does, whatever else it heard."""
        await trade(self.database, self.bus, WATCHED, f"{next(self.prices)}.25")

        async def current() -> Any:
            answer = await self.gateway.get("/api/portfolio/current")
            assert answer.status == 200
            return answer.json()

        async with asyncio.timeout(20):
            while self.stream.shown != await current():
                await self.stream.next()
        ready = await self.gateway.get("/readyz", None)
        assert ready.status == 200, ready.text

    async def redeems_or_refuses_the_ticket(self) -> None:
        url = f"http://127.0.0.1:{self.gateway.port}/api/portfolio/stream?ticket={TICKET}"
        async with self.gateway.session.get(url) as response:
            assert response.status in (200, 401, 404)

    async def is_healthy(self) -> None:
        before = await self.stored_prices()
        await self.nothing_wrong_is_stored(before)
        await self.takes_a_slot()
        await self.answers()
        await self.redeems_or_refuses_the_ticket()
        await self.nothing_wrong_is_stored(before)
        await self.shows_a_trade()

    async def nothing_waits(self) -> None:
        """No message is left that comes again and again."""

        async def none_does() -> bool:
            consumer = await self.client.jetstream().consumer_info("TIMER", snapshots.CONSUMER)
            return (consumer.num_pending, consumer.num_ack_pending) == (0, 0)

        await eventually(none_does, timeout=20)


@asynccontextmanager
async def system(database: Database, database_url: str, bus: Bus, nats_url: str) -> AsyncIterator[System]:
    """Run all that hears the bus, with a stream open, and prices and users of which everything is known."""
    await set_price(database, WATCHED, "175.00")
    await set_price(database, STEADY, "100.00")
    await create_user(database, cash="1.00", positions={WATCHED: ("2", "1")})
    for subject in ("steady", "same"):
        await create_user(database, subject, cash="100.25", positions={STEADY: ("2.5", "1")})
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        client = await nats.connect(nats_url)
        stack.push_async_callback(client.close)
        alpaca = await stack.enter_async_context(running_fake())
        lease = await stack.enter_async_context(held_lease(database))
        await stack.enter_async_context(feeder(database, bus, alpaca, lease, cooldown=timedelta(0)))
        await stack.enter_async_context(snapshotter(database_url, bus, cooldown=timedelta(0)))
        gateway = await stack.enter_async_context(running(database_url, bus=bus))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        stack.callback(stop.set)
        tasks.create_task(snapshots.run(database, bus, INTERVAL, stop))
        tasks.create_task(answers.run(database, bus, stop))
        # Of its own, as the other one ends everything after some seconds.
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout()))
        stream = await stack.enter_async_context(sse(replace(gateway, session=session)))
        await settled(client)
        for subject in REQUESTS:
            await answered(client, subject, b"")
        yield System(database, bus, client, gateway, stream, utc_now(), count(200))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a gateway does not believe it looks up at once, and everything often."""
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(live, "UNHEARD_SECONDS", 0.02)
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.1)


@pytest.mark.usefixtures("hurried")
async def test_after_any_messages_everything_is_well(
    database: Database, database_url: str, bus: Bus, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with system(database, database_url, bus, nats_url) as running_system:

        async def check(messages: list[tuple[str, bytes, int]]) -> None:
            for subject, payload, times in messages:
                await running_system.say(subject, payload, times)
            await settled(running_system.client)
            await running_system.is_healthy()

        with nothing_unexpected_logged(caplog, but=MALFORMED):
            await try_each(check, st.lists(st.one_of(said(), extreme()), min_size=1, max_size=12), count=8)
            await running_system.nothing_waits()
