"""The portfolio stream: what it shows, how often, to whom, and when it ends."""

import asyncio
import hashlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examined
from hypothesis import strategies as st
from pydantic import BaseModel

from services.api_gateway import live
from services.api_gateway.admission import Admission
from services.api_gateway.live import Live
from services.api_gateway.responses import CurrentPortfolio, Heartbeat, PortfolioChange, StreamEnd, Ticket
from shared.bus import Bus, Outgoing
from shared.clock import utc_now
from shared.database import Database, DatabaseUnavailable
from shared.database_clock import DatabaseClock
from shared.market_calendar import Calendar
from shared.messages import (
    PRICES_CONFIRMED,
    TICKETS,
    PricesConfirmed,
    PriceTick,
    StreamTicket,
    price_subject,
    ticket_subject,
)
from tests.factories import create_user, set_position, set_price
from tests.gateway import Gateway, bearer, running, token
from tests.market import closed_now, open_now
from tests.metrics import sample
from tests.streams import PATH, sse, trade, websocket
from tests.waiting import eventually

CURRENT = "/api/portfolio/current"
TICKETS_PATH = "/api/portfolio/stream-tickets"


@pytest.fixture
async def gateway(database_url: str, bus: Bus) -> AsyncIterator[Gateway]:
    async with running(database_url, bus=bus) as started:
        yield started


@pytest.fixture(autouse=True)
async def demo(database: Database) -> int:
    """The user of the seed's example, and a second position."""
    await set_price(database, "AAPL", "175.00")
    await set_price(database, "IBM", "100.00")
    positions = {"AAPL": ("100", "15000.00"), "IBM": ("2.5", "0.00")}
    return await create_user(database, "demo", cash="5000.50", positions=positions)


def streams_open() -> float:
    return sample("gateway_streams_open", transport="sse")


async def current(gateway: Gateway) -> Any:
    answer = await gateway.get(CURRENT)
    assert answer.status == 200
    return answer.json()


async def test_stream_begins_with_the_whole_portfolio_as_current_answers(gateway: Gateway) -> None:
    async with sse(gateway) as stream:
        first = await stream.next()
        assert first.name == "portfolio"
        assert first.data == await current(gateway)
        assert first.data["total_value"] == Decimal("22750.50")  # 17,500 + 250 + 5,000.50


async def test_a_tick_changes_totals_and_the_position_alone(
    gateway: Gateway, database: Database, bus: Bus
) -> None:
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        await trade(database, bus, "AAPL", "175.0100")
        change = await stream.next("change")
        assert [position["ticker"] for position in change.data["positions"]] == ["AAPL"]
        assert change.data["total_value"] == Decimal("22751.50")
        assert stream.shown == await current(gateway)


async def test_positions_and_cash_reach_the_stream_within_a_second(
    gateway: Gateway, demo: int, database: Database
) -> None:
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        for change, name in (
            (database.fetch("UPDATE users SET cash_balance = 1.00 WHERE id = $1", demo), "change"),
            (set_position(database, demo, "MSFT", "1"), "portfolio"),  # which has no price
            (set_position(database, demo, "AAPL", "50", "7500.00"), "change"),
            (database.fetch("DELETE FROM positions WHERE ticker = 'IBM'"), "portfolio"),
        ):
            began = time.monotonic()
            await change
            assert (await stream.next("portfolio", "change")).name == name
            assert time.monotonic() - began < 1
            assert stream.shown == await current(gateway)
        assert [position["reason"] for position in stream.shown["unpriced"]] == ["no_price"]
        assert stream.shown["total_value"] == Decimal("8751.00")


async def test_a_symbol_that_is_held_from_now_on_is_heard(
    gateway: Gateway, demo: int, database: Database, bus: Bus
) -> None:
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        await set_position(database, demo, "BTC/USD", "0.5", "1000.00")
        await stream.until(lambda shown: bool(shown["unpriced"]))
        await trade(database, bus, "BTC/USD", "96000.5000", feed="us")
        await stream.until(lambda shown: not shown["unpriced"])
        await trade(database, bus, "BTC/USD", "96000.7000", feed="us")
        await stream.until(lambda shown: shown["positions"][1]["current_value"] == Decimal("48000.35"))
        assert stream.shown == await current(gateway)


