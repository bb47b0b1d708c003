"""The two handlers: the portfolio's value now, and its chart."""

from zoneinfo import ZoneInfo

from aiohttp import web

from services.api_gateway import performance, queries
from services.api_gateway.auth import Verifier
from services.api_gateway.performance import MarketDays, Timeframe
from services.api_gateway.problems import (
    UNEXPECTED_PARAMETER,
    UNKNOWN_TIMEFRAME,
    USER_DEACTIVATED,
    USER_UNKNOWN,
    Problem,
)
from shared.clock import utc_now
from shared.database import Database
from shared.freshness import PRICE_FRESH_FOR

DATABASE = web.AppKey("DATABASE", Database)
VERIFIER = web.AppKey("VERIFIER", Verifier)
MARKET_TIMEZONE = web.AppKey("MARKET_TIMEZONE", ZoneInfo)

TIMEFRAME_PARAMETER = "timeframe"
_HEADERS = {"Content-Type": "application/json", "Cache-Control": "private, no-cache"}


async def current(request: web.Request) -> web.Response:
    """Answer `GET /api/portfolio/current`."""
    subject = await _subject(request)
    _parameters(request, allowed=())
    now = utc_now()
    found = await queries.current_portfolio(request.app[DATABASE], subject, now, now - PRICE_FRESH_FOR)
    if found is None:
        raise _user_unknown()
    _refuse_deactivated(is_active=found.is_active)
    return _json(found.answer)


async def chart(request: web.Request) -> web.Response:
    """Answer `GET /api/portfolio/performance`."""
    subject = await _subject(request)
    timeframe = _timeframe(_parameters(request, allowed=(TIMEFRAME_PARAMETER,)))
    database, market_timezone = request.app[DATABASE], request.app[MARKET_TIMEZONE]
    live = await queries.live_value(database, subject)
    if live is None:
        raise _user_unknown()
    _refuse_deactivated(is_active=live.is_active)
    match performance.buckets(timeframe, utc_now(), market_timezone):
        case MarketDays(first, last):
            series = await queries.daily_series(database, live.user_id, first, last, market_timezone.key)
        case buckets:
            series = await queries.series(database, live.user_id, buckets.first, buckets.last, buckets.width)
    simulated = live.simulated or series.simulated
    return _json(
        performance.answer(
            timeframe, series.points, series.first_value, live.total_value, simulated=simulated
        )
    )


async def _subject(request: web.Request) -> str:
    return await request.app[VERIFIER].subject(request.headers.getall("Authorization", ()))


def _parameters(request: web.Request, *, allowed: tuple[str, ...]) -> dict[str, str]:
    """Return the query's parameters; one that is unknown or repeated would be ignored silently, so it is refused."""
    if not request.rel_url.raw_query_string:
        return {}
    parameters: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in allowed:
            known = " and ".join(allowed) or "none"
            raise Problem(
                UNEXPECTED_PARAMETER, f"A query parameter is unknown; known: {known}.", known=allowed
            )
        if name in parameters:
            raise Problem(UNEXPECTED_PARAMETER, f"{name} is given more than once.", known=allowed)
        parameters[name] = value
    return parameters


def _timeframe(parameters: dict[str, str]) -> Timeframe:
    try:
        return Timeframe(parameters.get(TIMEFRAME_PARAMETER, Timeframe.ONE_DAY))
    except ValueError:
        allowed = [str(timeframe) for timeframe in Timeframe]
        detail = f"timeframe must be one of {', '.join(allowed)}."
        raise Problem(UNKNOWN_TIMEFRAME, detail, allowed=allowed) from None


def _user_unknown() -> Problem:
    return Problem(USER_UNKNOWN, "The token is valid, but there is no user with its sub.")


def _refuse_deactivated(*, is_active: bool) -> None:
    if not is_active:
        raise Problem(USER_DEACTIVATED, "The user exists, but has been deactivated.")


def _json(text: str) -> web.Response:
    return web.Response(body=text.encode(), headers=_HEADERS)
