"""Alpaca's endpoints: who may ask, how often, the faults that are due, and the answer."""

import time
from collections.abc import Awaitable, Callable
from datetime import date, timedelta
from functools import partial

import orjson
from aiohttp import web

from services.market_simulator import market_data
from services.market_simulator.access import Quota, RateLimit, Refused, key_of
from services.market_simulator.answers import answer, error, too_many_requests
from services.market_simulator.faults import SPOILERS, Fault
from services.market_simulator.instants import datetime_of
from services.market_simulator.misbehaviour import replacement
from services.market_simulator.questions import (
    CRYPTO,
    STOCKS,
    Question,
    Venue,
    asked_symbols,
    day_of,
    question,
)
from services.market_simulator.sessions import sessions
from services.market_simulator.simulator import Simulator
from services.market_simulator.spoiling import spoiled
from services.market_simulator.wire import Json, calendar_days, market_clock

CALENDAR_FIRST = date(1970, 1, 1)
CALENDAR_LAST = date(2029, 12, 31)

_Ask = Callable[[Question, web.Request], Awaitable[Json]]
_Answer = Callable[[web.Request], Awaitable[web.Response]]


def routes(simulator: Simulator) -> list[web.RouteDef]:
    """Return the routes of the data host and of the trading host."""

    def latest(venue: Venue, path: str, what: str) -> web.RouteDef:
        async def ask(asked: Question, _: web.Request) -> Json:
            return market_data.latest_of_all(simulator, asked, what)

        return web.get(path, partial(_data, simulator, venue, ask))

    def latest_of_one(path: str, what: str) -> web.RouteDef:
        async def ask(asked: Question, _: web.Request) -> Json:
            return market_data.latest_of_one(simulator, asked, what)

        return web.get(path, partial(_data, simulator, STOCKS, ask))

    def bars(venue: Venue, path: str, *, single: bool = False) -> web.RouteDef:
        async def ask(asked: Question, request: web.Request) -> Json:
            return await market_data.bars(simulator, asked, request.query, single=single)

        return web.get(path, partial(_data, simulator, venue, ask))

    return [
        latest(STOCKS, "/v2/stocks/trades/latest", "trade"),
        latest(STOCKS, "/v2/stocks/quotes/latest", "quote"),
        latest(STOCKS, "/v2/stocks/bars/latest", "bar"),
        latest(STOCKS, "/v2/stocks/snapshots", "snapshot"),
        bars(STOCKS, "/v2/stocks/bars"),
        latest_of_one("/v2/stocks/{symbol}/trades/latest", "trade"),
        latest_of_one("/v2/stocks/{symbol}/quotes/latest", "quote"),
        latest_of_one("/v2/stocks/{symbol}/bars/latest", "bar"),
        latest_of_one("/v2/stocks/{symbol}/snapshot", "snapshot"),
        bars(STOCKS, "/v2/stocks/{symbol}/bars", single=True),
        latest(CRYPTO, "/v1beta3/crypto/{loc}/latest/trades", "trade"),
        latest(CRYPTO, "/v1beta3/crypto/{loc}/latest/quotes", "quote"),
        latest(CRYPTO, "/v1beta3/crypto/{loc}/latest/bars", "bar"),
        latest(CRYPTO, "/v1beta3/crypto/{loc}/snapshots", "snapshot"),
        bars(CRYPTO, "/v1beta3/crypto/{loc}/bars"),
        web.get("/v2/clock", partial(_trading, simulator, _clock)),
        web.get("/v2/calendar", partial(_trading, simulator, _calendar)),
    ]


async def _data(simulator: Simulator, venue: Venue, ask: _Ask, request: web.Request) -> web.Response:
    simulator.busiest_minute.count(time.monotonic())

    async def respond(request: web.Request) -> web.Response:
        faults = _due(simulator, request)
        bad = faults[-1] if faults and not isinstance(faults[-1], SPOILERS) else None
        if bad is not None and bad.kind != "byte_drip":
            return await replacement(request, bad, b"", simulator.data_limit.per_minute)
        simulator.streams.turn()  # what is answered has been streamed
        now_ns = simulator.clock.now_ns()
        payload = await ask(question(venue, request.query, request.match_info, now_ns), request)
        if not faults:
            simulator.last_sent.note(payload)
            return answer(payload)
        body = spoiled(payload, faults, simulator.last_sent)
        if bad is not None:
            return await replacement(request, bad, body, simulator.data_limit.per_minute)
        return web.Response(body=body, content_type="application/json")

    return await _guarded(simulator, simulator.data_limit, request, respond, key_required=venue.key_required)


async def _trading(
    simulator: Simulator, ask: Callable[[Simulator, web.Request], object], request: web.Request
) -> web.Response:
    async def respond(request: web.Request) -> web.Response:
        bad = next((fault for fault in _due(simulator, request) if not isinstance(fault, SPOILERS)), None)
        if bad is not None and bad.kind != "byte_drip":
            return await replacement(request, bad, b"", simulator.trading_limit.per_minute)
        payload = ask(simulator, request)
        if bad is not None:
            return await replacement(request, bad, orjson.dumps(payload), simulator.trading_limit.per_minute)
        return answer(payload)

    return await _guarded(simulator, simulator.trading_limit, request, respond, key_required=True)


async def _guarded(
    simulator: Simulator, limit: RateLimit, request: web.Request, respond: _Answer, *, key_required: bool
) -> web.Response:
    """Check key and quota, answer, and tell the quota in the headers of whatever the answer is."""
    simulator.requests += 1
    quota: Quota | None = None
    now_s = time.time()
    try:
        simulator.credentials.check(request.headers, required=key_required)
        quota = limit.spend(key_of(request.headers) or f"address {request.remote}", now_s)
        if quota.exceeded:
            return too_many_requests(quota.limit, quota.reset_at, quota.retry_after_seconds)
        response = await respond(request)
    except Refused as refusal:
        response = error(refusal.status, refusal.message)
    if quota is not None and not response.prepared:
        for name, value in quota.headers().items():
            response.headers.setdefault(name, value)
    return response


def _due(simulator: Simulator, request: web.Request) -> list[Fault]:
    symbols = frozenset(asked_symbols(request.query, request.match_info))
    return simulator.faults.take(request.path, symbols, time.monotonic())


def _clock(simulator: Simulator, _: web.Request) -> object:
    now_ns = simulator.clock.now_ns()
    return market_clock(now_ns, datetime_of(now_ns))


def _calendar(_: Simulator, request: web.Request) -> object:
    first = max(day_of("start", request.query.get("start"), CALENDAR_FIRST), CALENDAR_FIRST)
    last = min(day_of("end", request.query.get("end"), CALENDAR_LAST), CALENDAR_LAST)
    if request.query.get("date_type", "TRADING").upper() == "SETTLEMENT":
        early = calendar_days(list(sessions(first - timedelta(days=14), last)))
        inside = (first.isoformat(), last.isoformat())
        return [day for day in early if inside[0] <= day["settlement_date"] <= inside[1]]
    return calendar_days(list(sessions(first, last)))
