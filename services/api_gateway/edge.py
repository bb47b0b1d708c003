"""The edge: what surrounds every request, whatever it asks for.

A request id, a deadline, limits, CORS, security headers, errors as problems, one access line, metrics.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from prometheus_client import Gauge, Histogram

from services.api_gateway import problems
from services.api_gateway.problems import Problem
from shared import logs
from shared.database import DatabaseUnavailable, SchemaMissing

BODY_BYTES_MAX = 1024
"""No endpoint takes a body; a small one is ignored, a larger one refused unread."""
IN_FLIGHT_MAX = 2048
"""More requests than this at once are refused at once, so that a slow database makes no pile. A thousand that wait for
the same chart are none: one statement answers them all."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECURITY_HEADERS = {
    "Server": "foliotick",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET",
    "Access-Control-Allow-Headers": "Authorization, If-None-Match, X-Request-Id",
    "Access-Control-Max-Age": "600",
}
_CORS_EXPOSED = "ETag, X-Request-Id, Retry-After, WWW-Authenticate"

log = logs.get_logger()
request_seconds = Histogram(
    "gateway_request_seconds",
    "Time to answer a request, by route and status",
    ["route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
requests_in_flight = Gauge("gateway_requests_in_flight", "Requests being answered")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Edge:
    """Answers requests through `handler`; nothing that goes wrong behind it gets past."""

    handler: Handler
    routes: frozenset[str]
    """The paths that metrics and access lines name; all others are `unmatched`."""
    timeout_seconds: float
    allowed_origins: frozenset[str]

    def __post_init__(self) -> None:
        self._in_flight = 0
        self._timers: dict[tuple[str, int], Histogram] = {}
        requests_in_flight.set_function(lambda: self._in_flight)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        request_id = _request_id(request)
        self._in_flight += 1
        try:
            response, reason = await self._answer(request, request_id)
        finally:
            self._in_flight -= 1
        self._finish(response, request_id, request.headers.get("Origin"))
        route = request.path if request.path in self.routes else "unmatched"
        self._record(
            request.method, route, response.status, started=started, request_id=request_id, reason=reason
        )
        return response

    def malformed(self, error: BaseException | None) -> web.Response:
        """Answer what could not be parsed as a request; nothing of it is repeated in the answer or the log."""
        request_id = secrets.token_hex(8)
        detail = (
            "The request line or a header is too long."
            if isinstance(error, LineTooLong)
            else "The request line, a header or the framing of the body is wrong."
        )
        response = Problem(problems.MALFORMED_REQUEST, detail).response(request_id)
        response.force_close()
        self._finish(response, request_id, None)
        if not isinstance(error, HttpProcessingError):
            log.error("connection_failed", request_id=request_id, exc_info=error)
        self._record(
            "unknown",
            "malformed",
            response.status,
            started=time.perf_counter(),
            request_id=request_id,
            reason=type(error).__name__,
        )
        return response

    async def _answer(self, request: web.Request, request_id: str) -> tuple[web.StreamResponse, str | None]:
        """Return the response, and for the access line the reason of a failure."""
        try:
            self._refuse_overload()
            if self._is_preflight(request):
                return web.Response(status=204, headers=_PREFLIGHT_HEADERS), None
            _refuse_body(request)
            async with asyncio.timeout(self.timeout_seconds):
                return await self.handler(request), None
        except Problem as error:
            problem, reason = error, _reason(error.__cause__)
        except web.HTTPException as error:
            problem, reason = problems.of_http_exception(error), None
        except (DatabaseUnavailable, SchemaMissing) as error:
            problem = Problem(problems.DATABASE_UNAVAILABLE, "Portfolios cannot be read now. Try again soon.")
            reason = _reason(error)
        except TimeoutError:
            detail = f"There was no answer within {self.timeout_seconds:g} s. Try again soon."
            problem, reason = Problem(problems.DEADLINE_EXCEEDED, detail), "deadline"
        except Exception as error:
            log.error("request_failed", request_id=request_id, exc_info=error)
            detail = "The request_id of this answer finds the error in the log."
            problem, reason = Problem(problems.INTERNAL_ERROR, detail), _reason(error)
        return problem.response(request_id), reason

    def _refuse_overload(self) -> None:
        if self._in_flight > IN_FLIGHT_MAX:
            raise Problem(problems.OVERLOADED, "Try again soon.")

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            request.method == "OPTIONS"
            and "Access-Control-Request-Method" in request.headers
            and request.headers.get("Origin") in self.allowed_origins
        )

    def _finish(self, response: web.StreamResponse, request_id: str, origin: str | None) -> None:
        headers = response.headers
        headers["X-Request-Id"] = request_id
        headers.update(_SECURITY_HEADERS)
        headers.setdefault("Cache-Control", "no-store")
        if self.allowed_origins:
            headers["Vary"] = f"{headers['Vary']}, Origin" if "Vary" in headers else "Origin"
            if origin in self.allowed_origins:
                assert origin is not None
                headers["Access-Control-Allow-Origin"] = origin
                headers["Access-Control-Expose-Headers"] = _CORS_EXPOSED

    def _record(
        self, method: str, route: str, status: int, *, started: float, request_id: str, reason: str | None
    ) -> None:
        seconds = time.perf_counter() - started
        timer = self._timers.get((route, status))
        if timer is None:
            timer = self._timers[route, status] = request_seconds.labels(route, str(status))
        timer.observe(seconds)
        write = log.info if status < 500 else log.warning
        write(
            "request_served",
            method=method,
            route=route,
            status=status,
            duration_ms=round(seconds * 1000, 2),
            request_id=request_id,
            **({"reason": reason} if reason else {}),
        )


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id")
    return given if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _refuse_body(request: web.Request) -> None:
    if (request.content_length or 0) > BODY_BYTES_MAX or "Transfer-Encoding" in request.headers:
        raise Problem(problems.BODY_TOO_LARGE, "No address of this API takes a body.")


def _reason(error: BaseException | None) -> str | None:
    return f"{type(error).__name__}: {error}" if error is not None else None
