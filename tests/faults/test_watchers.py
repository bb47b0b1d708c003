"""Watchers say what is wrong with a stream, and with its end: their gateway here does as it is told."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from local.settings import free_port
from tests.faults import population, truth
from tests.faults.parts import FROZEN, KILLED, STOPPING, Nats, Postgres, Service, Spell
from tests.faults.population import Order, User
from tests.faults.system import MARKET_SEED, System
from tests.faults.watchers import SSE, TRANSPORTS, WEBSOCKET, Watcher, Watchers
from tests.streams import PATH
from tests.waiting import eventually

GATEWAY, OTHER = "api_gateway-1", "api_gateway-2"
Told = tuple[str, dict[str, Any]]
"""The name of an event, and its data."""

MARKET = truth.Market(MARKET_SEED)
NOW = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
OLDER, NEWER = (MARKET.latest_trade("AAPL", NOW - ago) for ago in (timedelta(minutes=2), timedelta(0)))
PROBLEM = {"type": "urn:foliotick:problem:database-unavailable", "status": 503, "title": "Away"}


def portfolio(order: int = 0, trade: Any = NEWER, **change: object) -> Told:
    """Return what is to be seen of one who began with 2 AAPL and 100 dollars, after so many orders."""
    value = truth.market_value(Decimal(2 + order), trade.price)
    cash = Decimal("100.00") - order
    position = {
        "ticker": "AAPL",
        "shares": 2 + order,
        "price_per_share": trade.price,
        "current_value": value,
        "price_as_of": truth.traded_at(trade).isoformat(),
    }
    whole = {
        "cash_balance": cash,
        "positions": [position],
        "unpriced": [],
        "investment_value": value,
        "total_value": cash + value,
    }
    return "portfolio", whole | change


def end(reason: str) -> Told:
    return "end", {"reason": reason}


HEARTBEAT: Told = ("heartbeat", {})
IDS = {"portfolio": "1", "change": "2"}


@dataclass
class Scripted:
    """A gateway that says what it is told to, and breaks off."""

    port: int
    script: Sequence[Told] = ()
    status: int = 200
    content_type: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    current: dict[str, Any] = field(default_factory=lambda: portfolio()[1])

    async def answer_current(self, _: web.Request) -> web.Response:
        return web.Response(text=json.dumps(self.current, default=_number), content_type="application/json")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.status != 200:
            return web.json_response(PROBLEM, status=self.status, headers=self.headers)
        if "Upgrade" in request.headers:
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            for name, data in self.script:
                await socket.send_str(
                    json.dumps({"event": name, "id": IDS.get(name, ""), "data": data}, default=_number)
                )
            assert request.transport is not None
            request.transport.abort()
            return socket
        response = web.StreamResponse(headers={"Content-Type": self.content_type})
        await response.prepare(request)
        for name, data in self.script:
            await response.write(
                f"event: {name}\nid: {IDS.get(name, '')}\ndata: {json.dumps(data, default=_number)}\n\n".encode()
            )
        return response


def _number(value: Decimal) -> float:
    return float(value)


@asynccontextmanager
async def scripted(script: Sequence[Told] = (), **answer: Any) -> AsyncIterator[Scripted]:
    gateway = Scripted(free_port(), script, **answer)
    application = web.Application()
    application.router.add_get(PATH, gateway.answer)
    application.router.add_get("/api/portfolio/current", gateway.answer_current)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", gateway.port).start()
    try:
        yield gateway
    finally:
        await runner.cleanup()


def watchers_of(gateway: Scripted) -> Watchers:
    """Return watchers of a system in which nothing but this gateway runs, under two names."""
    still = System(
        folder=Path(),
        population=population.Population([]),
        postgres_servers=[Postgres("postgres")],
        nats_servers=[Nats("nats")],
        market=Service("market"),
        services={"api_gateway": [Service(GATEWAY), Service(OTHER)]},
        http=None,  # type: ignore[arg-type]  # nobody is asked
        gateway_ports={GATEWAY: gateway.port, OTHER: gateway.port},
        jwt_secret="a secret of more than thirty-two bytes",
    )
    return Watchers(still)


def holder(*orders: Order) -> User:
    return User("holder", Decimal("100.00"), {"AAPL": Decimal(2)}, orders=list(orders))


def struck(watchers: Watchers, part: str, why: str) -> None:
    """Let something befall a part from two seconds ago on."""
    watchers.system.part(part).spells.append(Spell(why, time.monotonic() - 2))


async def watched(watchers: Watchers, watcher: Watcher | None = None, *, gateway: str = GATEWAY) -> list[str]:
    """Follow one stream; return what is wrong with it."""
    before = len(watchers.wrong)
    async with aiohttp.ClientSession() as http:
        await watchers.follow(http, gateway, watcher or Watcher(holder(), SSE))
    return watchers.wrong[before:]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_stream_that_is_right_and_ended_by_a_gateway_that_stops_is_no_finding(transport: str) -> None:
    now = time.monotonic()
    user = holder(Order(1, now - 1, now - 0.5))
    script = [portfolio(0, OLDER), portfolio(1), HEARTBEAT, end("going_away")]
    async with scripted(script) as gateway:
        watchers = watchers_of(gateway)
        struck(watchers, GATEWAY, STOPPING)
        assert await watched(watchers, Watcher(user, transport)) == []
    assert watchers.counts == {transport: 1, "portfolio": 2, "heartbeat": 1, "end": 1}
    assert not watchers.lost
    assert watchers.unexcused() == []


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_stream_that_breaks_off_is_excused_by_what_befell_its_gateway_alone(transport: str) -> None:
    async with scripted([portfolio()]) as gateway:
        watchers = watchers_of(gateway)
        struck(watchers, "postgres", KILLED)
        struck(watchers, OTHER, KILLED)
        assert await watched(watchers, Watcher(holder(), transport)) == []
        (said,) = watchers.unexcused()
        assert said.startswith(f"{GATEWAY} gave no answer (stream: ")
        struck(watchers, GATEWAY, FROZEN)
        assert watchers.unexcused() == []


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_refused_stream_must_have_manners_and_a_reason(transport: str) -> None:
    async with scripted(status=503, headers={"Retry-After": "1"}) as gateway:
        watchers = watchers_of(gateway)
        assert await watched(watchers, Watcher(holder(), transport)) == []
        (said,) = watchers.unexcused()
        assert said.startswith(f"{GATEWAY} refused without need")
        struck(watchers, "postgres", FROZEN)
        assert watchers.unexcused() == []
        gateway.headers = {}
        assert await watched(watchers, Watcher(holder(), transport)) == [
            "stream of holder: 503 with None for Retry-After"
        ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("status", [401, 404, 500])
async def test_other_status_is_wrong_whatever_is_struck(transport: str, status: int) -> None:
    async with scripted(status=status) as gateway:
        watchers = watchers_of(gateway)
        struck(watchers, GATEWAY, FROZEN)
        (said,) = await watched(watchers, Watcher(holder(), transport))
    assert said.startswith(f"stream of holder: {status}")


async def test_other_content_is_wrong() -> None:
    async with scripted(content_type="text/html") as gateway:
        assert await watched(watchers_of(gateway)) == ["stream of holder: it is text/html"]


async def test_gateway_may_end_a_stream_only_when_it_stops() -> None:
    async with scripted([portfolio(), end("going_away")]) as gateway:
        watchers = watchers_of(gateway)
        struck(watchers, GATEWAY, FROZEN)
        assert await watched(watchers) == [
            f"stream of holder, end: {GATEWAY} ended it without need: going_away"
        ]
        struck(watchers, GATEWAY, STOPPING)
        gateway.script = [portfolio(), end("user_unknown")]
        assert await watched(watchers) == [
            f"stream of holder, end: {GATEWAY} ended it without need: user_unknown"
        ]


async def test_value_that_is_not_the_sum_and_price_that_the_market_never_had_are_wrong() -> None:
    wrong_price = NEWER.price + Decimal("0.01")
    position = portfolio()[1]["positions"][0] | {"price_per_share": wrong_price}
    script = [
        portfolio(total_value=Decimal("100.00")),
        portfolio(positions=[position]),
        ("change", {"positions": []}),
    ]
    async with scripted(script) as gateway:
        found = await watched(watchers_of(gateway))
    assert any("total value 100" in each for each in found), found
    assert any(f"AAPL at {wrong_price}" in each and f"it was {NEWER.price}" in each for each in found), found


async def test_change_of_nothing_is_wrong() -> None:
    async with scripted([("change", portfolio()[1])]) as gateway:
        assert await watched(watchers_of(gateway)) == ["stream of holder, change: nothing was shown before"]


async def test_what_a_gateway_has_shown_it_must_not_take_back_and_another_may_be_behind() -> None:
    now = time.monotonic()
    watcher = Watcher(holder(Order(1, now - 2, None), Order(2, now - 1, None)), SSE)
    async with scripted([portfolio(1)]) as gateway:
        watchers = watchers_of(gateway)
        assert await watched(watchers, watcher) == []
        gateway.script = [portfolio(0, OLDER)]
        assert await watched(watchers, watcher, gateway=OTHER) == []
        order, price = await watched(watchers, watcher)
        assert "holdings of no order in range(1, 3)" in order
        assert f"after one of {truth.traded_at(NEWER)} was seen" in price


@pytest.mark.parametrize("part", ["", GATEWAY, "postgres"])
async def test_order_of_a_while_ago_must_be_shown_unless_something_was_struck(part: str) -> None:
    now = time.monotonic()
    shows_none = [portfolio(0), HEARTBEAT]
    recent = Watcher(holder(Order(1, now - 6, now - 5)), SSE)
    async with scripted(shows_none) as gateway:
        watchers = watchers_of(gateway)
        assert await watched(watchers, recent) == []
        if part:
            struck(watchers, part, FROZEN)
        found = await watched(watchers, Watcher(holder(Order(1, now - 20, now - 19)), SSE))
    assert len(found) == (0 if part else 2), found
    assert all("holdings of no order in range(1, 2)" in each for each in found)


async def test_streams_that_always_break_off_and_what_current_does_not_say_are_found() -> None:
    async with scripted([portfolio(0)]) as gateway:
        watchers = watchers_of(gateway)
        watchers.agreement_seconds_max = 0.3
        watchers.system.population.users.extend([holder(), replace(holder(), subject="other")])
        stop = asyncio.Event()
        running = asyncio.create_task(watchers.run(2, stop, 1))

        async def are_lost() -> bool:
            return watchers.counts["lost"] >= 4

        await eventually(are_lost)
        assert watchers.counts[SSE]
        assert watchers.counts[WEBSOCKET]
        gateway.current = portfolio(1)[1]
        stop.set()
        await running
    assert len([each for each in watchers.wrong if " is shown " in each]) == 2
    assert len([each for each in watchers.wrong if "gave no answer (stream: " in each]) >= 4
