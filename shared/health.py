"""Health of a process: `/healthz` (it runs), `/readyz` (what it needs answers), `/metrics` (Prometheus).

A check finds something well, or degraded (the service does its work in spite of it), or failed (it cannot). `/metrics`
says the same as `/readyz`, so that an alert needs nothing else, and the log says once what has failed and what to do,
also when nobody asks.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum

from aiohttp import web
from prometheus_client import REGISTRY, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from shared import logs, vitals

Check = Callable[[], Awaitable[str | None]]
"""Returns None when the thing checked is well, else one line that says what is wrong."""

CHECK_TIMEOUT_SECONDS = 2.0
REMEMBERED_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""Between two looks of our own, so that the log does not depend on somebody who asks."""
STOP_SECONDS_MAX = 1.0
"""What requests under way may still take at the end."""

ADVICE = {
    "postgres": "see whether PostgreSQL runs, and DATABASE_URL; the service heals by itself",
    "schema": "run `alembic upgrade head` with this service's DATABASE_URL",
    "nats": "see whether nats-server runs with JetStream and has room, and NATS_URL; the service heals by itself",
}

CHECK_STATE = Gauge("foliotick_check_state", "1 for the state that a check is in.", ["check", "state"])

log = logs.get_logger()


class Note(str):
    """What a check says that is no fault: a standby, say. The service is ready."""

    __slots__ = ()


class Degraded(Note):
    """What a check says of a fault in spite of which the service does its work: it is ready all the same."""

    __slots__ = ()


class State(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"
    FAILED = "failed"


_STATUSES = {State.OK: "ready", State.DEGRADED: "degraded", State.FAILED: "not ready"}


def state_of(result: str) -> State:
    """Return the state that a check's result means."""
    if isinstance(result, Degraded):
        return State.DEGRADED
    return State.OK if result == "ok" or isinstance(result, Note) else State.FAILED


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


class Readiness:
    """What the checks of a process have found: however many ask, the database is asked once a second."""

    def __init__(
        self, checks: Mapping[str, Check], heard: Callable[[Mapping[str, str]], None] | None = None
    ) -> None:
        self._checks = checks
        self._heard = heard
        self._results: dict[str, str] = {}
        self._until = 0.0
        self._asking = asyncio.Lock()

    async def results(self) -> Mapping[str, str]:
        async with self._asking:
            if time.monotonic() >= self._until:
                self._results = await readiness(self._checks)
                self._until = time.monotonic() + REMEMBERED_SECONDS
                if self._heard:
                    self._heard(self._results)
            return self._results


class Reporting:
    """Says in metrics and log what the checks find: a failure once when it begins, and once when it is over."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def hear(self, results: Mapping[str, str]) -> None:
        for check, result in results.items():
            state = state_of(result)
            for each in State:
                CHECK_STATE.labels(check, each).set(each is state)
            if state is State.FAILED and check not in self._failed:
                self._failed.add(check)
                log.warning("check_failed", check=check, problem=result, advice=ADVICE.get(check))
            elif state is not State.FAILED and check in self._failed:
                self._failed.discard(check)
                log.info("check_recovered", check=check)


@asynccontextmanager
async def _looking(known: Readiness, leaving: Callable[[], str | None]) -> AsyncIterator[None]:
    """Ask the checks again and again while the block runs; what has just started is given time to connect first."""

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not leaving():
                await known.results()

    task = asyncio.create_task(look())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()  # it ends by a bug of a check alone, which must not stay unseen


def _stays() -> str | None:
    return None


def routes(
    service: str, checks: Mapping[str, Check], leaving: Callable[[], str | None] = _stays
) -> list[web.RouteDef]:
    """Return the routes `/healthz` and `/readyz` for a port where anybody may ask: states alone, and no reasons.

    These name servers and users. `leaving` says why no more work is to be sent here, when that is so: then nothing is
    checked or remembered.
    """
    return _routes(service, Readiness(checks), leaving, shown=state_of)


def _routes(
    service: str, known: Readiness, leaving: Callable[[], str | None], *, shown: Callable[[str], str] = str
) -> list[web.RouteDef]:
    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"service": service, "status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        if reason := leaving():
            leaver = {
                "service": service,
                "status": _STATUSES[State.FAILED],
                "checks": {"draining": shown(reason)},
            }
            return web.json_response(leaver, status=503)
        results = await known.results()
        states = {state_of(result) for result in results.values()}
        worst = next((state for state in (State.FAILED, State.DEGRADED) if state in states), State.OK)
        body = {
            "service": service,
            "status": _STATUSES[worst],
            "checks": {check: shown(result) for check, result in results.items()},
        }
        return web.json_response(body, status=503 if worst is State.FAILED else 200)

    return [web.get("/healthz", healthz), web.get("/readyz", readyz)]


@asynccontextmanager
async def serving(
    service: str,
    host: str,
    port: int,
    checks: Mapping[str, Check],
    *,
    schema: str,
    leaving: Callable[[], str | None] = _stays,
) -> AsyncIterator[None]:
    """Serve the three routes while the block runs, and look at the checks. Raises OSError when the port is taken."""
    known = Readiness(checks, Reporting().hear)
    vitals.describe(service, schema)
    with vitals.Vitals() as vital:

        async def metrics(_: web.Request) -> web.Response:
            await known.results()
            vital.take()
            return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

        app = web.Application(client_max_size=1024)
        app.add_routes([*_routes(service, known, leaving), web.get("/metrics", metrics)])
        runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=15.0,
            lingering_time=0.0,
            shutdown_timeout=STOP_SECONDS_MAX,
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            try:
                await site.start()
            except OSError as error:
                raise OSError(error.errno, f"HEALTH_PORT {port} cannot be used: {error.strerror}") from error
            async with _looking(known, leaving):
                yield
        finally:
            await runner.cleanup()
