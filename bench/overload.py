"""Ten times as many as the gateway can serve: what it still answers, how soon, and when all is normal again.

Every client asks again as soon as it is answered, also when it was refused and told to wait.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from bench.data import refresh_prices
from bench.figures import Figure, Measured, middle
from bench.gateway import gateway_environment, token
from bench.processes import Helper, cpu_seconds, helper, memory_mb, running, wait_for_port
from bench.progress import say
from bench.server import Databases
from bench.sizes import Size
from bench.snapshots import kept_portfolios
from local.settings import free_port

USERS = 1_000
PEAK_CONNECTIONS = 256
"""So many at once keep the gateway busy, and hardly anybody is refused."""
TIMES = 10
CALM_CONNECTIONS = 16
SHARE_MIN = 0.8
"""Of the peak's answers. By the gateway's CPU for each, refusals included: what else the machine does is not in it."""
P99_MS_MAX = 1_000
MEMORY_TIMES_MAX = 2.0
NORMAL_SECONDS_MAX = 5.0
NORMAL_TIMES_MAX = 3.0
"""A part of the time is normal when nobody is refused in it, and its p99 is at most so many times that of before."""
_CURRENT = "/api/portfolio/current"
_LAG = re.compile(r"^foliotick_event_loop_lag_seconds (\S+)$", re.MULTILINE)


async def measure(server: Databases, size: Size, nats_url: str) -> Measured:
    name = await kept_portfolios(server, size.users, seed_like=False)
    port, health_port = free_port(), free_port()
    async with server.copy(name) as url:
        await refresh_prices(url)
        tokens = [token(f"user{number}") for number in range(1, min(size.users, USERS) + 1)]
        environment = gateway_environment(url, nats_url) | {
            "GATEWAY_PORT": str(port),
            "HEALTH_PORT": str(health_port),
        }
        with running("services.api_gateway", environment) as process:
            await wait_for_port(port)
            async with helper("bench.crowd", str(port)) as clients:
                return await _measure(_Crowd(clients, tokens, process, health_port), size)


@dataclass(frozen=True)
class _Crowd:
    """Clients, and the gateway that they ask."""

    clients: Helper
    tokens: Sequence[str]
    process: psutil.Process
    health_port: int

    async def ask(self, connections: int, seconds: float) -> dict[str, Any]:
        """Return what so many connections saw that asked for so long, and what an answer cost the gateway."""
        used = cpu_seconds(self.process)
        seen = await self.clients.ask(
            path=_CURRENT, tokens=self.tokens, connections=connections, seconds=seconds
        )
        assert seen["answers"].get("200"), seen
        return seen | {"cpu_ms": (cpu_seconds(self.process) - used) * 1000 / seen["answers"]["200"]}

    async def lag_ms(self) -> float:
        """Return how late the gateway's event loop was at worst in the last seconds."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.health_port}/metrics") as answer,
        ):
            found = _LAG.search(await answer.text())
        assert found is not None
        return float(found[1]) * 1000


async def _measure(crowd: _Crowd, size: Size) -> Measured:
    seconds, short = size.overload_seconds, max(size.overload_seconds / 6, 1.0)
    await crowd.ask(PEAK_CONNECTIONS, short)  # warms up
    calm = await crowd.ask(CALM_CONNECTIONS, short)
    peaks = [await crowd.ask(PEAK_CONNECTIONS, short)]
    before_mb = memory_mb(crowd.process)
    say(f"  {TIMES * PEAK_CONNECTIONS:,} connections for {seconds:g} s")
    overload = await crowd.ask(TIMES * PEAK_CONNECTIONS, seconds)
    after_mb, lag_ms = memory_mb(crowd.process), await crowd.lag_ms()
    after = await crowd.ask(CALM_CONNECTIONS, 2 * NORMAL_SECONDS_MAX)
    # The peak of before and after, so that the machine's other tenants are in all of it.
    peaks += [await crowd.ask(PEAK_CONNECTIONS, short)]
    say(f"  answers by status {overload['answers']}, {overload['lost']} connections lost")
    peak_ms = middle([1000 / peak["ok_per_second"] for peak in peaks])
    peak_cpu_ms = middle([peak["cpu_ms"] for peak in peaks])
    asking = f"{TIMES} times the clients for {seconds:g} s"
    return Measured(
        [
            Figure(
                f"{asking}: an answer every (limit: at the peak)",
                "ms",
                1000 / overload["ok_per_second"],
                limit=peak_ms,
            ),
            Figure(
                "  the gateway's CPU for it, refusals included (limit: at the peak)",
                "ms CPU",
                overload["cpu_ms"],
                limit=peak_cpu_ms,
                share_min=SHARE_MIN,
            ),
            Figure(
                "  an answer takes, p50 (limit: at the peak)",
                "ms",
                overload["ok_ms"]["p50"],
                limit=middle([peak["ok_ms"]["p50"] for peak in peaks]),
            ),
            Figure(
                "  an answer takes, p99 (limit: at the peak)",
                "ms",
                overload["ok_ms"]["p99"],
                limit=middle([peak["ok_ms"]["p99"] for peak in peaks]),
                at_most=P99_MS_MAX,
            ),
            Figure("  refusals in a second", "refusals", overload["refused_per_second"]),
            Figure("  the event loop is late, at worst", "ms", lag_ms),
            Figure(
                "  the gateway's memory after it (limit: before)",
                "MB",
                after_mb,
                limit=before_mb,
                limit_times_max=MEMORY_TIMES_MAX,
            ),
            Figure(
                "  until all is normal again", "s", _normal_after(after, calm), at_most=NORMAL_SECONDS_MAX
            ),
        ],
        {},
    )


def _normal_after(after: dict[str, Any], calm: dict[str, Any]) -> float:
    """Return the end of the first part that was normal."""
    p99_ms_max = calm["ok_ms"]["p99"] * NORMAL_TIMES_MAX
    ends = (
        part["ends_at"]
        for part in after["parts"]
        if part["ok"] and not part["refused"] and part["p99_ms"] <= p99_ms_max
    )
    return float(next(ends, after["parts"][-1]["ends_at"] + NORMAL_SECONDS_MAX))
