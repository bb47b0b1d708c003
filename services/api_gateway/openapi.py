"""The OpenAPI 3.1 document, made from the response models. `python -m services.api_gateway.openapi` prints it."""

import json
import sys
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.api_gateway import problems
from services.api_gateway.performance import Timeframe
from services.api_gateway.problems import Kind, Problem
from services.api_gateway.responses import (
    CurrentPortfolio,
    Health,
    Heartbeat,
    Performance,
    PortfolioChange,
    ProblemDetails,
    Readiness,
    RefreshedPrices,
    StreamEnd,
    TakenSnapshot,
    Ticket,
)

VERSION = "1.0.0"

_MODELS: tuple[type[BaseModel], ...] = (
    CurrentPortfolio,
    Performance,
    PortfolioChange,
    Heartbeat,
    StreamEnd,
    Ticket,
    TakenSnapshot,
    RefreshedPrices,
    ProblemDetails,
    Health,
    Readiness,
)
_REQUEST_ID_HEADER = {
    "description": "The id of the request, given or made.",
    "schema": {"type": "string"},
}
_RETRY_AFTER_HEADER = {
    "description": "Seconds after which to try again.",
    "required": True,
    "schema": {"type": "integer"},
}
_CHALLENGE_HEADER = {
    "description": "Why the token is refused (RFC 6750).",
    "required": True,
    "schema": {"type": "string"},
}
_ENTITY_TAG_HEADER = {
    "description": "Strong, and another one for the compressed form. Sent back in If-None-Match it gives 304 while "
    "nothing has changed.",
    "required": True,
    "schema": {"type": "string"},
}
_CACHE_CONTROL_HEADER = {
    "description": "`private, no-cache`: may be stored, and is asked for again with its ETag. `immutable` for a year "
    "when the range was over 24 hours ago.",
    "required": True,
    "schema": {"type": "string"},
}
_ALLOW_HEADER = {"description": "The methods allowed.", "required": True, "schema": {"type": "string"}}
_EVERYWHERE = (
    problems.METHOD_NOT_ALLOWED,
    problems.BODY_TOO_LARGE,
    problems.EXPECTATION_FAILED,
    problems.INTERNAL_ERROR,
)
_BUSY = (problems.OVERLOADED, problems.DEADLINE_EXCEEDED)
_WITH_TOKEN = (
    problems.UNEXPECTED_PARAMETER,
    problems.TOKEN_MISSING,
    problems.TOKEN_MALFORMED,
    problems.TOKEN_EXPIRED,
    problems.TOKEN_INVALID,
    problems.USER_DEACTIVATED,
    problems.USER_UNKNOWN,
    problems.TOO_MANY_REQUESTS,
    problems.DATABASE_UNAVAILABLE,
    problems.KEYS_UNAVAILABLE,
)
_OF_PORTFOLIOS = (problems.USER_DEACTIVATED, problems.USER_UNKNOWN, problems.DATABASE_UNAVAILABLE)


def document() -> dict[str, Any]:
    """Return the document."""
    _, definitions = models_json_schema(
        [(model, "serialization") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Foliotick",
            "version": VERSION,
            "description": "Live portfolio values and their history. Whose portfolio is said by the bearer token's "
            "`sub`. Amounts are JSON numbers, exact to the cent; times are RFC 3339 in UTC.",
        },
        "servers": [{"url": "/"}],
        "security": [{"bearerAuth": []}],
        "paths": {
            "/api/portfolio/current": {"get": _current()},
            "/api/portfolio/performance": {"get": _performance()},
            "/api/portfolio/stream": {"get": _stream()},
            "/api/portfolio/stream-tickets": {"post": _tickets()},
            "/api/portfolio/snapshots": {"post": _snapshots()},
            "/api/portfolio/refresh-prices": {"post": _refresh_prices()},
            "/api/openapi.json": {"get": _openapi()},
            "/healthz": {"get": _healthz()},
            "/readyz": {"get": _readyz()},
        },
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "streamTicket": {
                    "type": "apiKey",
                    "in": "query",
                    "name": "ticket",
                    "description": "From `POST /api/portfolio/stream-tickets`; used up by one request.",
                },
                "bearerAuth": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "HS256 with a shared secret, or RS256, ES256, EdDSA with the issuer's "
                    "published keys. `exp` and `sub` are required.",
                },
            },
        },
    }


def _current() -> dict[str, Any]:
    return {
        "operationId": "getCurrentPortfolio",
        "summary": "The portfolio's value now",
        "description": "Every position at its last known price. A position without a price is listed under "
        "`unpriced` and left out of the sums. Compressed with gzip for clients that accept it, from 14.6 KB on.",
        "responses": _responses(
            CurrentPortfolio, "The portfolio at the last known prices.", (*_WITH_TOKEN, *_BUSY)
        ),
    }