async def test_a_client_gets_at_most_four_events_a_second(
    gateway: Gateway, database: Database, bus: Bus
) -> None:
    async def trade_on() -> None:
        for cents in range(100):
            await trade(database, bus, "AAPL", f"175.{cents:02}")

    arrivals = []
    async with sse(gateway) as stream:
        trading = asyncio.create_task(trade_on())
        while not (stream.shown and stream.shown["positions"][0]["price_per_share"] == Decimal("175.99")):
            await stream.next("portfolio", "change")
            arrivals.append(time.monotonic())
        await trading
        assert stream.shown == await current(gateway)
    assert all(later - earlier > 0.2 for earlier, later in pairwise(arrivals))


async def test_an_older_tick_does_not_go_back_in_time(gateway: Gateway, database: Database, bus: Bus) -> None:
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        await trade(database, bus, "AAPL", "176.00")
        await stream.next("change")
        row = await database.fetch_row("SELECT * FROM asset_prices WHERE symbol = 'AAPL'")
        assert row is not None
        old = dict(row) | {"price": Decimal("170.0000"), "sequence": 1}
        del old["updated_at"]
        await bus.publish(Outgoing(price_subject("AAPL"), PriceTick(**old)))
        await trade(database, bus, "IBM", "101.00")
        change = await stream.next("change")
        assert [position["ticker"] for position in change.data["positions"]] == ["IBM"]


async def test_statuses_follow_confirmations_and_their_absence(
    gateway: Gateway, database: Database, bus: Bus
) -> None:
    await set_price(database, "AAPL", "175.00", age=timedelta(minutes=4, seconds=59))
    async with sse(gateway) as stream:
        await stream.until(lambda shown: shown["positions"][0]["price_status"] == "stale")
        assert stream.shown == await current(gateway)
        assert stream.shown["price_fresh"] is False
        now = utc_now()
        await database.fetch("UPDATE asset_prices SET updated_at = $1", now)
        await bus.publish(
            Outgoing(PRICES_CONFIRMED, PricesConfirmed(confirmed_at=now, symbols=("AAPL", "IBM")))
        )
        await stream.until(lambda shown: shown["price_fresh"] is True)
        assert stream.shown == await current(gateway)


async def test_outside_the_session_prices_are_closed(database_url: str, bus: Bus) -> None:
    async with running(database_url, bus=bus, hours=closed_now()) as gateway, sse(gateway) as stream:
        first = await stream.next("portfolio")
        assert first.data["market"]["is_open"] is False
        assert {position["price_status"] for position in first.data["positions"]} == {"closed"}
        assert first.data == await current(gateway)


async def test_events_are_as_described(gateway: Gateway, database: Database, bus: Bus) -> None:
    described: dict[str, type[BaseModel]] = {
        "portfolio": CurrentPortfolio,
        "change": PortfolioChange,
        "heartbeat": Heartbeat,
        "end": StreamEnd,
    }
    async with sse(gateway, None, Authorization=f"Bearer {token('demo', expires_in=2)}") as stream:
        first = await stream.next()
        await trade(database, bus, "AAPL", "176.00")
        await stream.next("end")
    async with sse(gateway, Last_Event_ID=stream.events[-2].id or first.id) as resumed:
        await resumed.next("heartbeat", "change")
    seen = stream.events + resumed.events
    assert {event.name for event in seen} >= {"portfolio", "change", "end"}
    for event in seen:
        described[event.name].model_validate(event.data)


# ---- beginning and resuming ----------------------------------------------------------------------


async def test_resuming_gives_what_was_missed_and_no_more(
    gateway: Gateway, database: Database, bus: Bus
) -> None:
    async with sse(gateway) as stream:
        seen = await stream.next("portfolio")
    await trade(database, bus, "IBM", "110.00")
    async with sse(gateway) as other:
        await other.until(lambda shown: shown["positions"][1]["price_per_share"] == Decimal("110.00"))
    async with sse(gateway, Last_Event_ID=seen.id) as resumed:
        event = await resumed.next("portfolio", "change")
        assert event.name == "change"
        assert [position["ticker"] for position in event.data["positions"]] == ["IBM"]
    async with sse(gateway, query=f"?last_event_id={event.id}") as resumed:
        assert (await resumed.next()).name == "heartbeat"  # nothing was missed


