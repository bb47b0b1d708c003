"""The services as processes of a test: started with settings, asked over HTTP, stopped."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp

from local.children import Child
from local.settings import free_port, service_environment
from local.system import TOKEN_LIFETIME
from services.admin.settings import TokenSettings
from services.admin.tokens import minted_token
from shared.clock import utc_now
from tests.contract import overhearing
from tests.waiting import eventually

JWT_SECRET = "the secret of the end-to-end tests, long enough"


@dataclass
class System:
    """A running system: where it is, and a client to ask it with."""

    database_url: str
    nats_url: str
    logs: Path
    client: aiohttp.ClientSession
    stack: AsyncExitStack
    settings: dict[str, str]
    urls: dict[str, str] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)

    async def start(self, name: str, **own: str) -> None:
        """Start a service and wait until it is ready."""
        port, health_port = free_port(), free_port()
        if name == "market_simulator":
            health_url = url = f"http://127.0.0.1:{port}"
            route = "/healthz"
            ports = {"SIMULATOR_PORT": str(port)}
            self.settings |= {"ALPACA_DATA_URL": url, "ALPACA_BASE_URL": url}
            self.settings["ALPACA_STREAM_URL"] = url.replace("http", "ws", 1)
        else:
            url, health_url, route = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{health_port}", "/readyz"
            ports = {"GATEWAY_PORT": str(port), "HEALTH_PORT": str(health_port)}
        child = Child(name, self.logs / f"{name}.log")
        self.stack.push_async_callback(child.stop)
        await child.start(service_environment({**self.settings, **ports, **own}))
        self.urls[name] = url
        self.children[name] = child

        async def is_ready() -> bool:
            try:
                async with self.client.get(health_url + route) as answer:
                    assert answer.status == 200, await answer.text()
                    return True
            except aiohttp.ClientConnectionError:
                return False

        await eventually(is_ready, timeout=40)

    async def get(self, path: str, subject: str = "demo") -> Any:
        """Return the gateway's answer to a user, with exact decimals."""
        token = minted_token(
            TokenSettings.model_validate({"jwt_secret": JWT_SECRET}),
            subject,
            now=utc_now(),
            lifetime=TOKEN_LIFETIME,
        )
        headers = {"Authorization": f"Bearer {token}"}
        async with self.client.get(self.urls["api_gateway"] + path, headers=headers) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            return exact(text)

    async def set_replay(self, **clock: object) -> None:
        async with self.client.put(f"{self.urls['market_simulator']}/simulator/clock", json=clock) as answer:
            assert answer.status == 200, await answer.text()


def exact(text: str) -> Any:
    """Read JSON with its numbers as they are written."""

    return json.loads(text, parse_float=Decimal)


@asynccontextmanager
async def system(database_url: str, nats_url: str, logs: Path) -> AsyncIterator[System]:
    """Make a system of which nothing runs yet; whatever is started is stopped at the end, last first.

    What its services say on the bus must be what docs/asyncapi.yaml says.
    """
    async with (
        overhearing(nats_url),
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as client,
        AsyncExitStack() as stack,
    ):
        yield System(
            database_url,
            nats_url,
            logs,
            client,
            stack,
            {
                "DATABASE_URL": database_url,
                "NATS_URL": nats_url,
                "JWT_SECRET": JWT_SECRET,
                "HEALTH_HOST": "127.0.0.1",
                "GATEWAY_HOST": "127.0.0.1",
                "ALPACA_API_KEY": "simulated",
                "ALPACA_SECRET_KEY": "simulated",
                "PRICE_UPDATE_INTERVAL_SECONDS": "0.5",
                "SNAPSHOT_INTERVAL_MINUTES": "0.05",
            },
        )