def _performance() -> dict[str, Any]:
    responses = _responses(
        Performance,
        "The series.",
        (problems.UNKNOWN_TIMEFRAME, problems.INVALID_UNTIL, *_WITH_TOKEN, *_BUSY),
    )
    headers = {"ETag": _ENTITY_TAG_HEADER, "Cache-Control": _CACHE_CONTROL_HEADER}
    responses["200"]["headers"] |= headers
    not_modified = {
        "description": "The client has this answer: If-None-Match names its ETag.",
        "headers": {"X-Request-Id": _REQUEST_ID_HEADER, **headers},
    }
    return {
        "operationId": "getPortfolioPerformance",
        "summary": "The portfolio's value over time",
        "description": "One point for each bucket that has a snapshot: the last one inside it. Buckets are 5 minutes "
        "(1D, at most 288 points), 30 minutes (1W, 336), 1 hour (1M, 720), 3 hours (3M, 720) or market dates "
        "(YTD, ALL). Without a snapshot in the window `data_available` is false, and what would need a first "
        "point is null. Compressed with gzip for clients that accept it, from 1 KB on.",
        "parameters": [
            {
                "name": "timeframe",
                "in": "query",
                "required": False,
                "description": "How far back. May be given once.",
                "schema": {
                    "type": "string",
                    "enum": [str(timeframe) for timeframe in Timeframe],
                    "default": str(Timeframe.ONE_DAY),
                },
                "example": str(Timeframe.ONE_DAY),
            },
            {
                "name": "until",
                "in": "query",
                "required": False,
                "description": "An instant of the past, from 1970 on: the range of that length which is over by then, "
                "in whole buckets (whole market dates for YTD and ALL; YTD is the year of the last of them). It "
                "has no live value. RFC 3339 with `Z` or an offset, whose + is written %2B in a URL. "
                "May be given once.",
                "schema": {"type": "string", "format": "date-time"},
                "example": "2024-01-01T10:00:00Z",
            },
        ],
        "responses": {"200": responses.pop("200"), "304": not_modified, **responses},
    }


def _stream() -> dict[str, Any]:
    responses = _responses(
        None,
        "The stream.",
        (
            *_WITH_TOKEN,
            problems.TICKET_INVALID,
            problems.ORIGIN_NOT_ALLOWED,
            problems.TOO_MANY_STREAMS,
            problems.TICKETS_UNAVAILABLE,
            *_BUSY,
        ),
    )
    events = {
        "portfolio": (CurrentPortfolio, "the whole: at the beginning, and when positions have come or gone"),
        "change": (
            PortfolioChange,
            "all totals and the positions that changed, at most four events a second",
        ),
        "heartbeat": (Heartbeat, "when there was nothing else for 15 seconds; has no id"),
        "end": (StreamEnd, "the last one; has no id"),
    }
    described = "; ".join(
        f"`{name}`, whose data is a `{model.__name__}`: {text}" for name, (model, text) in events.items()
    )
    text_schema = {"type": "string", "description": f"Events in order. {described}."}
    responses["200"]["content"] = {"text/event-stream": {"schema": text_schema}}
    upgraded = {
        "description": "The same over WebSocket: each event is a text message, an object with `event`, `id` (unless it "
        "has none) and `data`. The client sends nothing. It is closed with 4401 (token expired), 4403 (user "
        "deactivated), 4404 (user unknown) or 1001 (going away)."
    }
    return {
        "operationId": "streamPortfolio",
        "summary": "The portfolio as it changes",
        "description": "Server-Sent Events, or the same over WebSocket when the request asks for that upgrade. A "
        "client that reads slowly gets fewer events, each true when it is sent. The stream ends with its token. A "
        "browser sends a ticket; its `Origin` must be this address or one of CORS_ALLOWED_ORIGINS.",
        "security": [{"bearerAuth": []}, {"streamTicket": []}],
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "required": False,
                "description": "The last id that was received: only what has changed since is sent, when the gateway "
                "still knows it.",
                "schema": {"type": "string"},
            },
            {
                "name": "last_event_id",
                "in": "query",
                "required": False,
                "description": "The same, for who cannot send the header.",
                "schema": {"type": "string"},
            },
        ],
        "responses": {"101": upgraded, **responses},
    }


def _tickets() -> dict[str, Any]:
    return {
        "operationId": "issueStreamTicket",
        "summary": "A ticket to the stream",
        "description": "For browsers, whose EventSource and WebSocket cannot send a header. Good for half a minute and "
        "for one stream. Takes no body.",
        "responses": _responses(
            Ticket,
            "The ticket.",
            (
                *(kind for kind in _WITH_TOKEN if kind not in _OF_PORTFOLIOS),
                problems.TICKETS_UNAVAILABLE,
                *_BUSY,
            ),
            status=201,
        ),
    }


