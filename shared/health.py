"""Health of a process: `/healthz` (it runs), `/readyz` (what it needs answers), `/metrics` (Prometheus)."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import REGISTRY
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

Check = Callable[[], Awaitable[str | None]]
"""Returns None when the thing checked is well, else one line that says what is wrong."""

CHECK_TIMEOUT_SECONDS = 2.0
REMEMBERED_SECONDS = 1.0


class Note(str):
    """What a check says of something that the service can do without: it is ready all the same."""

    __slots__ = ()


async def readiness(checks: Mapping[str, Check]) -> dict[str, str]:
    """Run all checks at once, each with a deadline; return "ok" or what is wrong for each name."""

    async def outcome(check: Check) -> str:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                return await check() or "ok"
        except TimeoutError:
            return f"no answer within {CHECK_TIMEOUT_SECONDS:g} s"

    results = await asyncio.gather(*(outcome(check) for check in checks.values()))
    return dict(zip(checks, results, strict=True))


def _nothing() -> None:
    return None


def routes(
    service: str, checks: Mapping[str, Check], leaving: Callable[[], str | None] = _nothing
) -> list[web.RouteDef]:
    """Return the routes `/healthz` and `/readyz`.

    `leaving` says why no more work is to be sent here, when that is so: then nothing is checked or remembered.
    """

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"service": service, "status": "ok"})

    remembered: dict[str, str] = {}
    until = 0.0
    asking = asyncio.Lock()

    async def readyz(_: web.Request) -> web.Response:
        nonlocal remembered, until
        if reason := leaving():
            body = {"service": service, "status": "not ready", "checks": {"draining": reason}}
            return web.json_response(body, status=503)
        async with asking:  # however many ask, the database is asked once a second
            if time.monotonic() >= until:
                remembered = await readiness(checks)
                until = time.monotonic() + REMEMBERED_SECONDS
            results = remembered
        ready = all(result == "ok" or isinstance(result, Note) for result in results.values())
        body = {"service": service, "status": "ready" if ready else "not ready", "checks": results}
        return web.json_response(body, status=200 if ready else 503)

    return [web.get("/healthz", healthz), web.get("/readyz", readyz)]


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})


@asynccontextmanager
async def serving(
    service: str,
    host: str,
    port: int,
    checks: Mapping[str, Check],
    leaving: Callable[[], str | None] = _nothing,
) -> AsyncIterator[None]:
    """Serve the three routes while the block runs. Raises OSError when the port is taken."""
    app = web.Application(client_max_size=1024)
    app.add_routes([*routes(service, checks, leaving), web.get("/metrics", _metrics)])
    runner = web.AppRunner(
        app, access_log=None, keepalive_timeout=15.0, lingering_time=0.0, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise OSError(error.errno, f"HEALTH_PORT {port} cannot be used: {error.strerror}") from error
        yield
    finally:
        await runner.cleanup()
