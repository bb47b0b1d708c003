"""Replace an answer as ordered: errors, empty and dripping bodies, silence, broken connections."""

import asyncio
import socket
import struct
import time

from aiohttp import web

from services.market_simulator.answers import SIMULATED, error, too_many_requests
from services.market_simulator.faults import ByteDrip, Fault, Hang, RateLimited, Replacement, ServerError

_DRIP_SECONDS_MAX = 600.0
_ABORT_AT_CLOSE = struct.pack("ii", 1, 0)  # linger on, 0 s: the connection ends with a reset
_BAD_GATEWAY = (
    "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n"
    "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)


async def replacement(request: web.Request, fault: Fault, body: bytes, limit: int) -> web.Response:
    """Do what a fault orders instead of the answer, whose body is given for a fault that needs it."""
    match fault:
        case RateLimited():
            reset_at = int(time.time()) + fault.retry_after_seconds
            return too_many_requests(limit, reset_at, fault.retry_after_seconds)
        case ServerError():
            return error(fault.status, "internal server error occurred")
        case Hang():
            await asyncio.sleep(fault.hang_seconds)
            return _closed(request)
        case ByteDrip():
            return await _drip(request, body, fault.interval_seconds)
        case Replacement():
            return _simple_replacement(request, fault)
        case _:
            raise AssertionError(f"{fault.kind} does not replace the answer")


def _simple_replacement(request: web.Request, fault: Replacement) -> web.Response:
    match fault.kind:
        case "bad_gateway":
            return web.Response(status=502, text=_BAD_GATEWAY, content_type="text/html")
        case "empty_body":
            return web.Response(status=200, content_type="application/json")
        case "unauthorized":
            return error(401, "unauthorized.")
        case "forbidden":
            return error(403, "forbidden.")
        case "redirect":
            return web.Response(status=302, headers={"Location": "/maintenance"})
        case "reset":
            return _reset(request)


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        break_off(request.transport)
    return web.Response()


def break_off(transport: asyncio.Transport) -> None:
    """End a connection with a reset."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None and not transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT_AT_CLOSE)
    transport.abort()


def _closed(request: web.Request) -> web.Response:
    """Close the connection; what is returned has nowhere to go any more."""
    if request.transport is not None:
        request.transport.close()
    return web.Response()


async def _drip(request: web.Request, body: bytes, interval_seconds: float) -> web.Response:
    head = [
        "HTTP/1.1 200 OK",
        "Content-Type: application/json; charset=utf-8",
        *(f"{name}: {value}" for name, value in SIMULATED.items()),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    ends_s = time.monotonic() + _DRIP_SECONDS_MAX
    for byte in "\r\n".join([*head, "", ""]).encode() + body:
        if request.transport is None or request.transport.is_closing() or time.monotonic() > ends_s:
            break
        request.transport.write(bytes([byte]))
        await asyncio.sleep(interval_seconds)
    return _closed(request)
