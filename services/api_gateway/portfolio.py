"""The two handlers: the portfolio's value now, and its chart."""

import re
from datetime import UTC, datetime

from aiohttp import web

from services.api_gateway import negotiation, problems, queries
from services.api_gateway.admission import Admission
from services.api_gateway.auth import Identity, Verifier
from services.api_gateway.charts import Charts
from services.api_gateway.finished import Finished, Kind
from services.api_gateway.performance import Timeframe
from services.api_gateway.problems import INVALID_UNTIL, UNEXPECTED_PARAMETER, UNKNOWN_TIMEFRAME, Problem
from services.api_gateway.queries import Source
from services.api_gateway.user_rates import UserRates
from shared.clock import Now
from shared.freshness import market_moment
from shared.market_calendar import Calendar

DATABASE: web.AppKey[Source] = web.AppKey("DATABASE")
VERIFIER = web.AppKey("VERIFIER", Verifier)
CHARTS = web.AppKey("CHARTS", Charts)
CALENDAR = web.AppKey("CALENDAR", Calendar)
NOW: web.AppKey[Now] = web.AppKey("NOW")
ADMISSION = web.AppKey("ADMISSION", Admission)
USER_RATES = web.AppKey("USER_RATES", UserRates)

TIMEFRAME_PARAMETER, UNTIL_PARAMETER = "timeframe", "until"
UNTIL_MIN = datetime(1970, 1, 1, tzinfo=UTC)
CURRENT_COMPRESSED_BYTES_MIN = 14_600
"""A smaller `/current` (some 60 positions) fits into the first window of a TCP connection: the client would get it no
sooner, and unlike a chart it is compressed for one request only."""

_HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "private, no-cache",
    "Vary": "Accept-Encoding, Authorization",
}
_PLAIN, _COMPRESSED = Kind(200, _HEADERS), Kind(200, _HEADERS | {"Content-Encoding": "gzip"})
_PLAIN_QUERIES = {"": Timeframe.ONE_DAY} | {
    f"{TIMEFRAME_PARAMETER}={timeframe}": timeframe for timeframe in Timeframe
}
"""What nearly every client asks, so that it need not be taken apart."""
_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


async def current(request: web.Request) -> Finished:
    """Answer `GET /api/portfolio/current`."""
    subject = (await identity(request)).subject
    parameters(request, allowed=())
    with request.app[ADMISSION].place():
        now = request.app[NOW]()
        moment = market_moment(request.app[CALENDAR].hours, now)
        found = await queries.current_portfolio(request.app[DATABASE], subject, now, moment)
    if found is None:
        raise problems.user_unknown()
    if not found.is_active:
        raise problems.user_deactivated()
    body = found.answer.encode()
    if negotiation.is_gzip_wanted(request.headers, len(body), CURRENT_COMPRESSED_BYTES_MIN):
        return Finished(_COMPRESSED, negotiation.gzipped(body))
    return Finished(_PLAIN, body)


async def chart(request: web.Request) -> Finished:
    """Answer `GET /api/portfolio/performance`."""
    subject = (await identity(request)).subject
    charts, now = request.app[CHARTS], request.app[NOW]()
    timeframe = _PLAIN_QUERIES.get(request.rel_url.raw_query_string)
    if timeframe is not None:
        asked = charts.asked(subject, timeframe, None)
    else:
        given = parameters(request, allowed=(TIMEFRAME_PARAMETER, UNTIL_PARAMETER))
        asked = charts.asked(subject, _timeframe(given), _until(given, now))
    answer = charts.kept(asked, now) or await charts.answer(asked, now)
    return answer.response(request.headers)


async def identity(request: web.Request) -> Identity:
    """Return who asks; raises Problem without a good token, and for who asks too often."""
    found = await request.app[VERIFIER].identity(request.headers.getall("Authorization", ()))
    request.app[USER_RATES].check(found.subject)
    return found


def parameters(request: web.Request, *, allowed: tuple[str, ...]) -> dict[str, str]:
    """Return the query's parameters; one that is unknown or repeated would be ignored silently, so it is refused."""
    if not request.rel_url.raw_query_string:
        return {}
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in allowed:
            known = " and ".join(allowed) or "none"
            raise Problem(
                UNEXPECTED_PARAMETER, f"A query parameter is unknown; known: {known}.", known=allowed
            )
        if name in given:
            raise Problem(UNEXPECTED_PARAMETER, f"{name} is given more than once.", known=allowed)
        given[name] = value
    return given


def _timeframe(parameters: dict[str, str]) -> Timeframe:
    try:
        return Timeframe(parameters.get(TIMEFRAME_PARAMETER, Timeframe.ONE_DAY))
    except ValueError:
        allowed = [str(timeframe) for timeframe in Timeframe]
        detail = f"timeframe must be one of {', '.join(allowed)}."
        raise Problem(UNKNOWN_TIMEFRAME, detail, allowed=allowed) from None


def _until(parameters: dict[str, str], now: datetime) -> datetime | None:
    """Return the end of a range that is over; None when there is none."""
    given = parameters.get(UNTIL_PARAMETER)
    if given is None:
        return None
    if not _INSTANT.fullmatch(given):
        raise _invalid_until("is not an RFC 3339 instant with an offset (a + in a URL is %2B)")
    try:
        until = datetime.fromisoformat(given.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _invalid_until("does not exist") from None
    if until > now:
        raise _invalid_until("is in the future")
    if until < UNTIL_MIN:
        raise _invalid_until("is too long ago")
    return until


def _invalid_until(reason: str) -> Problem:
    return Problem(
        INVALID_UNTIL,
        f"until {reason}.",
        allowed=[
            f"an RFC 3339 instant from {UNTIL_MIN:%Y-%m-%dT%H:%M:%SZ} until now, like 2026-03-02T14:30:00Z"
        ],
    )
