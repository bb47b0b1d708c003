"""The simulator as a server: one port for the data host, its streams, the trading host, the controls and health."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from services.market_simulator import controls, protocol, stream_controls, stream_protocol
from services.market_simulator.answers import SIMULATED, error
from services.market_simulator.simulator import Simulator
from shared import health
from shared.settings import SettingsError

SERVICE = "market_simulator"

_BODY_BYTES_MAX = 1024 * 1024
_LINE_BYTES_MAX = 64 * 1024  # the symbols of a request stand in its first line

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(simulator: Simulator) -> web.Application:
    app = web.Application(middlewares=[_errors_as_json], client_max_size=_BODY_BYTES_MAX)
    app.add_routes(protocol.routes(simulator))
    app.add_routes(stream_protocol.routes(simulator))
    app.add_routes(controls.routes(simulator))
    app.add_routes(stream_controls.routes(simulator))
    app.add_routes(health.routes(SERVICE, {}))
    app.on_response_prepare.append(_say_simulated)

    async def close_streams(_: web.Application) -> None:
        simulator.streams.close()

    app.on_shutdown.append(close_streams)
    return app


@asynccontextmanager
async def serving(simulator: Simulator, host: str, port: int) -> AsyncIterator[str]:
    """Serve while the block runs and yield the URL; port 0 takes a free one. Raises SettingsError without a port."""
    runner = web.AppRunner(
        application(simulator),
        access_log=None,
        handler_cancellation=True,  # a client that leaves ends its hanging answer
        keepalive_timeout=75.0,
        lingering_time=0.0,
        shutdown_timeout=1.0,
        max_line_size=_LINE_BYTES_MAX,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as failure:
            # The errors of host names are negative numbers with words of their own.
            code = failure.errno or 0
            reason = os.strerror(code) if code > 0 else failure.strerror
            raise SettingsError(f"SIMULATOR_PORT {port} on {host} cannot be used: {reason}") from failure
        address = runner.addresses[0]
        async with asyncio.TaskGroup() as tasks:
            streaming = tasks.create_task(simulator.streams.run())
            yield f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"
            streaming.cancel()
    finally:
        await runner.cleanup()


async def _say_simulated(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SIMULATED)


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as problem:
        message = "endpoint not found." if problem.status == 404 else problem.reason.lower() + "."
        response = error(problem.status, message)
        if "Allow" in problem.headers:
            response.headers["Allow"] = problem.headers["Allow"]
        return response
