"""Every way in which a request can be refused or fail: RFC 9457 problem details with a stable `type`."""

from collections.abc import Mapping
from typing import NamedTuple

import orjson
from aiohttp import web

from services.api_gateway import finished
from services.api_gateway.finished import Finished

CONTENT_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2


class Kind(NamedTuple):
    """A kind of problem; `type` is the URN that clients may compare with."""

    name: str
    status: int
    title: str

    @property
    def type(self) -> str:
        return f"urn:foliotick:problem:{self.name}"


MALFORMED_REQUEST = Kind("malformed-request", 400, "The request is not valid HTTP")
UNKNOWN_TIMEFRAME = Kind("unknown-timeframe", 400, "The timeframe is unknown")
INVALID_UNTIL = Kind("invalid-until", 400, "The end of the range is not an instant of the past")
UNEXPECTED_PARAMETER = Kind("unexpected-parameter", 400, "A query parameter is unknown or repeated")
TOKEN_MISSING = Kind("token-missing", 401, "A bearer token is needed")
TOKEN_MALFORMED = Kind("token-malformed", 401, "The bearer token is malformed")
TOKEN_EXPIRED = Kind("token-expired", 401, "The bearer token has expired")
TOKEN_INVALID = Kind("token-invalid", 401, "The bearer token is not valid")
TICKET_INVALID = Kind("ticket-invalid", 401, "The ticket is not valid")
ORIGIN_NOT_ALLOWED = Kind("origin-not-allowed", 403, "Pages of this origin may not ask")
USER_DEACTIVATED = Kind("user-deactivated", 403, "The user is deactivated")
NOT_FOUND = Kind("not-found", 404, "There is nothing at this address")
USER_UNKNOWN = Kind("user-unknown", 404, "The user is unknown")
METHOD_NOT_ALLOWED = Kind("method-not-allowed", 405, "The method is not allowed here")
BODY_TOO_LARGE = Kind("body-too-large", 413, "The request has a body")
EXPECTATION_FAILED = Kind("expectation-failed", 417, "The Expect header cannot be met")
TOO_MANY_REQUESTS = Kind("too-many-requests", 429, "This was asked for too often")
TOO_MANY_STREAMS = Kind("too-many-streams", 429, "The user has too many streams")
INTERNAL_ERROR = Kind("internal-error", 500, "Something went wrong here")
DATABASE_UNAVAILABLE = Kind("database-unavailable", 503, "The database does not answer")
KEYS_UNAVAILABLE = Kind("keys-unavailable", 503, "The token issuer's keys are not available")
SNAPSHOTTER_UNAVAILABLE = Kind("snapshotter-unavailable", 503, "Snapshots cannot be taken now")
FEEDER_UNAVAILABLE = Kind("feeder-unavailable", 503, "Prices cannot be asked for now")
TICKETS_UNAVAILABLE = Kind("tickets-unavailable", 503, "Tickets are not available")
DEADLINE_EXCEEDED = Kind("deadline-exceeded", 503, "The answer took too long")
OVERLOADED = Kind("overloaded", 503, "Too many requests at once")

_OVERLOADED_ANSWER = finished.Kind(
    OVERLOADED.status, {"Content-Type": CONTENT_TYPE, "Retry-After": str(RETRY_AFTER_SECONDS)}
)


class Problem(Exception):
    """Ends the handling of a request; the edge answers with it."""

    def __init__(
        self, kind: Kind, detail: str, *, headers: Mapping[str, str] | None = None, **members: object
    ) -> None:
        super().__init__(f"{kind.name}: {detail}")
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = members
        if kind.status == 401:
            self.headers.setdefault("WWW-Authenticate", 'Bearer realm="foliotick"')
        if kind.status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))

    def response(self, request_id: str) -> web.Response:
        headers = {"Content-Type": CONTENT_TYPE, **self.headers}
        return web.Response(body=self._body(request_id), status=self.kind.status, headers=headers)

    def answer(self, request_id: str) -> web.StreamResponse:
        """Return the response; one of which there may be thousands a second is cheap."""
        if self.kind is OVERLOADED:
            return Finished(_OVERLOADED_ANSWER, self._body(request_id))
        return self.response(request_id)

    def _body(self, request_id: str) -> bytes:
        return orjson.dumps(
            {
                "type": self.kind.type,
                "title": self.kind.title,
                "status": self.kind.status,
                "detail": self.detail,
                "request_id": request_id,
                **self.members,
            }
        )


def user_unknown() -> Problem:
    return Problem(USER_UNKNOWN, "The token is valid, but there is no user with its sub.")


def user_deactivated() -> Problem:
    return Problem(USER_DEACTIVATED, "The user exists, but has been deactivated.")


def of_http_exception(error: web.HTTPException) -> Problem:
    """Return the problem for what the HTTP library itself refuses."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = sorted(error.allowed_methods)
        return Problem(
            METHOD_NOT_ALLOWED,
            f"Use {' or '.join(allowed)}.",
            headers={"Allow": ", ".join(allowed)},
            allowed=allowed,
        )
    if error.status == 404:
        return Problem(NOT_FOUND, "The API is described at /api/openapi.json.")
    if error.status == 417:
        return Problem(EXPECTATION_FAILED, "Leave out the Expect header.")
    kind = Kind(error.reason.lower().replace(" ", "-"), error.status, error.reason)
    return Problem(kind, "The request cannot be answered.")
