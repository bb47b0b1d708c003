"""A market simulator that really listens, in the test's own process, and clients for it."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession
from alpaca.data.historical import CryptoHistoricalDataClient, StockHistoricalDataClient
from alpaca.trading.client import TradingClient
from jsonschema import Draft4Validator, FormatChecker

from services.market_simulator.server import serving
from services.market_simulator.settings import Settings
from services.market_simulator.simulator import Simulator, build

KEYS = {"APCA-API-KEY-ID": "key", "APCA-API-SECRET-KEY": "secret"}
_FORMATS = FormatChecker(formats=["date"])  # date-time would need another package: it is below


@_FORMATS.checks("date-time")
def _is_rfc3339(value: object) -> bool:
    instant = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)"
    return not isinstance(value, str) or re.fullmatch(instant, value) is not None


RECORDED_WEEK = "minute-bars-2013-10-04-to-11.csv.gz"


@dataclass(frozen=True)
class SimulatedMarket:
    url: str
    simulator: Simulator
    http: ClientSession

    async def get(self, path: str, *, status: int = 200) -> Any:
        """Return the JSON of an answer, which must have the status and say that it is simulated."""
        async with self.http.get(self.url + path, headers=KEYS) as response:
            assert response.status == status, await response.text()
            assert response.headers["X-Market-Simulated"] == "true"
            return await response.json()

    async def control(self, method: str, path: str, body: object = None, *, status: int = 200) -> Any:
        """Use a control and return its answer."""
        async with self.http.request(method, f"{self.url}/simulator/{path}", json=body) as response:
            assert response.status == status, await response.text()
            return await response.json()

    async def order(self, kind: str, **parameters: object) -> None:
        """Order a fault."""
        await self.control("POST", "faults", {"kind": kind, **parameters}, status=201)


@asynccontextmanager
async def simulated_market(**settings: Any) -> AsyncIterator[SimulatedMarket]:
    """Serve a market while the block runs; settings are named without `simulator_`."""
    chosen = Settings(**{f"simulator_{name}": value for name, value in settings.items()})
    simulator = build(chosen)
    async with serving(simulator, "127.0.0.1", 0) as url, ClientSession() as http:
        yield SimulatedMarket(url, simulator, http)


@asynccontextmanager
async def replayed_week(shared_folder: Path, at: str) -> AsyncIterator[SimulatedMarket]:
    """Serve the recorded week of October 2013, frozen at an instant."""
    file = shared_folder / "market-data" / RECORDED_WEEK
    async with simulated_market(replay_file=file, replay_start=at, replay_speed=0) as market:
        yield market


@dataclass(frozen=True)
class AlpacaClients:
    """alpaca-py's own clients; they block, so call them in a thread. Its types say "model or raw data" everywhere."""

    stocks: Any
    crypto: Any
    trading: Any


@contextmanager
def alpaca_clients(url: str) -> Iterator[AlpacaClients]:
    clients = AlpacaClients(
        stocks=StockHistoricalDataClient("key", "secret", url_override=url),
        crypto=CryptoHistoricalDataClient(url_override=url),
        trading=TradingClient("key", "secret", url_override=url),
    )
    try:
        yield clients
    finally:
        for client in (clients.stocks, clients.crypto, clients.trading):
            client._session.close()


def validate(shared_folder: Path, document: str, schema: str, payload: object) -> None:
    """Check an answer against a response schema of Alpaca's published description."""
    described = _with_nullable(json.loads((shared_folder / "alpaca" / f"{document}.json").read_text()))
    assert schema in described["components"]["schemas"]
    checker = Draft4Validator(
        {"$ref": f"#/components/schemas/{schema}", "components": described["components"]},
        format_checker=_FORMATS,
    )
    checker.validate(payload)


def _with_nullable(node: Any) -> Any:
    """Say OpenAPI 3.0's `nullable` in JSON Schema's words."""
    if isinstance(node, dict):
        changed = {key: _with_nullable(value) for key, value in node.items()}
        if changed.pop("nullable", False) is True and isinstance(changed.get("type"), str):
            changed["type"] = [changed["type"], "null"]
        return changed
    return [_with_nullable(value) for value in node] if isinstance(node, list) else node
