"""The application: which address is answered by what, on which resources."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from zoneinfo import ZoneInfo

from aiohttp import web
from prometheus_client import Gauge

from services.api_gateway import connections, openapi, pages, portfolio
from services.api_gateway.auth import Verifier
from services.api_gateway.charts import Charts, News
from services.api_gateway.edge import Edge
from services.api_gateway.replica import Reads
from services.api_gateway.settings import Settings
from shared import health
from shared.database import Database
from shared.market_calendar import Calendar

connections_open = Gauge("gateway_database_connections", "Connections to PostgreSQL, by state", ["state"])


def application(
    settings: Settings,
    database: Database | Reads,
    verifier: Verifier,
    checks: Mapping[str, health.Check],
    news: News,
    *,
    calendar: Calendar,
) -> web.Application:
    """Return the application with its routes and resources."""
    charts = Charts(
        database,
        ZoneInfo(settings.market_timezone),
        news,
        bytes_max=settings.gateway_chart_cache_megabytes * 1024 * 1024,
        reading_seconds_max=settings.request_timeout_seconds,
    )
    app = web.Application()
    app[portfolio.DATABASE] = database
    app[portfolio.VERIFIER] = verifier
    app[portfolio.CHARTS] = charts
    app[portfolio.CALENDAR] = calendar
    app.on_cleanup.append(lambda _: charts.close())
    app.add_routes(
        [
            web.get("/api/portfolio/current", portfolio.current),
            web.get("/api/portfolio/performance", portfolio.chart),
            web.get("/api/openapi.json", openapi.served),
            *health.routes("api_gateway", checks),
            *pages.routes(settings.gateway_page_token),
        ]
    )
    return app


@asynccontextmanager
async def serving(
    settings: Settings,
    database: Database | Reads,
    verifier: Verifier,
    checks: Mapping[str, health.Check],
    news: News,
    *,
    calendar: Calendar,
) -> AsyncIterator[int]:
    """Serve the API while the block runs, and yield its port."""
    connections_open.labels("in_use").set_function(
        lambda: database.connections_open - database.connections_idle
    )
    connections_open.labels("idle").set_function(lambda: database.connections_idle)
    app = application(settings, database, verifier, checks, news, calendar=calendar)
    edge_around = partial(
        Edge,
        routes=frozenset(resource.canonical for resource in app.router.resources()),
        timeout_seconds=settings.request_timeout_seconds,
        allowed_origins=frozenset(settings.cors_allowed_origins),
    )
    async with connections.serving(app, settings.gateway_host, settings.gateway_port, edge_around) as port:
        yield port
