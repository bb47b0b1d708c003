"""`python -m services.market_simulator`: serve the simulated market until a signal."""

from shared import startup

if __name__ == "__main__":
    startup.end_when_asked()


import asyncio

from services.market_simulator.server import SERVICE, serving
from services.market_simulator.sessions import session
from services.market_simulator.settings import Settings
from services.market_simulator.simulator import build
from shared import lifecycle, logs
from shared.clock import utc_now

log = logs.get_logger()


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    simulator = build(settings)
    async with serving(simulator, settings.simulator_host, settings.simulator_port) as url:
        log.info(
            "market_simulator_ready",
            url=url,
            source=simulator.source(),
            symbols=len(simulator.market.symbols),
            note="every price from here is simulated",
        )
        # The holidays take a second to load; the first question about the clock need not wait for them.
        await asyncio.to_thread(session, utc_now().date())
        await stop.wait()


if __name__ == "__main__":
    lifecycle.run(SERVICE, Settings, serve)
