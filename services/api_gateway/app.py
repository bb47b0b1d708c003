"""The application: which address is answered by what, on which resources."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

from aiohttp import web

from services.api_gateway import charts, connections, live, openapi, pages, portfolio, refreshes, streams
from services.api_gateway.admission import Admission
from services.api_gateway.auth import Verifier
from services.api_gateway.charts import Charts, News
from services.api_gateway.clients import Places
from services.api_gateway.connections import Connections
from services.api_gateway.edge import Edge
from services.api_gateway.leaving import Leaving
from services.api_gateway.live import Live, Notifications
from services.api_gateway.pace import Pace
from services.api_gateway.replica import Reads
from services.api_gateway.settings import Settings
from services.api_gateway.user_rates import UserRates
from shared import clock, health
from shared import database as databases
from shared.bus import Bus
from shared.clock import Now
from shared.database import Database
from shared.lifecycle import STOP_GRACE_SECONDS
from shared.market_calendar import Calendar


@dataclass(frozen=True)
class Resources:
    """What the application stands on, opened by its caller."""

    database: Database | Reads
    verifier: Verifier
    bus: Bus
    calendar: Calendar
    checks: Mapping[str, health.Check]
    now: Now = clock.utc_now
    """The time that all replicas have. Tokens alone are judged by this machine's."""


@dataclass(frozen=True)
class Served:
    """The application that is being served, and what it hears of the world."""

    port: int
    news: News
    live: Live
    notifications: Notifications
    leaving: Leaving
    checks: Mapping[str, health.Check]

    def heard(self, subject: str, payload: bytes) -> None:
        self.news.heard(subject, payload)
        self.live.heard(subject, payload)

    def interrupted(self) -> None:
        self.news.interrupted()
        self.live.interrupted()

    def resumed(self) -> None:
        self.news.resumed()
        self.live.resumed()


CLOSE_SECONDS = 4.0
"""Of what a service may take to its end, the part for closing what the application stands on; the requests under way
get what the drain time leaves of the rest."""

SUBJECTS = tuple(sorted({*charts.SUBJECTS, *live.SUBJECTS}))
"""What an application is to hear on the bus."""


@asynccontextmanager
async def serving(
    settings: Settings, resources: Resources, *, chart_library: Path = pages.LIBRARY_FILE
) -> AsyncIterator[Served]:
    """Serve the API while the block runs."""
    database = resources.database
    news = News()
    admission = Admission(settings.gateway_database_connections)
    rates = UserRates(settings.user_requests_per_second, settings.user_requests_burst)
    connected = Connections(settings.gateway_connections_max)
    places = Places(settings.gateway_streams_max)
    leaving = Leaving()
    watched = Live(database, resources.calendar, admission, now=resources.now)
    notifications = Notifications(watched)
    checks = {
        **resources.checks,
        "notifications": notifications.check,
        "load": admission.check,
        "connections": connected.check,
        "user_rates": rates.check_readiness,
        "streams": places.check_readiness,
    }
    app = web.Application()
    app[portfolio.DATABASE] = database
    app[portfolio.VERIFIER] = resources.verifier
    app[portfolio.CALENDAR] = resources.calendar
    app[portfolio.NOW] = resources.now
    app[portfolio.CHARTS] = kept_charts = Charts(
        database,
        ZoneInfo(settings.market_timezone),
        news,
        admission,
        bytes_max=settings.gateway_chart_cache_megabytes * 1024 * 1024,
        reading_seconds_max=settings.request_timeout_seconds,
    )
    app[portfolio.ADMISSION] = admission
    app[portfolio.USER_RATES] = rates
    app[streams.LIVE] = watched
    app[streams.PACE] = Pace()
    app[streams.BUS] = resources.bus
    app[streams.BUS_SECONDS_MAX] = settings.request_timeout_seconds / 2
    app[refreshes.SECONDS_MAX] = settings.request_timeout_seconds
    app[streams.ALLOWED_ORIGINS] = frozenset(settings.cors_allowed_origins)
    app[streams.PLACES] = places
    app[streams.HEARTBEAT_SECONDS] = settings.stream_heartbeat_seconds
    app.add_routes(
        [
            web.get("/api/portfolio/current", portfolio.current),
            web.get("/api/portfolio/performance", portfolio.chart),
            web.get("/api/portfolio/stream", streams.stream, allow_head=False),
            web.post("/api/portfolio/stream-tickets", streams.ticket),
            web.post("/api/portfolio/snapshots", refreshes.snapshot),
            web.post("/api/portfolio/refresh-prices", refreshes.prices),
            web.get("/api/openapi.json", openapi.served),
            *health.routes("api_gateway", checks, leaving.reason),
            *pages.routes(settings.gateway_page_token, chart_library),
        ]
    )
    app.on_shutdown.append(watched.end)
    app.on_cleanup.append(lambda _: kept_charts.close())
    edge_around = partial(
        Edge,
        routes=frozenset(resource.canonical for resource in app.router.resources()),
        timeout_seconds=settings.request_timeout_seconds,
        allowed_origins=frozenset(settings.cors_allowed_origins),
        leaving=leaving,
    )
    try:
        async with connections.serving(
            app,
            settings.gateway_host,
            settings.gateway_port,
            edge_around,
            connected,
            finish_seconds_max=STOP_GRACE_SECONDS - CLOSE_SECONDS - settings.gateway_drain_seconds,
        ) as port:
            yield Served(port, news, watched, notifications, leaving, checks)
    finally:
        for episode in (admission.overload, rates.episode, connected.episode, places.episode):
            episode.end()


async def keep_up(settings: Settings, served: Served, bus: Bus, stop: asyncio.Event) -> None:
    """Keep what is served up to date with the bus and the database, until `stop` is set."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(bus.listen(SUBJECTS, served, stop))
        tasks.create_task(
            databases.listen(
                (settings.database_listen_url or settings.database_url).get_secret_value(),
                live.CHANNEL,
                served.notifications,
                stop,
                application_name="api_gateway_listens",
            )
        )
        tasks.create_task(served.live.run(stop))
