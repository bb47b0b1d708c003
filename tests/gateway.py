"""A gateway for tests: the real application on a free port, and tokens for it."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import aiohttp
import jwt
from pydantic import SecretStr

from services.api_gateway import app, auth, queries
from services.api_gateway.responses import ProblemDetails
from services.api_gateway.settings import Settings
from shared import database as databases

SECRET = "a secret of more than thirty-two bytes"


def token(subject: str = "demo", *, secret: str = SECRET, expires_in: float = 600, **claims: Any) -> str:
    """Return an HS256 token; a claim given as None is left out."""
    wanted = {"sub": subject, "exp": int(time.time() + expires_in)} | claims
    return jwt.encode({name: value for name, value in wanted.items() if value is not None}, secret, "HS256")


def bearer(subject: str = "demo") -> dict[str, str]:
    return {"Authorization": f"Bearer {token(subject)}"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:
        """Parse with every number as the decimal that was written."""
        return json.loads(self.text, parse_float=Decimal)

    def problem(self) -> ProblemDetails:
        """Check that this is problem details, and return them."""
        assert self.headers["Content-Type"] == "application/problem+json"
        details = ProblemDetails.model_validate_json(self.text)
        assert details.status == self.status
        assert details.request_id == self.headers["X-Request-Id"]
        return details


@dataclass(frozen=True)
class Gateway:
    port: int
    session: aiohttp.ClientSession

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self.session.request(method, url, **options) as response:
            return Answer(response.status, response.headers, await response.text())

    async def get(self, path: str, subject: str | None = "demo") -> Answer:
        return await self.ask("GET", path, headers=bearer(subject) if subject is not None else {})


@asynccontextmanager
async def running(database_url: str, **settings: Any) -> AsyncIterator[Gateway]:
    """Run a gateway; `settings` go on top of the defaults and a shared secret."""
    trust = {} if "jwt_jwks_url" in settings else {"jwt_secret": SecretStr(SECRET)}
    loaded = Settings(
        database_url=SecretStr(database_url),
        gateway_host="127.0.0.1",
        gateway_port=0,
        **{**trust, **settings},
    )
    async with (
        databases.connect(
            database_url,
            application_name="tests",
            connections_max=loaded.gateway_database_connections,
            statement_timeout_seconds=databases.STATEMENT_TIMEOUT_SECONDS,
            server_settings=queries.SERVER_SETTINGS,
            reads_only=True,
        ) as database,
        auth.verifier(loaded) as verifier,
        app.serving(loaded, database, verifier, {"postgres": database.check}) as port,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        yield Gateway(port, session)
