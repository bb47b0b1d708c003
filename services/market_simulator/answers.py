"""HTTP answers as Alpaca writes them."""

from typing import Any

import orjson
from aiohttp import web

SIMULATED = {"X-Market-Simulated": "true"}
"""On every answer: the prices are not real, and a client that cares can see it."""


def answer(payload: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(payload), status=status, content_type="application/json")


def error(status: int, message: str) -> web.Response:
    return answer({"message": message}, status)


def too_many_requests(limit: int, reset_at: int, retry_after_seconds: int) -> web.Response:
    """Return the 429; `reset_at` is Unix time."""
    response = error(429, "too many requests.")
    response.headers["Retry-After"] = str(retry_after_seconds)
    response.headers["X-RateLimit-Limit"] = str(limit)
    response.headers["X-RateLimit-Remaining"] = "0"
    response.headers["X-RateLimit-Reset"] = str(reset_at)
    return response
