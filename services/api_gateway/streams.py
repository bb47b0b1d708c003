"""The handlers of the portfolio stream and of its tickets."""

from urllib.parse import urlsplit

import orjson
from aiohttp import hdrs, web

from services.api_gateway import portfolio, problems, tickets
from services.api_gateway.auth import Identity
from services.api_gateway.clients import Client, EventStream, Places, SocketStream
from services.api_gateway.live import Live
from services.api_gateway.pace import Pace
from services.api_gateway.problems import Problem
from services.api_gateway.valuation import instant_text
from shared.bus import Bus

TICKET_PARAMETER, LAST_EVENT_ID_PARAMETER = "ticket", "last_event_id"

LIVE = web.AppKey("LIVE", Live)
PACE = web.AppKey("PACE", Pace)
BUS = web.AppKey("BUS", Bus)
ALLOWED_ORIGINS: web.AppKey[frozenset[str]] = web.AppKey("ALLOWED_ORIGINS")
PLACES = web.AppKey("PLACES", Places)
BUS_SECONDS_MAX = web.AppKey("BUS_SECONDS_MAX", float)
"""What the bus may take with a ticket: less than a request, so that its silence has a name."""
HEARTBEAT_SECONDS = web.AppKey("HEARTBEAT_SECONDS", float)


async def ticket(request: web.Request) -> web.Response:
    """Answer `POST /api/portfolio/stream-tickets`."""
    identity = await portfolio.identity(request)
    portfolio.parameters(request, allowed=())
    issued, expires_at = await tickets.issued(
        request.app[BUS], identity, request.app[portfolio.NOW](), seconds_max=request.app[BUS_SECONDS_MAX]
    )
    body = orjson.dumps({"ticket": issued, "expires_at": instant_text(expires_at)})
    return web.Response(status=201, body=body, headers={"Content-Type": "application/json"})


async def stream(request: web.Request) -> web.StreamResponse:
    """Answer `GET /api/portfolio/stream`, with an upgrade to WebSocket when that is asked for."""
    _check_origin(request)
    parameters = portfolio.parameters(request, allowed=(TICKET_PARAMETER, LAST_EVENT_ID_PARAMETER))
    places = request.app[PLACES]
    places.check()  # before a ticket is used up
    identity = await _identity(request, parameters)
    places.take(identity.subject)
    try:
        client = Client(
            request.app[LIVE],
            await request.app[LIVE].watch(identity.subject),
            request.app[PACE],
            places,
            expires_at=identity.expires_at,
            heartbeat_seconds=request.app[HEARTBEAT_SECONDS],
            last_event_id=request.headers.get("Last-Event-ID") or parameters.get(LAST_EVENT_ID_PARAMETER, ""),
        )
        return _response(request, client)
    except BaseException:
        places.free(identity.subject)
        raise


def _response(request: web.Request, client: Client) -> web.StreamResponse:
    if request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
        return EventStream(client)
    socket_stream = SocketStream(client)
    if not socket_stream.can_prepare(request):
        raise Problem(problems.MALFORMED_REQUEST, "The WebSocket handshake is not complete.")
    return socket_stream


async def _identity(request: web.Request, parameters: dict[str, str]) -> Identity:
    given = parameters.get(TICKET_PARAMETER)
    if given is None:
        return await portfolio.identity(request)
    if hdrs.AUTHORIZATION in request.headers:
        raise Problem(problems.TICKET_INVALID, "Send a ticket or an Authorization header, not both.")
    return await tickets.redeemed(
        request.app[BUS], given, request.app[portfolio.NOW](), seconds_max=request.app[BUS_SECONDS_MAX]
    )


def _check_origin(request: web.Request) -> None:
    """Refuse pages of other origins: a browser lets them open a WebSocket anywhere, and says whose they are."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None or origin in request.app[ALLOWED_ORIGINS]:
        return
    try:
        host = urlsplit(origin).netloc.lower()
    except ValueError:
        host = ""
    if not host or host != request.headers.get(hdrs.HOST, "").lower():
        raise Problem(problems.ORIGIN_NOT_ALLOWED, "CORS_ALLOWED_ORIGINS names the origins that may.")