@pytest.mark.parametrize("last_event_id", ["0123456789ab.1", "nonsense", "0123456789ab.99999999999999999"])
async def test_an_unknown_event_id_begins_anew(gateway: Gateway, last_event_id: str) -> None:
    async with sse(gateway, Last_Event_ID=last_event_id) as stream:
        assert (await stream.next()).name == "portfolio"


async def test_changed_holdings_begin_anew_for_who_resumes(gateway: Gateway, database: Database) -> None:
    async with sse(gateway) as stream:
        seen = await stream.next("portfolio")
    await database.fetch("DELETE FROM positions WHERE ticker = 'IBM'")
    async with sse(gateway, Last_Event_ID=seen.id) as resumed:
        await resumed.until(lambda shown: len(shown["positions"]) == 1)
        assert resumed.events[0].name in ("portfolio", "heartbeat")  # the notification may come after


async def test_heartbeats_come_when_nothing_else_does(database_url: str, bus: Bus) -> None:
    async with running(database_url, bus=bus, stream_heartbeat_seconds=1) as gateway, sse(gateway) as stream:
        beat = await stream.next("heartbeat")
        assert (beat.id, beat.data["price_fresh"]) == ("", True)
        assert beat.data["last_updated"] == stream.shown["last_updated"]


# ---- who may, and for how long -------------------------------------------------------------------


async def ticket(gateway: Gateway, subject: str = "demo") -> str:
    answer = await gateway.ask("POST", TICKETS_PATH, headers=bearer(subject))
    assert answer.status == 201
    return Ticket.model_validate_json(answer.text).ticket


async def test_a_ticket_opens_one_stream_of_its_user_and_no_second(gateway: Gateway) -> None:
    issued = await ticket(gateway)
    async with sse(gateway, None, query=f"?ticket={issued}") as stream:
        assert (await stream.next()).data["total_value"] == Decimal("22750.50")
    again = await gateway.ask("GET", f"{PATH}?ticket={issued}")
    assert (again.status, again.problem().type) == (401, "urn:foliotick:problem:ticket-invalid")


async def test_of_many_gateways_one_lets_a_ticket_in(database_url: str, bus: Bus, gateway: Gateway) -> None:
    async with running(database_url, bus=bus) as other:
        for _ in range(5):
            issued = await ticket(gateway)

            async def opened(by: Gateway, issued: str = issued) -> int:
                url = f"http://127.0.0.1:{by.port}{PATH}?ticket={issued}"
                async with by.session.get(url) as response:
                    return response.status

            statuses = await asyncio.gather(*(opened(by) for by in (gateway, other, gateway, other)))
            assert sorted(statuses) == [200, 401, 401, 401]


async def test_an_old_ticket_is_refused(gateway: Gateway, bus: Bus) -> None:
    old = "x" * 43
    now = utc_now()
    message = StreamTicket(subject="demo", ticket_expires_at=now, token_expires_at=now + timedelta(hours=1))
    await bus.put(TICKETS, ticket_subject(hashlib.sha256(old.encode()).hexdigest()), message)
    assert (await gateway.ask("GET", f"{PATH}?ticket={old}")).status == 401


@pytest.mark.parametrize("subject", ["demo\x00", "", "x" * 256])
async def test_a_ticket_of_nobody_who_could_be_stored_is_refused(
    gateway: Gateway, bus: Bus, subject: str
) -> None:
    forged = "x" * 43
    later = utc_now() + timedelta(seconds=30)
    message = StreamTicket(subject=subject, ticket_expires_at=later, token_expires_at=later)
    await bus.put(TICKETS, ticket_subject(hashlib.sha256(forged.encode()).hexdigest()), message)
    assert (await gateway.ask("GET", f"{PATH}?ticket={forged}")).status == 401


@pytest.mark.parametrize("given_ticket", ["", "short", "x" * 43, "x" * 4000, "%00", "*", "../.."])
async def test_nonsense_is_no_ticket(gateway: Gateway, given_ticket: str) -> None:
    answer = await gateway.ask("GET", f"{PATH}?ticket={given_ticket}")
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="foliotick"')


