"""A gateway that leaves: it says so, serves what still comes, and nobody loses a request by it."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import aiohttp

from shared.database import Database
from tests.factories import create_user
from tests.gateway import Gateway, bearer
from tests.integration.test_api_gateway_process import Process, free_port, is_waiting, listening, started
from tests.waiting import eventually

CURRENT = "/api/portfolio/current"
STREAM = "/api/portfolio/stream"


async def test_draining_gateway_is_not_ready_and_serves_on(
    database: Database, database_url: str, nats_url: str
) -> None:
    await create_user(database)
    async with started(database_url, nats_url, GATEWAY_DRAIN_SECONDS="2.5") as process:
        await eventually(lambda: listening(process), timeout=20)
        url = f"http://127.0.0.1:{process.gateway.port}{STREAM}"
        async with process.gateway.session.get(url, headers=bearer()) as stream:
            first = await stream.content.readuntil(b"event: portfolio")
            assert first
            before = await process.gateway.get(CURRENT)
            assert "Connection" not in before.headers
            process.running.send_signal(signal.SIGTERM)

            async def is_draining() -> bool:
                for each, said in ((process.gateway, "failed"), (process.health, "about to stop")):
                    answer = await each.get("/readyz", None)
                    assert answer.status == 503
                    assert said in answer.json()["checks"].get("draining", "")
                return True

            await eventually(is_draining, timeout=2)
            assert (await process.gateway.get("/healthz", None)).status == 200
            for path, subject in ((CURRENT, "demo"), ("/", None), ("/nowhere", None)):
                answer = await process.gateway.get(path, subject)
                assert answer.status == (404 if path == "/nowhere" else 200)
                assert answer.headers["Connection"] == "close"
            rest = await stream.content.read()
            assert b'event: end\ndata: {"reason":"going_away"}' in rest
        assert await process.ended() == 0
    events = [line["event"] for line in process.lines()]
    assert events.index("stopping") < events.index("draining") < events.index("stopped")
    assert "stop_overran" not in events


async def test_second_signal_ends_the_drain(database_url: str, nats_url: str) -> None:
    async with started(database_url, nats_url, GATEWAY_DRAIN_SECONDS="5") as process:
        await eventually(lambda: listening(process), timeout=20)
        process.running.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            with suppress(aiohttp.ClientError):  # this port is opened after the other one
                return (await process.health.get("/readyz", None)).status == 503
            return False

        await eventually(is_draining, timeout=2)
        began = time.monotonic()
        assert await process.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 4
    assert "stopping_at_once" in [line["event"] for line in process.lines()]


async def test_request_that_the_end_comes_too_early_for_is_told_to_try_again(
    database: Database, database_url: str, nats_url: str
) -> None:
    """With five seconds of drain one is left for what is under way: less than a request may take."""
    await create_user(database)
    async with started(database_url, nats_url, GATEWAY_DRAIN_SECONDS="5") as process:
        await eventually(lambda: listening(process), timeout=20)
        async with database.transaction() as connection:
            await connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            process.running.send_signal(signal.SIGTERM)

            async def is_draining() -> bool:
                return "draining" in (await process.health.get("/readyz", None)).json()["checks"]

            await eventually(is_draining, timeout=4)
            under_way = asyncio.ensure_future(process.gateway.get(CURRENT))
            await eventually(lambda: is_waiting(database), timeout=4)
            process.running.send_signal(signal.SIGINT)  # the drain is over at once
            answer = await under_way
        assert answer.status == 503
        assert answer.problem().type == "urn:foliotick:problem:deadline-exceeded"
        assert "has stopped" in answer.problem().detail
        assert answer.headers["Retry-After"] == "2"
        assert answer.headers["Connection"] == "close"
        assert await process.ended() == 0
    assert "stop_overran" not in process.output.decode()


async def test_clients_that_read_nothing_do_not_hold_up_the_end(
    database: Database, database_url: str, nats_url: str
) -> None:
    user_id = await create_user(database)
    await database.fetch(
        "INSERT INTO positions SELECT $1, 'T' || n, 1, 1 FROM generate_series(1, 10000) AS n", user_id
    )
    asked = f"GET {{}} HTTP/1.1\r\nHost: a\r\nAuthorization: {bearer()['Authorization']}\r\n\r\n"
    async with (
        started(database_url, nats_url, GATEWAY_DRAIN_SECONDS="5") as process,
        AsyncExitStack() as stack,
    ):
        await eventually(lambda: listening(process), timeout=20)
        for request in (asked.format(CURRENT) * 5, asked.format(STREAM), "GET / HTTP/1.1\r\nHos", ""):
            # A reader of so small a limit stops reading from its socket at once.
            _, writer = await asyncio.open_connection("127.0.0.1", process.gateway.port, limit=1)
            stack.callback(writer.close)
            writer.write(request.encode())

        async def are_answered() -> bool:
            metrics = (await process.health.get("/metrics", None)).text
            return 'gateway_streams_open{transport="sse"} 1.0' in metrics

        await eventually(are_answered)
        process.running.send_signal(signal.SIGTERM)
        assert await process.stop() == 0
    assert "stop_overran" not in process.output.decode()


# ---- a rolling restart ---------------------------------------------------------------------------


class Balancer:
    """Hands requests to the gateways that say that they are ready, over connections that are kept open.

    It knows GET without a body alone, and tries nothing twice: what a gateway loses is lost.
    """

    def __init__(self) -> None:
        self.port = 0
        self.ready: list[Process] = []
        self.writers: set[asyncio.StreamWriter] = set()
        self._turn = 0
        self._idle: dict[int, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {}

    async def follow(self, processes: list[Process]) -> None:
        """Ask each gateway again and again whether it is ready."""
        while True:
            ready = []
            for process in processes:
                with suppress(aiohttp.ClientError, OSError):
                    if (await process.health.get("/readyz", None)).status == 200:
                        ready.append(process)
            self.ready = ready
            for port in set(self._idle) - {process.gateway.port for process in ready}:
                for _, writer in self._idle.pop(port):
                    writer.close()
            await asyncio.sleep(0.1)

    async def serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(request))
        writer.close()

    async def _answer(self, request: bytes) -> bytes:
        self._turn += 1
        port = self.ready[self._turn % len(self.ready)].gateway.port
        idle = self._idle.setdefault(port, [])
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        self.writers.add(writer)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        body = await reader.readexactly(int(lines[b"Content-Length"]))
        if lines.get(b"Connection") == b"close":
            writer.close()
        else:
            self._idle.setdefault(port, []).append((reader, writer))
        return head.replace(b"Connection: close\r\n", b"") + body


@asynccontextmanager
async def balancing(processes: list[Process]) -> AsyncIterator[Balancer]:
    balancer = Balancer()
    server = await asyncio.start_server(balancer.serve_client, "127.0.0.1", 0)
    balancer.port = server.sockets[0].getsockname()[1]
    following = asyncio.create_task(balancer.follow(processes))
    try:
        yield balancer
    finally:
        following.cancel()
        server.close()
        for writer in balancer.writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in balancer.writers), return_exceptions=True)


async def test_rolling_restart_loses_no_request(database: Database, database_url: str, nats_url: str) -> None:
    await create_user(database)
    statuses: Counter[object] = Counter()
    processes: list[Process] = []
    is_over = asyncio.Event()

    async def ask(port: int) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
            gateway = Gateway(port, session)
            while not is_over.is_set():
                try:
                    statuses[(await gateway.get(CURRENT)).status] += 1
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    statuses[type(error).__name__] += 1
                await asyncio.sleep(0.02)

    async with AsyncExitStack() as stack, balancing(processes) as balancer:

        async def start(port: int) -> Process:
            # Without access lines: nobody reads them, and a full pipe would stand still.
            environment = {"LOG_LEVEL": "WARNING", "GATEWAY_PORT": str(port), "GATEWAY_DRAIN_SECONDS": "1"}
            environment["USER_REQUESTS_PER_SECOND"] = "0"
            process = await stack.enter_async_context(started(database_url, nats_url, **environment))
            processes.append(process)
            return process

        async def are_ready() -> bool:
            return len(balancer.ready) == 2

        first = [await start(free_port()), await start(free_port())]
        await eventually(are_ready, timeout=30)
        asking = [asyncio.create_task(ask(balancer.port)) for _ in range(8)]
        for old in first:
            served = statuses[200]
            assert await old.stop() == 0
            processes.remove(old)
            await start(old.gateway.port)
            await eventually(are_ready, timeout=30)
            assert statuses[200] > served + 50
        is_over.set()
        await asyncio.gather(*asking)
    assert set(statuses) == {200}, statuses
