"""The edge: what surrounds every request, whatever it asks for.

A request id, a deadline, limits, CORS, security headers, errors as problems, one access line, metrics.
"""

import asyncio
import random
import re
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from multidict import CIMultiDict, istr
from prometheus_client import REGISTRY, Gauge
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from services.api_gateway import finished, problems
from services.api_gateway.finished import Finished, Kind
from services.api_gateway.leaving import Leaving
from services.api_gateway.problems import Problem
from services.api_gateway.refusals import HOLD_SECONDS_MAX, PAID_SECONDS, Holding, refused
from shared import logs
from shared.database import DatabaseUnavailable, SchemaMissing
from shared.deadlines import Deadlines

BODY_BYTES_MAX = 1024
"""No endpoint takes a body; a small one is ignored, a larger one refused unread."""
ALWAYS_ANSWERED = frozenset({"/healthz", "/readyz"})
"""However many requests there are."""
IN_FLIGHT_MAX = 2048
"""More requests than this at once are refused at once, so that a slow database makes no pile. A thousand that wait for
the same chart are none: one statement answers them all."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_X_REQUEST_ID = istr("X-Request-Id")  # an istr is folded to lower case once, not in each look-up
_SECURITY_HEADERS = CIMultiDict(
    {
        "Server": "foliotick",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
)
_CONTENT_SECURITY_POLICY = "default-src 'none'; frame-ancestors 'none'"
"""Of every answer that has none of its own."""
_PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, If-None-Match, Last-Event-ID, X-Request-Id",
    "Access-Control-Max-Age": "600",
}
_CORS_EXPOSED = "ETag, X-Request-Id, Retry-After, WWW-Authenticate"

log = logs.get_logger()
requests_in_flight = Gauge("gateway_requests_in_flight", "Requests being answered")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestSeconds(Collector):
    """The histogram `gateway_request_seconds`, by route and status.

    The library's own takes a lock for the sum and one for the bucket, after a walk over the buckets: 2 µs a request.
    All requests are answered in one thread, so plain numbers will do; they are added up when they are asked for.
    """

    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], list[int]] = {}
        self._sums: dict[tuple[str, int], float] = {}

    def observe(self, route: str, status: int, seconds: float) -> None:
        key = route, status
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [0] * (len(self.BOUNDS) + 1)
            self._sums[key] = 0.0
        counts[bisect_left(self.BOUNDS, seconds)] += 1
        self._sums[key] += seconds

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(
            "gateway_request_seconds",
            "Time to answer a request, by route and status",
            labels=["route", "status"],
        )
        names = [*(str(bound) for bound in self.BOUNDS), "+Inf"]
        for (route, status), counts in self._counts.items():
            buckets = list(zip(names, accumulate(counts), strict=True))
            family.add_metric([route, str(status)], buckets, self._sums[route, status])
        yield family


request_seconds = RequestSeconds()
REGISTRY.register(request_seconds)


@dataclass
class Edge:
    """Answers requests through `handler`; nothing that goes wrong behind it gets past."""

    handler: Handler
    routes: frozenset[str]
    """The paths that metrics and access lines name; all others are `unmatched`."""
    timeout_seconds: float
    allowed_origins: frozenset[str]
    leaving: Leaving

    def __post_init__(self) -> None:
        self._in_flight = 0
        self._is_closing = False
        self._holding = Holding(min(HOLD_SECONDS_MAX, self.timeout_seconds))
        self._heads: dict[tuple[Kind, str | None], str] = {}
        self._deadlines = Deadlines(self.timeout_seconds, _cut_off)
        requests_in_flight.set_function(lambda: self._in_flight)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        request_id = _request_id(request)
        self._in_flight += 1
        try:
            response, reason = await self._answer(request, request_id)
        finally:
            self._in_flight -= 1
        path = request.path
        is_held = (
            response.status >= 400
            and path not in ALWAYS_ANSWERED
            and time.perf_counter() - started < PAID_SECONDS
            and self._holding.is_to_be_held()
        )
        if is_held:
            await self._holding.hold(request)
        response = self._finish(response, request_id, request)
        self._record(
            request.method,
            path if path in self.routes else "unmatched",
            response.status,
            started=started,
            request_id=request_id,
            reason=reason,
            is_said=not is_held,  # of refusals that are so many, the metrics tell
        )
        return response

    def close(self, seconds_max: float) -> None:
        """Answer what is under way within so many seconds: 503 if need be, and what is refused at once."""
        self._is_closing = True
        self._holding.release()
        self._deadlines.end_within(seconds_max)

    def malformed(self, error: BaseException | None) -> web.Response:
        """Answer what could not be parsed as a request; nothing of it is repeated in the answer or the log."""
        request_id = _new_request_id()
        detail = (
            "The request line or a header is too long."
            if isinstance(error, LineTooLong)
            else "The request line, a header or the framing of the body is wrong."
        )
        response = Problem(problems.MALFORMED_REQUEST, detail).response(request_id)
        response.force_close()
        self._add_headers(response.headers, request_id, None)
        if not isinstance(error, HttpProcessingError):
            log.error(
                "connection_failed",
                request_id=request_id,
                exc_info=error,
                advice="this is a bug: report it with the traceback",
            )
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
        task = asyncio.current_task()
        assert task is not None
        self._deadlines.start(task)
        try:
            self._refuse_pile(request)
            if self._is_preflight(request):
                return web.Response(status=204, headers=_PREFLIGHT_HEADERS), None
            if request.body_exists:
                _refuse_body(request)
            return await self.handler(request), None
        except Problem as error:
            # Not kept in a variable: its traceback holds this frame, and both would wait for the garbage collector.
            return error.answer(request_id), _reason(error.__cause__)
        except web.HTTPException as error:
            problem, reason = problems.of_http_exception(error), None
        except (DatabaseUnavailable, SchemaMissing) as error:
            problem = Problem(problems.DATABASE_UNAVAILABLE, "Portfolios cannot be read now. Try again soon.")
            reason = _reason(error)
        except (TimeoutError, asyncio.CancelledError) as error:
            # Only the deadline's own cancellation has an answer; the server's, at its end, goes on.
            is_ours = not self._deadlines.end(task)
            if isinstance(error, asyncio.CancelledError) and (not is_ours or task.uncancel() > 0):
                raise
            if self._is_closing:
                reason, said = "stopped", "This gateway has stopped before there was an answer."
            else:
                reason, said = "deadline", f"There was no answer within {self.timeout_seconds:g} s."
            problem = Problem(problems.DEADLINE_EXCEEDED, f"{said} Try again soon.")
        except Exception as error:
            log.error(
                "request_failed",
                request_id=request_id,
                exc_info=error,
                advice="this is a bug: report it with the traceback",
            )
            detail = "The request_id of this answer finds the error in the log."
            problem, reason = Problem(problems.INTERNAL_ERROR, detail), _reason(error)
        finally:
            self._deadlines.end(task)
        return problem.response(request_id), reason

    def _refuse_pile(self, request: web.Request) -> None:
        if self._in_flight > IN_FLIGHT_MAX and request.path not in ALWAYS_ANSWERED:
            refused("in_flight")
            raise Problem(problems.OVERLOADED, "There are too many requests at once. Try again soon.")

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            request.method == "OPTIONS"
            and "Access-Control-Request-Method" in request.headers
            and request.headers.get("Origin") in self.allowed_origins
        )

    def _finish(
        self, response: web.StreamResponse, request_id: str, request: web.Request
    ) -> web.StreamResponse:
        """Return the response as it is to be sent."""
        origin = self._allowed_origin(request) if self.allowed_origins else None
        is_leaving = self.leaving.is_on
        if isinstance(response, Finished):
            if finished.is_usual(request) and not is_leaving:
                response.put_under(self._head(response.kind, origin), request_id)
                return response
            response = response.in_full()
        if is_leaving:
            response.force_close()  # and says so: the client's next request goes to another gateway
        self._add_headers(response.headers, request_id, origin)
        return response

    def _allowed_origin(self, request: web.Request) -> str | None:
        origin = request.headers.get(hdrs.ORIGIN)
        return origin if origin in self.allowed_origins else None

    def _head(self, kind: Kind, origin: str | None) -> str:
        """Return the head of a kind's answers to an allowed origin; there are few of both."""
        head = self._heads.get((kind, origin))
        if head is None:
            response = web.Response(status=kind.status, headers=kind.headers)
            self._add_headers(response.headers, "", origin)
            head = finished.head(response.status, response.reason, response.headers)
            self._heads[kind, origin] = head
        return head

    def _add_headers(self, headers: CIMultiDict[str], request_id: str, origin: str | None) -> None:
        headers[_X_REQUEST_ID] = request_id
        headers.update(_SECURITY_HEADERS)
        headers.setdefault("Content-Security-Policy", _CONTENT_SECURITY_POLICY)
        headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        if self.allowed_origins:
            headers["Vary"] = f"{headers['Vary']}, Origin" if "Vary" in headers else "Origin"
            if origin is not None:
                headers["Access-Control-Allow-Origin"] = origin
                headers["Access-Control-Expose-Headers"] = _CORS_EXPOSED

    def _record(
        self,
        method: str,
        route: str,
        status: int,
        *,
        started: float,
        request_id: str,
        reason: str | None,
        is_said: bool = True,
    ) -> None:
        seconds = time.perf_counter() - started
        request_seconds.observe(route, status, seconds)
        if not is_said:
            return
        line: dict[str, str | float] = {
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 2),
            "request_id": request_id,
        }
        if reason:
            line["reason"] = reason
        logs.write("info" if status < 500 else "warning", "request_served", line)


def _cut_off(task: asyncio.Task[Any]) -> None:
    task.cancel()


def _request_id(request: web.Request) -> str:
    given = request.headers.get(_X_REQUEST_ID)
    return given if given and _REQUEST_ID.fullmatch(given) else _new_request_id()


def _new_request_id() -> str:
    """Return 16 hexadecimal digits: an id to find a request by, not a secret."""
    return "%016x" % random.getrandbits(64)  # noqa: UP031  # twice as fast as an f-string


def _refuse_body(request: web.Request) -> None:
    if (request.content_length or 0) > BODY_BYTES_MAX or "Transfer-Encoding" in request.headers:
        raise Problem(problems.BODY_TOO_LARGE, "No address of this API takes a body.")


def _reason(error: BaseException | None) -> str | None:
    return f"{type(error).__name__}: {error}" if error is not None else None