async def test_a_token_is_needed_and_one_credential_is_enough(gateway: Gateway) -> None:
    assert (await gateway.ask("GET", PATH)).status == 401
    assert (await gateway.ask("POST", TICKETS_PATH)).status == 401
    issued = await ticket(gateway)
    assert (await gateway.ask("GET", f"{PATH}?ticket={issued}", headers=bearer())).status == 401


async def test_users_without_a_portfolio_are_refused(gateway: Gateway, database: Database) -> None:
    await create_user(database, "gone", active=False)
    assert (await gateway.get(PATH, "gone")).status == 403
    assert (await gateway.get(PATH, "stranger")).status == 404


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://app.example.com", 200),
        ("http://127.0.0.1:{port}", 200),
        ("https://evil.example.com", 403),
        ("http://127.0.0.1:1", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
async def test_pages_of_other_origins_are_refused(
    database_url: str, bus: Bus, origin: str, status: int
) -> None:
    async with running(database_url, bus=bus, cors_allowed_origins=("https://app.example.com",)) as gateway:
        headers = bearer() | {"Origin": origin.format(port=gateway.port)}
        async with gateway.session.get(f"http://127.0.0.1:{gateway.port}{PATH}", headers=headers) as response:
            assert response.status == status
        if status == 403:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await gateway.session.ws_connect(f"http://127.0.0.1:{gateway.port}{PATH}", headers=headers)
            assert refused.value.status == 403


async def test_the_stream_ends_with_its_token(gateway: Gateway) -> None:
    async with sse(gateway, None, Authorization=f"Bearer {token('demo', expires_in=2)}") as stream:
        end = await stream.next("end")
        assert end.data == {"reason": "token_expired"}
        with pytest.raises(ConnectionResetError):
            await stream.next()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE users SET is_active = FALSE", "user_deactivated"),
        ("DELETE FROM users", "user_unknown"),
    ],
)
async def test_the_stream_ends_with_its_user(
    gateway: Gateway, database: Database, statement: str, reason: str
) -> None:
    async with sse(gateway) as stream, websocket(gateway) as (other, _):
        await stream.next("portfolio")
        await other.next("portfolio")
        await database.fetch(statement)
        assert (await stream.next("end")).data == {"reason": reason}
        assert (await other.next("end")).data == {"reason": reason}


async def test_a_stopping_gateway_says_so(database_url: str, bus: Bus) -> None:
    async with aiohttp.ClientSession() as session:
        async with running(database_url, bus=bus) as gateway:
            outlasting = Gateway(gateway.port, session, gateway.served)
            opening = sse(outlasting)
            stream = await opening.__aenter__()
            await stream.next("portfolio")
        assert (await stream.next("end")).data == {"reason": "going_away"}
        await opening.__aexit__(None, None, None)


async def test_a_user_has_a_bounded_number_of_streams(gateway: Gateway) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(20):
            await (await stack.enter_async_context(sse(gateway))).next()
        refused = await gateway.get(PATH)
        assert (refused.status, refused.headers["Retry-After"]) == (429, "2")


async def test_streams_that_are_asked_for_at_once_are_bounded_too(gateway: Gateway) -> None:
    connector = aiohttp.TCPConnector(limit=60)
    async with aiohttp.ClientSession(connector=connector) as session:
        url = f"http://127.0.0.1:{gateway.port}{PATH}"
        opened = await asyncio.gather(*(session.get(url, headers=bearer()) for _ in range(50)))
        statuses = Counter(response.status for response in opened)
        for response in opened:
            response.close()
    assert statuses == {200: 20, 429: 30}

    async def are_free() -> bool:
        return (await gateway.get(PATH + "?last_event_id=x", "stranger")).status == 404 and not streams_open()

    await eventually(are_free)
    async with AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(sse(gateway))


