"""Run the price feeder: `python -m services.price_feeder`."""

from shared import startup

if __name__ == "__main__":
    startup.end_when_asked()


import asyncio
import gc

from services.price_feeder import answers, calendar, feed, refreshes, streams
from services.price_feeder.feed import Feed
from services.price_feeder.lease import Lease
from services.price_feeder.market_data import MarketData
from services.price_feeder.settings import Settings
from services.price_feeder.signals import Signals
from services.price_feeder.streaming import Streaming
from shared import database as databases
from shared import health, lifecycle, logs
from shared.bus import Bus
from shared.database import Database
from shared.database_clock import DatabaseClock
from shared.market_calendar import Calendar
from shared.messages import prices_stream

DATABASE_CONNECTIONS = 4
LEASE_CONNECTIONS = 2
"""Of the lease's own, so that work that waits for the database does not cost it."""

CALENDAR_STOP_SECONDS_MAX = 1.0
"""What asking Alpaca for its calendar may still take when the service is to stop; by itself it may take 20 s."""

log = logs.get_logger()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    url = settings.database_url.get_secret_value()
    async with (
        databases.connect(
            url, application_name="price_feeder", connections_max=DATABASE_CONNECTIONS
        ) as database,
        databases.connect(
            url, application_name="price_feeder_lease", connections_max=LEASE_CONNECTIONS
        ) as lease_database,
        Bus(
            settings.nats_url.get_secret_value(),
            name="price_feeder",
            owned=(prices_stream(settings.replay),),
            replicas=settings.nats_stream_replicas,
        ) as bus,
    ):
        lease = Lease(lease_database)
        shared_clock = DatabaseClock(database)
        checks: dict[str, health.Check] = {
            "postgres": database.check,
            "schema": database.check_schema,
            "nats": bus.check,
            "clock": shared_clock.check,
        }
        signals = Signals()
        if settings.price_update_enabled:
            checks |= {"lease": lease.check, **signals.checks}
        async with health.serving(
            "price_feeder",
            settings.health_host,
            settings.health_port,
            checks,
            schema=databases.SCHEMA_REVISION,
        ):
            if not settings.price_update_enabled:
                log.warning(
                    "price_updates_disabled",
                    setting="PRICE_UPDATE_ENABLED",
                    advice="nothing, if that is meant",
                )
                await shared_clock.keep(stop)
                return
            await feed_prices(
                settings, database, bus, lease, signals=signals, stop=stop, shared_clock=shared_clock
            )


async def feed_prices(
    settings: Settings,
    database: Database,
    bus: Bus,
    lease: Lease,
    *,
    signals: Signals,
    stop: asyncio.Event,
    shared_clock: DatabaseClock,
) -> None:
    assert settings.alpaca_api_key
    assert settings.alpaca_secret_key
    api_key = settings.alpaca_api_key.get_secret_value()
    secret_key = settings.alpaca_secret_key.get_secret_value()
    async with (
        MarketData(
            api_key=api_key,
            secret_key=secret_key,
            url=settings.alpaca_data_url,
            feed=settings.alpaca_feed,
            requests_per_minute=settings.alpaca_requests_per_minute,
        ) as market,
        calendar.AlpacaCalendar(
            api_key=api_key, secret_key=secret_key, url=settings.alpaca_base_url
        ) as calendar_source,
    ):
        sessions = Calendar()
        connect = streams.connections(
            settings.alpaca_stream_url, settings.alpaca_feed, api_key=api_key, secret_key=secret_key
        )

        async def lead(over: asyncio.Event) -> None:
            if not await shared_clock.wait_until_known(over):
                return
            streaming = Streaming(
                connect,
                feed=settings.alpaca_feed,
                symbols_max=settings.alpaca_stream_symbols_max,
                now=shared_clock.now,
            )
            term = Feed(
                database,
                bus,
                market,
                lease,
                calendar=sessions,
                streaming=streaming if settings.price_stream_enabled else None,
                closed_interval=settings.closed_interval,
                now=shared_clock.now,
            )
            async with signals.of(term), asyncio.TaskGroup() as tasks:
                tasks.create_task(feed.run(term, settings.interval, over))
                tasks.create_task(
                    refreshes.run(
                        database,
                        bus,
                        term.refresh,
                        lease.holds,
                        over,
                        cooldown=settings.refresh_cooldown,
                        requests_per_minute=settings.alpaca_requests_per_minute,
                        now=shared_clock.now,
                    )
                )

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(answers.run(database, bus, stop))  # a standby answers as well
            tasks.create_task(sessions.keep(database, stop))
            tasks.create_task(shared_clock.keep(stop))
            keeping = calendar.run(database, calendar_source, lease.holds, stop)
            tasks.create_task(lifecycle.finish(keeping, stop, stop_seconds_max=CALENDAR_STOP_SECONDS_MAX))
            await lease.lead(lead, stop)


if __name__ == "__main__":
    # The modules stay to the end: collecting pandas and the like as garbage then would take longer than stopping.
    gc.freeze()
    lifecycle.run("price_feeder", Settings, serve)
