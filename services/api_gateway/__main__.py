"""Run the API gateway: `python -m services.api_gateway`."""

import asyncio
from contextlib import AsyncExitStack

from services.api_gateway import app, auth, charts, queries, replica
from services.api_gateway.settings import Settings
from shared import database as databases
from shared import health, lifecycle
from shared.bus import Bus
from shared.database import Database


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
        AsyncExitStack() as stack,
    ):
        checks: dict[str, health.Check] = {
            "postgres": database.check,
            "schema": database.check_schema,
            "nats": bus.check,
        }
        if settings.jwt_jwks_url is not None:
            checks["token_keys"] = verifier.check
        source: Database | replica.Reads = database
        if settings.database_read_url is not None:
            source = await stack.enter_async_context(
                replica.reading(
                    database,
                    settings.database_read_url.get_secret_value(),
                    lag_seconds_max=settings.read_replica_lag_seconds_max,
                    connections_max=settings.gateway_database_connections,
                )
            )
            checks["read_replica"] = source.check
        news = charts.News()
        async with (
            health.serving("api_gateway", settings.health_host, settings.health_port, checks),
            app.serving(settings, source, verifier, checks, news),
        ):
            await bus.listen(charts.SUBJECTS, news, stop)


if __name__ == "__main__":
    lifecycle.run("api_gateway", Settings, serve)