async def test_a_gateway_has_a_bounded_number_of_streams(database_url: str, bus: Bus) -> None:
    async with running(database_url, bus=bus, gateway_streams_max=1) as gateway, sse(gateway) as stream:
        await stream.next()
        before = sample("gateway_requests_refused_total", reason="streams")
        assert (await gateway.get(PATH)).status == 503
        assert sample("gateway_requests_refused_total", reason="streams") == before + 1
        assert (await gateway.says("streams")).startswith("too many streams, new ones refused: 1 in 0 s")
        assert (await gateway.get("/readyz", None)).json()["checks"]["streams"] == "degraded"


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(("goes_by_the_database", "status"), [(True, "live"), (False, "stale")])
async def test_a_clock_that_is_an_hour_ahead_makes_no_price_old(
    database: Database, database_url: str, bus: Bus, *, goes_by_the_database: bool, status: str
) -> None:
    def ahead() -> datetime:
        return utc_now() + timedelta(hours=1)

    shared = DatabaseClock(database, own=ahead)
    assert await shared.read()
    now = shared.now if goes_by_the_database else ahead
    async with running(database_url, bus=bus, now=now) as gateway, sse(gateway) as stream:
        asked, shown = await current(gateway), (await stream.next()).data
        for found in (asked, shown):
            assert {position["price_status"] for position in found["positions"]} == {status}


# ---- WebSocket -----------------------------------------------------------------------------------


async def test_websocket_shows_the_same(gateway: Gateway, demo: int, database: Database, bus: Bus) -> None:
    async with sse(gateway) as stream, websocket(gateway) as (other, _):
        first, second = await stream.next(), await other.next()
        assert (first.name, first.id, first.data) == (second.name, second.id, second.data)
        for number in range(40):  # so that the frame's length needs two bytes, and more
            await set_position(database, demo, f"S{number}", "1")
        await other.until(lambda shown: len(shown["unpriced"]) == 40)
        await trade(database, bus, "AAPL", "180.00")
        changed = await other.next("change")
        assert changed.data["total_value"] == Decimal("23250.50")


async def test_a_large_portfolio_fits_into_a_frame(gateway: Gateway, demo: int, database: Database) -> None:
    await database.fetch(
        "INSERT INTO positions SELECT $1, 'S' || n, 1, 0 FROM generate_series(1, 1000) AS n", demo
    )
    async with websocket(gateway) as (stream, _):
        first = await stream.next("portfolio")
        assert len(first.data["unpriced"]) == 1000
        assert first.data == await current(gateway)


@pytest.mark.parametrize("said", ["hello", b"\x00", "x" * 5000])
async def test_a_websocket_client_that_says_something_is_shown_out(
    gateway: Gateway, said: str | bytes
) -> None:
    async with websocket(gateway) as (stream, connection):
        await stream.next()
        await (connection.send_str(said) if isinstance(said, str) else connection.send_bytes(said))
        message = await connection.receive(timeout=5)
        assert message.type is aiohttp.WSMsgType.CLOSE  # and nothing after it
        assert message.data in (aiohttp.WSCloseCode.UNSUPPORTED_DATA, aiohttp.WSCloseCode.MESSAGE_TOO_BIG)


async def test_a_websocket_ends_with_its_token_and_says_why(gateway: Gateway) -> None:
    headers = {"Authorization": f"Bearer {token('demo', expires_in=2)}"}
    async with gateway.session.ws_connect(
        f"http://127.0.0.1:{gateway.port}{PATH}", headers=headers
    ) as connection:
        while (message := await connection.receive(timeout=5)).type is aiohttp.WSMsgType.TEXT:
            last = message
        assert '"token_expired"' in last.data
        assert connection.close_code == 4401


# ---- bad clients and bad days --------------------------------------------------------------------


