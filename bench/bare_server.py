"""The gateway's limit: aiohttp on uvloop with nothing around it. `/constant` answers at once, `/query` asks for 1."""

import asyncio
import sys

import uvloop
from aiohttp import web

from shared import database as databases
from shared.database import Database


async def serve(port: int, database_url: str) -> None:
    async with databases.connect(database_url, application_name="bare", connections_max=10) as database:
        app = web.Application()
        app.add_routes([web.get("/constant", _constant), web.get("/query", _query)])
        app[_DATABASE] = database
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


_DATABASE = web.AppKey("database", Database)


async def _constant(_: web.Request) -> web.Response:
    return web.Response(text="constant")


async def _query(request: web.Request) -> web.Response:
    return web.Response(text=str(await request.app[_DATABASE].fetch_value("SELECT 1")))


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2]))
