"""Run the price feeder: `python -m services.price_feeder`."""

import asyncio
import gc

from services.price_feeder import answers, feed
from services.price_feeder.market_data import MarketData
from services.price_feeder.settings import Settings
from shared import database as databases
from shared import health, lifecycle, logs
from shared.bus import Bus

log = logs.get_logger()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    async with (
        databases.connect(
            settings.database_url.get_secret_value(), application_name="price_feeder", connections_max=3
        ) as database,
        Bus(settings.nats_url.get_secret_value(), name="price_feeder") as bus,
        health.serving(
            "price_feeder",
            settings.health_host,
            settings.health_port,
            {"postgres": database.check, "schema": database.check_schema, "nats": bus.check},
        ),
    ):
        if not settings.price_update_enabled:
            log.warning("price_updates_disabled", setting="PRICE_UPDATE_ENABLED")
            await stop.wait()
            return
        assert settings.alpaca_api_key
        assert settings.alpaca_secret_key
        async with (
            MarketData(
                api_key=settings.alpaca_api_key.get_secret_value(),
                secret_key=settings.alpaca_secret_key.get_secret_value(),
                url=settings.alpaca_data_url,
                feed=settings.alpaca_feed,
                requests_per_minute=settings.alpaca_requests_per_minute,
            ) as market,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(answers.run(database, bus, stop))
            tasks.create_task(feed.run(database, bus, market, settings.interval, stop))


if __name__ == "__main__":
    # The modules stay to the end: collecting pandas and the like as garbage then would take longer than stopping.
    gc.freeze()
    lifecycle.run("price_feeder", Settings, serve)
