"""The handlers of what a user asks for by hand: a snapshot now, fresh prices now. Other services do the work."""

import asyncio

import orjson
from aiohttp import web

from services.api_gateway import portfolio, problems, queries
from services.api_gateway.problems import Kind, Problem
from services.api_gateway.streams import BUS
from services.api_gateway.valuation import instant_text
from shared.bus import Bus, Refused, Unanswered
from shared.messages import (
    REFRESH_REQUESTED,
    SNAPSHOT_REQUESTED,
    PricesRefreshed,
    RefreshRequested,
    SnapshotRequested,
    SnapshotTaken,
)

SECONDS_MAX = web.AppKey("SECONDS_MAX", float)
"""What a request may take in all."""
BUS_SHARE = 0.9
"""Of that, until when an answer must have come; the rest is for saying that none did."""
FIRST_SHARE = 0.4
"""Of that, what the first snapshotter that is asked may take before another one is: a snapshot takes milliseconds."""

_JSON = {"Content-Type": "application/json"}


async def snapshot(request: web.Request) -> web.Response:
    """Answer `POST /api/portfolio/snapshots`."""
    ends_at = _ends_at(request)
    user_id = await _user_id(request)
    message = SnapshotRequested(user_id=user_id, requested_at=request.app[portfolio.NOW]())
    try:
        taken = await _taken(request.app[BUS], message, ends_at)
    except Refused as refusal:
        raise _problem(
            refusal, problems.SNAPSHOTTER_UNAVAILABLE, "No snapshot can be taken now."
        ) from refusal
    except Unanswered as error:
        detail = "No snapshotter answers; it may be stopped, or SNAPSHOT_ENABLED be false. Try again soon."
        raise Problem(problems.SNAPSHOTTER_UNAVAILABLE, detail) from error
    request.app[portfolio.CHARTS].forget(user_id)  # the next chart has it, whenever the bus tells of it
    return web.Response(status=201, body=_snapshot_text(taken).encode(), headers=_JSON)


async def prices(request: web.Request) -> web.Response:
    """Answer `POST /api/portfolio/refresh-prices`."""
    ends_at = _ends_at(request)
    user_id = await _user_id(request)
    message = RefreshRequested(user_id=user_id, requested_at=request.app[portfolio.NOW]())
    try:
        refreshed = await request.app[BUS].request(
            REFRESH_REQUESTED, message, PricesRefreshed, timeout_seconds=_seconds_until(ends_at)
        )
    except Refused as refusal:
        raise _problem(refusal, problems.FEEDER_UNAVAILABLE, "No prices can be had now.") from refusal
    except Unanswered as error:
        detail = (
            "No price feeder answers; it may be stopped, or PRICE_UPDATE_ENABLED be false. Try again soon."
        )
        raise Problem(problems.FEEDER_UNAVAILABLE, detail) from error
    body = refreshed.model_dump() | {"refreshed_at": instant_text(refreshed.refreshed_at)}
    return web.Response(body=orjson.dumps(body), headers=_JSON)


async def _taken(bus: Bus, message: SnapshotRequested, ends_at: float) -> SnapshotTaken:
    """Ask for the snapshot, and once more when that fails: the same request makes no second one."""

    async def ask(seconds: float) -> SnapshotTaken:
        return await bus.request(SNAPSHOT_REQUESTED, message, SnapshotTaken, timeout_seconds=seconds)

    try:
        return await ask(FIRST_SHARE * _seconds_until(ends_at))
    except Unanswered:
        pass
    except Refused as refusal:
        if refusal.code != 503:
            raise
    return await ask(_seconds_until(ends_at))


def _ends_at(request: web.Request) -> float:
    return asyncio.get_running_loop().time() + BUS_SHARE * request.app[SECONDS_MAX]


def _seconds_until(ends_at: float) -> float:
    return max(0.0, ends_at - asyncio.get_running_loop().time())


async def _user_id(request: web.Request) -> int:
    """Return who asks; raises Problem for somebody who may not."""
    subject = (await portfolio.identity(request)).subject
    portfolio.parameters(request, allowed=())
    with request.app[portfolio.ADMISSION].place():
        user = await queries.user(request.app[portfolio.DATABASE], subject)
    if user is None:
        raise problems.user_unknown()
    if not user.is_active:
        raise problems.user_deactivated()
    return user.id


def _problem(refusal: Refused, unavailable: Kind, detail: str) -> Problem:
    match refusal.code:
        case 403:  # since the gateway has looked
            return problems.user_deactivated()
        case 404:
            return problems.user_unknown()
    seconds = refusal.retry_after_seconds or problems.RETRY_AFTER_SECONDS
    headers = {"Retry-After": str(seconds)}
    if refusal.code == 429:
        return Problem(
            problems.TOO_MANY_REQUESTS, f"This is {refusal.text}. Try again in {seconds} s.", headers=headers
        )
    return Problem(unavailable, f"{detail} Try again in {seconds} s.", headers=headers)


def _snapshot_text(taken: SnapshotTaken) -> str:
    """Write the answer; amounts as they are, with their cents."""
    is_partial = taken.unpriced_positions > 0
    return (
        f'{{"timestamp":"{instant_text(taken.timestamp)}","total_value":{taken.total_value:.2f},'
        f'"cash_balance":{taken.cash_balance:.2f},"investment_value":{taken.investment_value:.2f},'
        f'"unpriced_positions":{taken.unpriced_positions},"partial":{str(is_partial).lower()},'
        f'"simulated":{str(taken.simulated).lower()}}}'
    )
