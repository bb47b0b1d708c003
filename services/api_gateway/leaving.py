"""Leaving: a gateway that is to stop says so first, and serves on until nobody comes any more."""

from prometheus_client import Gauge

from services.api_gateway.live import Live
from shared import logs
from shared.clock import wait_for_stop
from shared.lifecycle import Stop

log = logs.get_logger()
draining = Gauge("gateway_draining", "1 while the gateway serves what still comes, before it stops")


class Leaving:
    """Whether this gateway is about to stop. Then it is not ready, and keeps no connection open."""

    def __init__(self) -> None:
        self.is_on = False
        draining.set_function(lambda: float(self.is_on))

    def reason(self) -> str | None:
        """Say for readiness why no more is to be sent here."""
        return "the gateway is about to stop; send requests to another one" if self.is_on else None

    async def leave(self, stop: Stop, seconds: float, live: Live) -> None:
        """Wait for `stop`, and then for so many seconds, or for a second signal.

        In the second half of that time, when whoever follows the readiness has turned away, streams are ended little by
        little: their clients connect again, to another gateway.
        """
        await stop.wait()
        self.is_on = True
        if seconds:
            log.info("draining", seconds=seconds, advice="a second signal ends it at once")
            if not await wait_for_stop(stop.at_once, seconds / 2):
                await live.end_over(seconds / 2, stop.at_once)