def _snapshots() -> dict[str, Any]:
    return {
        "operationId": "takeSnapshot",
        "summary": "Take a snapshot now",
        "description": "Values and stores the portfolio, at any hour; the next chart has it. Takes no body. Once a "
        "minute for each user, unless the operator has set another SNAPSHOT_COOLDOWN_SECONDS: then 429 with "
        "`Retry-After`. After a 503 the snapshot may have been taken all the same.",
        "responses": _responses(
            TakenSnapshot,
            "The snapshot; it is stored.",
            (*_WITH_TOKEN, problems.SNAPSHOTTER_UNAVAILABLE, *_BUSY),
            status=201,
        ),
    }


def _refresh_prices() -> dict[str, Any]:
    return {
        "operationId": "refreshPrices",
        "summary": "Ask the market for the user's prices now",
        "description": "Instead of waiting for the next round; the answer comes when the prices are stored, and "
        "`/api/portfolio/current` has them. Takes no body. Once in 30 seconds for each user, unless the operator has "
        "set another PRICE_REFRESH_COOLDOWN_SECONDS: then 429 with `Retry-After`.",
        "responses": _responses(
            RefreshedPrices,
            "The market was asked.",
            (*_WITH_TOKEN, problems.FEEDER_UNAVAILABLE, *_BUSY),
        ),
    }


def _openapi() -> dict[str, Any]:
    responses = _responses(None, "An OpenAPI 3.1 document.", _BUSY)
    responses["200"]["content"] = {"application/json": {"schema": {"type": "object"}}}
    return {
        "operationId": "getOpenApi",
        "summary": "This document",
        "security": [],
        "responses": responses,
    }


def _healthz() -> dict[str, Any]:
    return {
        "operationId": "getHealth",
        "summary": "Whether the process runs",
        "security": [],
        "responses": _responses(Health, "It does.", _BUSY),
    }


def _readyz() -> dict[str, Any]:
    responses = _responses(Readiness, "Everything that the gateway needs answers.", _BUSY)
    responses["503"]["content"]["application/json"] = {"schema": _reference(Readiness)}
    responses["503"]["headers"] = {"X-Request-Id": _REQUEST_ID_HEADER}
    return {
        "operationId": "getReadiness",
        "summary": "Whether requests can be answered",
        "security": [],
        "responses": responses,
    }


def _responses(
    model: type[BaseModel] | None, description: str, kinds: tuple[Kind, ...], *, status: int = 200
) -> dict[str, Any]:
    answers: dict[str, Any] = {
        str(status): {"description": description, "headers": {"X-Request-Id": _REQUEST_ID_HEADER}}
    }
    if model is not None:
        content: dict[str, Any] = {"schema": _reference(model)}
        examples: Any = model.model_json_schema().get("examples")
        if examples:
            content["example"] = examples[0]
        answers[str(status)]["content"] = {"application/json": content}
    by_status: dict[int, list[Kind]] = {}
    for kind in (problems.MALFORMED_REQUEST, *kinds, *_EVERYWHERE):
        by_status.setdefault(kind.status, []).append(kind)
    return answers | {str(code): _problem_response(by_status[code]) for code in sorted(by_status)}


def _problem_response(kinds: list[Kind]) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-Id": _REQUEST_ID_HEADER}
    headers |= {
        401: {"WWW-Authenticate": _CHALLENGE_HEADER},
        405: {"Allow": _ALLOW_HEADER},
        429: {"Retry-After": _RETRY_AFTER_HEADER},
        503: {"Retry-After": _RETRY_AFTER_HEADER},
    }.get(kinds[0].status, {})
    return {
        "description": " ".join(f"{kind.title} (`{kind.name}`)." for kind in kinds),
        "headers": headers,
        "content": {
            problems.CONTENT_TYPE: {
                "schema": _reference(ProblemDetails),
                "examples": {kind.name: {"value": _problem_example(kind)} for kind in kinds},
            }
        },
    }


def _problem_example(kind: Kind) -> dict[str, Any]:
    example: dict[str, Any] = {
        "type": kind.type,
        "title": kind.title,
        "status": kind.status,
        "detail": f"{kind.title}.",
        "request_id": "4f9d0c1b2a3e5f67",
    }
    if kind is problems.UNKNOWN_TIMEFRAME:
        allowed = [str(timeframe) for timeframe in Timeframe]
        example |= {"detail": f"timeframe must be one of {', '.join(allowed)}.", "allowed": allowed}
    if kind is problems.INVALID_UNTIL:
        example |= {
            "detail": "until is in the future.",
            "allowed": ["an RFC 3339 instant from 1970-01-01T00:00:00Z until now, like 2026-03-02T14:30:00Z"],
        }
    return example


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def text() -> str:
    """Return the document as it is printed, committed and served."""
    return json.dumps(document(), indent=2) + "\n"


_TEXT = text().encode()


async def served(request: web.Request) -> web.Response:
    """Answer `GET /api/openapi.json`."""
    if request.rel_url.raw_query_string:
        raise Problem(problems.UNEXPECTED_PARAMETER, "The document has no parameters.", known=[])
    return web.Response(body=_TEXT, headers={"Content-Type": "application/json", "Cache-Control": "no-cache"})


if __name__ == "__main__":
    sys.stdout.write(text())