async def test_an_old_client_gets_the_events_as_they_are(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(f"GET {PATH} HTTP/1.0\r\nAuthorization: Bearer {token('demo')}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert await reader.readuntil(b"\n\n") == b"retry: 2000\n\n"
    assert (await reader.readuntil(b"\n\n")).startswith(b"event: portfolio\nid: ")
    writer.close()


async def test_a_client_that_does_not_read_is_held_back_and_nobody_else(
    gateway: Gateway, demo: int, database: Database, bus: Bus
) -> None:
    await database.fetch(
        "INSERT INTO positions SELECT $1, 'S' || n, 1, 0 FROM generate_series(1, 1000) AS n", demo
    )

    def held_back() -> float:
        return sample("gateway_stream_held_back_total")

    before = held_back()
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", gateway.port))
    lazy.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token('demo')}\r\n\r\n".encode())
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        for cents in range(100):
            await trade(database, bus, "AAPL", f"175.{cents:02}")
            await set_position(database, demo, "IBM", f"{cents + 1}")
            if held_back() > before:
                break
        await stream.until(
            lambda shown: shown["positions"][0]["price_per_share"] == Decimal("175") + Decimal(cents) / 100
        )

        async def is_held_back() -> bool:
            return held_back() > before

        await eventually(is_held_back)
    lazy.close()


async def test_a_client_that_leaves_is_forgotten(gateway: Gateway) -> None:
    async with sse(gateway) as stream:
        await stream.next()
        assert streams_open() == 1

    async def is_alone() -> bool:
        return streams_open() == 0

    await eventually(is_alone)


class Failing:
    """A source that is away when it is told so; it counts what it was asked."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.fails_for: set[object] = set()
        self.asked: list[object] = []

    async def fetch_row(self, statement: str, *args: object) -> Any:
        asked = args[0][0] if isinstance(args[0], list) else args[0]
        self.asked.append(asked)
        if asked in self.fails_for:
            raise DatabaseUnavailable("away")
        return await self._database.fetch_row(statement, *args)


async def test_a_price_that_could_not_be_read_is_read_for_the_next_who_asks(
    database: Database,
) -> None:
    failing = Failing(database)
    live = Live(failing, Calendar(open_now()), Admission(4))
    failing.fails_for = {"AAPL", "IBM"}
    with pytest.raises(DatabaseUnavailable):
        await live.watch("demo")
    failing.fails_for = set()
    watched = await live.watch("demo")
    assert watched.portfolio is not None
    assert json.loads(watched.portfolio.whole(utc_now()))["total_value"] == 22750.50


async def test_one_portfolio_that_cannot_be_read_holds_up_no_other(database: Database) -> None:
    failing, told = Failing(database), []
    live = Live(failing, Calendar(open_now()), Admission(4))
    watched = []
    for number in range(12):
        await create_user(database, f"user-{number}")
        watched.append(await live.watch(f"user-{number}"))

        class Watching:
            def wake(self, number: int = number) -> None:
                told.append(number)

            def pass_second(self, now: Any) -> None: ...

            def end(self, reason: str) -> None: ...

        live.add(watched[-1], Watching())
    stop = asyncio.Event()
    running_live = asyncio.create_task(live.run(stop))
    failing.fails_for = {"user-0"}
    live.changed(None)

    async def are_told() -> bool:
        return set(told) == set(range(1, 12))

    await eventually(are_told)
    failing.fails_for = set()

    async def are_all_told() -> bool:
        return 0 in told

    await eventually(are_all_told)
    stop.set()
    await running_live


async def test_without_the_bus_prices_are_read_from_the_database(
    database_url: str, database: Database
) -> None:
    async with running(database_url) as gateway, sse(gateway) as stream:
        await stream.next("portfolio")
        began = time.monotonic()
        await database.fetch("UPDATE users SET cash_balance = 1.00")
        await stream.next("change")
        assert time.monotonic() - began < 1  # of positions and cash the database tells
        await trade(database, None, "AAPL", "180.00")
        await stream.next("change")
        assert stream.shown == await current(gateway)
        refused = await gateway.ask("POST", TICKETS_PATH, headers=bearer())
        assert (refused.status, refused.problem().type) == (503, "urn:foliotick:problem:tickets-unavailable")


async def test_changes_made_while_notifications_were_not_heard_are_found(
    gateway: Gateway, database: Database
) -> None:
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        async with database.transaction() as connection:
            await connection.execute("UPDATE users SET cash_balance = 1.00")
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'api_gateway_listens'"
            )
        await stream.until(lambda shown: shown["cash_balance"] == Decimal("1.00"))


# ---- who may not be believed ---------------------------------------------------------------------


def price_of(shown: dict[str, Any], symbol: str) -> tuple[Decimal, str]:
    (found,) = (held for held in shown["positions"] if held["ticker"] == symbol)
    return found["price_per_share"], found["price_status"]


async def say(bus: Bus, *, received_at: datetime, sequence: int) -> None:
    """Say that AAPL costs a dollar, which the table does not."""
    forged = PriceTick(
        symbol="AAPL",
        price=Decimal("1.00"),
        traded_at=received_at,
        received_at=received_at,
        feed="iex",
        sequence=sequence,
    )
    await bus.publish(Outgoing(price_subject("AAPL"), forged))


async def test_a_tick_that_cannot_be_is_not_shown(gateway: Gateway, database: Database, bus: Bus) -> None:
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        await say(bus, received_at=utc_now() + timedelta(hours=1), sequence=2)
        await say(bus, received_at=utc_now(), sequence=1 + live.SEQUENCE_JUMP_MAX + 1)
        await trade(database, bus, "IBM", "101.00")  # heard after the others
        shown = await stream.until(lambda shown: price_of(shown, "IBM")[0] == Decimal("101.00"))
        assert price_of(shown, "AAPL")[0] == Decimal("175.00")
        await trade(database, bus, "AAPL", "176.00")
        await stream.until(lambda shown: price_of(shown, "AAPL")[0] == Decimal("176.00"))
    assert all(price_of(event.data, "AAPL")[0] > 1 for event in stream.events if event.name == "portfolio")


async def test_a_tick_that_the_table_does_not_have_does_not_last(
    gateway: Gateway, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sse(gateway) as stream:
        await stream.next("portfolio")
        await say(bus, received_at=utc_now(), sequence=2)
        await stream.until(lambda shown: price_of(shown, "AAPL")[0] == Decimal("1.00"))
        monkeypatch.setattr(live, "CHECK_SECONDS", 0.2)
        await stream.until(lambda shown: price_of(shown, "AAPL")[0] == Decimal("175.00"))
        assert stream.shown == (await gateway.get(CURRENT)).json()


async def test_a_confirmation_from_the_future_makes_no_price_fresh(
    gateway: Gateway, database: Database, bus: Bus
) -> None:
    await set_price(database, "AAPL", "175.00", age=timedelta(minutes=10))
    async with sse(gateway) as stream:
        assert price_of((await stream.next("portfolio")).data, "AAPL")[1] == "stale"
        later = utc_now() + timedelta(hours=1)
        await bus.publish(Outgoing(PRICES_CONFIRMED, PricesConfirmed(confirmed_at=later, symbols=("AAPL",))))
        await trade(database, bus, "IBM", "101.00")
        shown = await stream.until(lambda shown: price_of(shown, "IBM")[0] == Decimal("101.00"))
        assert price_of(shown, "AAPL") == (Decimal("175.00"), "stale")


async def test_a_confirmation_that_the_table_has_no_more_does_not_last(
    gateway: Gateway, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "CHECK_SECONDS", 0.2)
    await set_price(database, "AAPL", "175.00", age=timedelta(hours=-1))  # by a clock that was wrong
    async with sse(gateway) as stream:
        assert price_of((await stream.next("portfolio")).data, "AAPL")[1] == "live"
        await database.fetch("UPDATE asset_prices SET updated_at = now() - interval '10 minutes'")
        await stream.until(lambda shown: price_of(shown, "AAPL")[1] == "stale")


# ---- exactness -----------------------------------------------------------------------------------

SHARES = st.decimals("0.000000001", 99_999, places=9)
PRICES = st.decimals("0.0001", 99_999_999, places=4)
MONEY = st.decimals(0, 10**12, places=2)


@examined(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cash=MONEY, held=st.lists(st.tuples(SHARES, MONEY, PRICES, PRICES), min_size=1, max_size=12))
async def test_the_stream_equals_current_to_the_cent(
    gateway: Gateway,
    database: Database,
    bus: Bus,
    cash: Decimal,
    held: list[tuple[Decimal, Decimal, Decimal, Decimal]],
) -> None:
    await database.fetch("DELETE FROM users")
    example = await create_user(database, "demo", cash=str(cash))
    for number, (shares, cost, price, _) in enumerate(held):
        await set_price(database, f"T{example}.{number}", str(price))  # before anybody could hear its tick
        await set_position(database, example, f"T{example}.{number}", str(shares), str(cost))
    async with sse(gateway) as stream:
        expected = await current(gateway)
        await stream.until(
            lambda shown: shown == expected
        )  # the last position may be notified after the beginning
        for number, (_, _, _, price) in enumerate(held):
            await trade(database, bus, f"T{example}.{number}", str(price))
        traded = await current(gateway)
        shown = await stream.until(lambda shown: shown == traded)
        assert shown == await current(gateway)
