"""Run the API gateway: `python -m services.api_gateway`."""

from shared import startup

if __name__ == "__main__":
    startup.end_when_asked()


import asyncio
import gc

from services.api_gateway import app, auth, queries, replica
from services.api_gateway.settings import Settings
from shared import database as databases
from shared import health, lifecycle
from shared.bus import Bus
from shared.database_clock import DatabaseClock
from shared.lifecycle import Stop
from shared.market_calendar import Calendar
from shared.messages import TICKETS

GARBAGE_THRESHOLDS = (50_000, 20, 100)
"""Objects between two looks for garbage. With the 700 of Python, hundreds of requests that wait are looked through so
often that an answer costs a fourth more; what makes up cycles here is little, and some megabytes of it may wait."""


KEEP_SECONDS_MAX = 0.5
"""What keeping up with bus and database may still take when the gateway has left."""


class _NatsCheck:
    """Whether NATS is there: a gateway that has found it once answers on without it, and is ready."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._was_there = False

    async def __call__(self) -> str | None:
        problem = await self._bus.check()
        self._was_there = self._was_there or problem is None
        if problem is None or not self._was_there:
            return problem
        return health.Degraded(
            f"{problem}; no tickets, no requested snapshots or prices, charts are a second old"
        )


async def serve(settings: Settings, stop: Stop) -> None:
    async with (
        databases.connect(
            settings.database_url.get_secret_value(),
            application_name="api_gateway",
            connections_max=settings.gateway_database_connections,
            statement_timeout_seconds=databases.STATEMENT_TIMEOUT_SECONDS,
            server_settings=queries.SERVER_SETTINGS,
            reads_only=True,
        ) as database,
        Bus(
            settings.nats_url.get_secret_value(),
            name="api_gateway",
            sized=(TICKETS,),
            replicas=settings.nats_stream_replicas,
        ) as bus,
        auth.verifier(settings) as verifier,
        replica.reading(settings, database) as source,
    ):
        shared_clock = DatabaseClock(database)
        checks: dict[str, health.Check] = {
            "postgres": database.check,
            "schema": database.check_schema,
            "nats": _NatsCheck(bus),
            "clock": shared_clock.check,
        }
        if settings.jwt_jwks_url is not None:
            checks["token_keys"] = verifier.check
        if isinstance(source, replica.Reads):
            checks["read_replica"] = source.check
        calendar = Calendar()
        async with (
            app.serving(
                settings, app.Resources(source, verifier, bus, calendar, checks, shared_clock.now)
            ) as served,
            health.serving(
                "api_gateway",
                settings.health_host,
                settings.health_port,
                served.checks,
                schema=databases.SCHEMA_REVISION,
                leaving=served.leaving.reason,
            ),
            asyncio.TaskGroup() as tasks,
        ):
            left = asyncio.Event()
            for keeping in (
                calendar.keep(database, left),
                shared_clock.keep(left),
                app.keep_up(settings, served, bus, left),
            ):
                # What a frozen server is asked must not take the time in which requests are finished.
                tasks.create_task(lifecycle.finish(keeping, left, stop_seconds_max=KEEP_SECONDS_MAX))
            await served.leaving.leave(stop, settings.gateway_drain_seconds, served.live)
            left.set()


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # what is loaded by now stays: to look through it again and again would hold up every answer
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    lifecycle.run("api_gateway", Settings, serve)
