"""The gateway's limit, aiohttp on uvloop with nothing around it: `python -m bench.bare_server PORT DATABASE_URL`.

`/constant` answers at once, `/query` asks PostgreSQL for 1 through a pool with its defaults.
"""

import asyncio
import sys

import asyncpg
import uvloop
from aiohttp import web

POOL = web.AppKey("pool", asyncpg.Pool)


async def serve(port: int, database_url: str) -> None:
    async with asyncpg.create_pool(database_url) as pool:
        app = web.Application()
        app.add_routes([web.get("/constant", _constant), web.get("/query", _query)])
        app[POOL] = pool
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


async def _constant(_: web.Request) -> web.Response:
    return web.Response(text="constant")


async def _query(request: web.Request) -> web.Response:
    return web.Response(text=str(await request.app[POOL].fetchval("SELECT 1")))


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2]))
