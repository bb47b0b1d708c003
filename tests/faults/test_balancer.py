"""The balancer loses what it can send to nobody: who does not ask loses nothing, and shows nothing."""

import asyncio
from pathlib import Path

import aiohttp
from aiohttp import web

from local.settings import free_port
from tests.faults.balancer import Balancer
from tests.faults.parts import Service
from tests.faults.population import drawn
from tests.faults.system import System
from tests.waiting import eventually


async def test_request_is_lost_while_no_gateway_is_ready(tmp_path: Path) -> None:
    statuses = {"/readyz": 200}

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=statuses.get(request.path, 500))

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    stop = asyncio.Event()
    async with aiohttp.ClientSession() as http:
        services = {"api_gateway": [Service("gateway")]}
        ports = {"gateway": port}
        system = System(tmp_path, drawn(3, 5), [], [], Service("market"), services, http, ports, "x" * 32)
        balancer = Balancer(system)

        async def has_asked() -> bool:
            return balancer.readers.counts["500"] > 0

        async def has_lost() -> bool:
            return bool(balancer.lost())

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(balancer.run(2, stop, 5))
            await eventually(has_asked)
            assert not balancer.lost()
            statuses["/readyz"] = 503
            await eventually(has_lost)
            stop.set()
    await runner.cleanup()
    assert set(balancer.lost()) == {"no gateway: none was ready"}
