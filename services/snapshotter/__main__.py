"""Run the snapshotter: `python -m services.snapshotter`."""

from shared import startup

if __name__ == "__main__":
    startup.end_when_asked()


import asyncio

from services.snapshotter import queries, requested, snapshots, timer, upkeep
from services.snapshotter.settings import Settings
from services.snapshotter.troubles import Troubles
from shared import clock, health, lifecycle, logs
from shared import database as databases
from shared.bus import Bus
from shared.database_clock import DatabaseClock
from shared.market_calendar import Calendar
from shared.messages import PORTFOLIO, TIMER

log = logs.get_logger()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    troubles = Troubles(settings.interval)
    async with (
        databases.connect(
            settings.database_url.get_secret_value(),
            application_name="snapshotter",
            connections_max=snapshots.AT_ONCE_MAX + requested.AT_ONCE_MAX + 2,
            statement_timeout_seconds=150.0,
            server_settings=queries.SERVER_SETTINGS,
        ) as database,
        Bus(
            settings.nats_url.get_secret_value(),
            name="snapshotter",
            sized=(TIMER, PORTFOLIO),
            replicas=settings.nats_stream_replicas,
        ) as bus,
        health.serving(
            "snapshotter",
            settings.health_host,
            settings.health_port,
            {
                "postgres": database.check,
                "schema": database.check_schema,
                "nats": bus.check,
                "clock": (shared_clock := DatabaseClock(database)).check,
                "snapshots": troubles.check,
                "dead_letters": lambda: check_dead_letters(bus),
            },
            schema=databases.SCHEMA_REVISION,
        ),
    ):
        if not settings.snapshot_enabled:
            log.warning("snapshots_disabled", setting="SNAPSHOT_ENABLED", advice="nothing, if that is meant")
            await shared_clock.keep(stop)
            return
        calendar = Calendar() if settings.snapshot_market_hours_only else None
        if calendar:
            await calendar.read(database, clock.utc_now())  # before the first slot is judged
        async with asyncio.TaskGroup() as tasks:
            if calendar:
                tasks.create_task(calendar.keep(database, stop))
            tasks.create_task(shared_clock.keep(stop))
            tasks.create_task(requested.run(database, bus, settings.cooldown, stop, now=shared_clock.now))
            # Without it a wrong clock of this machine would say which slots are due, and which are expired.
            if not await shared_clock.wait_until_known(stop):
                return
            tasks.create_task(upkeep.run(database, settings.upkeep, stop, troubles, now=shared_clock.now))
            tasks.create_task(
                timer.run(
                    bus,
                    settings.interval,
                    settings.snapshot_shards,
                    stop,
                    late_max=settings.late_max,
                    calendar=calendar,
                    troubles=troubles,
                    now=shared_clock.now,
                )
            )
            tasks.create_task(
                snapshots.run(
                    database,
                    bus,
                    settings.interval,
                    stop,
                    late_max=settings.late_max,
                    calendar=calendar,
                    troubles=troubles,
                    now=shared_clock.now,
                )
            )


async def check_dead_letters(bus: Bus) -> health.Degraded | None:
    """Tell of messages that wait for an operator."""
    if not bus.dead_letters_kept:
        return None
    letters = "dead letter" if bus.dead_letters_kept == 1 else "dead letters"
    return health.Degraded(
        f"{bus.dead_letters_kept} {letters}: `admin dead-letters` lists what was put aside"
    )


if __name__ == "__main__":
    lifecycle.run("snapshotter", Settings, serve)
