"""The gateway's limit, aiohttp on uvloop with nothing around it: `python -m bench.bare_server PORT [DATABASE_URL]`.

`/constant` answers at once, `/query` asks PostgreSQL for 1 through a pool with its defaults, `/events` streams: ready
bytes as Server-Sent Events, to all its clients again and again.
"""

import asyncio
import sys
from contextlib import AsyncExitStack

import asyncpg
import uvloop
from aiohttp import web

POOL = web.AppKey("pool", asyncpg.Pool)
STREAMS: web.AppKey[set[web.StreamResponse]] = web.AppKey("streams")


async def serve(port: int, database_url: str | None) -> None:
    async with AsyncExitStack() as stack:
        app = web.Application()
        app.add_routes(
            [web.get("/constant", _constant), web.get("/query", _query), web.get("/events", _events)]
        )
        if database_url is not None:
            app[POOL] = await stack.enter_async_context(asyncpg.create_pool(database_url))
        app[STREAMS] = set()
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


async def _constant(_: web.Request) -> web.Response:
    return web.Response(text="constant")


async def _query(request: web.Request) -> web.Response:
    return web.Response(text=str(await request.app[POOL].fetchval("SELECT 1")))


async def _events(request: web.Request) -> web.StreamResponse:
    """Stream events of `bytes` each, every `every_seconds`; the first client of all drives the rest."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    streams = request.app[STREAMS]
    drives = not streams
    streams.add(response)
    try:
        if drives:
            await _drive(streams, int(request.query["bytes"]), float(request.query["every_seconds"]))
        await asyncio.Event().wait()
    finally:
        streams.discard(response)
    return response


async def _drive(streams: set[web.StreamResponse], event_bytes: int, every_seconds: float) -> None:
    head, end = b"event: change\ndata: ", b"\n\n"
    event = head + b"x" * (event_bytes - len(head) - len(end)) + end
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due += every_seconds
        await asyncio.sleep(due - loop.time())
        for stream in tuple(streams):
            await stream.write(event)


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
