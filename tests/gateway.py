"""A gateway for tests: the real application on a free port, and tokens for it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import jwt
from pydantic import SecretStr

from services.api_gateway import app, auth, charts, pages, queries, replica
from services.api_gateway.performance import Buckets, MarketDays
from services.api_gateway.responses import ProblemDetails
from services.api_gateway.settings import Settings
from shared import database as databases
from shared import health
from shared.bus import Bus
from shared.clock import Now, utc_now
from shared.database import Database
from shared.market_calendar import Calendar
from shared.market_hours import MarketHours
from tests.market import open_now
from tests.waiting import eventually

POOL = "tested_gateway"
"""What its connections to PostgreSQL are called."""
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
    served: app.Served | None = None
    """What it has heard, unless it is another process."""

    @property
    def news(self) -> charts.News:
        assert self.served
        return self.served.news

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self.session.request(method, url, **options) as response:
            return Answer(response.status, response.headers, await response.text())

    async def says(self, check: str) -> str:
        """Return what a check of this process's gateway finds, in words."""
        assert self.served is not None
        return (await health.readiness(self.served.checks))[check]

    async def get(self, path: str, subject: str | None = "demo") -> Answer:
        return await self.ask("GET", path, headers=bearer(subject) if subject is not None else {})


@asynccontextmanager
async def kept_up(loaded: Settings, served: app.Served, bus: Bus, *, is_there: bool) -> AsyncIterator[None]:
    """Let the gateway hear bus and database while the block runs; from its first line on."""
    stop = asyncio.Event()
    keeping_up = asyncio.create_task(app.keep_up(loaded, served, bus, stop))

    async def hears() -> bool:
        return served.notifications.are_heard and (served.news.are_complete or not is_there)

    try:
        await eventually(hears)
        yield
    finally:
        stop.set()
        await keeping_up


@asynccontextmanager
async def running(
    database_url: str,
    *,
    bus: Bus | None = None,
    hours: MarketHours | None = None,
    hears: bool = True,
    now: Now = utc_now,
    chart_library: Path = pages.LIBRARY_FILE,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """Run a gateway; `settings` go on top of the defaults and a shared secret.

    Without a bus it keeps no chart, so that a test may write to the database and ask at once. Without `hours`
    the market is open, whenever the test runs; `now` is the time that the replicas have. Unless it `hears`, nobody
    need be there to be heard. A user may ask as often as the test likes.
    """
    keeping = {} if bus else {"gateway_chart_cache_megabytes": 0}
    trust = {} if "jwt_jwks_url" in settings else {"jwt_secret": SecretStr(SECRET)}
    loaded = Settings(
        database_url=SecretStr(database_url),
        gateway_host="127.0.0.1",
        gateway_port=0,
        **{"user_requests_per_second": 0, **trust, **keeping, **settings},
    )
    used_bus = bus or Bus("nats://127.0.0.1:9", name="tests")  # which is not entered, and never connects
    async with (
        databases.connect(
            database_url,
            application_name=POOL,
            connections_max=loaded.gateway_database_connections,
            statement_timeout_seconds=databases.STATEMENT_TIMEOUT_SECONDS,
            server_settings=queries.SERVER_SETTINGS,
            reads_only=True,
        ) as database,
        auth.verifier(loaded) as verifier,
        replica.reading(loaded, database) as source,
        app.serving(
            loaded,
            app.Resources(
                source, verifier, used_bus, Calendar(hours or open_now()), _checks(database, source), now
            ),
            chart_library=chart_library,
        ) as served,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        kept_up(loaded, served, used_bus, is_there=bus is not None) if hears else nullcontext(),
    ):
        yield Gateway(served.port, session, served)


def _checks(database: Database, source: Database | replica.Reads) -> Mapping[str, health.Check]:
    return {"postgres": database.check} | (
        {"read_replica": source.check} if isinstance(source, replica.Reads) else {}
    )


async def series_of(
    source: queries.Source,
    user_id: int,
    window: Buckets | MarketDays,
    market_timezone: str = "America/New_York",
) -> queries.Series:
    """Return the series of a user whose subject the test need not know."""
    row = await source.fetch_row("SELECT subject FROM users WHERE id = $1", user_id)
    assert row is not None
    found = await queries.chart(source, row["subject"], window, market_timezone)
    assert found is not None
    assert found[0].user_id == user_id
    return found[1]
