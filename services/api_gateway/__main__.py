"""Run the API gateway: `python -m services.api_gateway`."""

import asyncio

from services.api_gateway import app, auth, queries, replica
from services.api_gateway.settings import Settings
from shared import database as databases
from shared import health, lifecycle
from shared.bus import Bus
from shared.database_clock import DatabaseClock
from shared.market_calendar import Calendar


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    async with (
        databases.connect(
            settings.database_url.get_secret_value(),
            application_name="api_gateway",
            connections_max=settings.gateway_database_connections,
            statement_timeout_seconds=databases.STATEMENT_TIMEOUT_SECONDS,
            server_settings=queries.SERVER_SETTINGS,
            reads_only=True,
        ) as database,
        Bus(settings.nats_url.get_secret_value(), name="api_gateway") as bus,
        auth.verifier(settings) as verifier,
        replica.reading(settings, database) as source,
    ):
        shared_clock = DatabaseClock(database)
        checks: dict[str, health.Check] = {
            "postgres": database.check,
            "schema": database.check_schema,
            "nats": bus.check,
            "clock": shared_clock.check,
        }
        if settings.jwt_jwks_url is not None:
            checks["token_keys"] = verifier.check
        if isinstance(source, replica.Reads):
            checks["read_replica"] = source.check
        calendar = Calendar()
        async with (
            app.serving(settings, app.Resources(source, verifier, bus, calendar, checks)) as served,
            health.serving("api_gateway", settings.health_host, settings.health_port, served.checks),
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(calendar.keep(database, stop))
            tasks.create_task(shared_clock.keep(stop))
            tasks.create_task(app.keep_up(settings, served, bus, stop))


if __name__ == "__main__":
    lifecycle.run("api_gateway", Settings, serve)
