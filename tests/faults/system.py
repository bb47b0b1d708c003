"""A whole system: servers, a simulated market and two replicas of every service, on free ports of this machine."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import asyncpg
import jwt

from local.servers import joined_url, kept_secret, nats_cluster, replicate_synchronously
from local.settings import ROOT, SIMULATED_KEYS, free_port
from shared.clock import utc_now
from tests.faults import audit
from tests.faults.clocks import Clock
from tests.faults.links import Link
from tests.faults.parts import Nats, NatsMember, Part, Postgres, Replica, Service
from tests.faults.population import UNKNOWN_SYMBOL, Population
from tests.faults.proxy import proxied
from tests.waiting import eventually

REPLICAS = 2
SLOT = timedelta(seconds=1)
SHARDS = 2
LATE_SECONDS_MAX = 600
MARKET_SEED = 7
SERVICES = ("price_feeder", "snapshotter", "api_gateway")
READER = "reader"
POSTGRES = "postgres"
TARGETS = {
    POSTGRES: ("DATABASE_URL",),
    "nats": ("NATS_URL",),
    "market": ("ALPACA_DATA_URL", "ALPACA_BASE_URL", "ALPACA_STREAM_URL"),
}
"""What a service may have a link to, and the settings that lead there."""


@dataclass
class System:
    """What runs, and where."""

    folder: Path
    population: Population
    postgres_servers: list[Postgres]
    """The primary, and after it its replica if there is one."""
    nats_servers: Sequence[Nats | NatsMember]
    market: Service
    services: dict[str, list[Service]]
    http: aiohttp.ClientSession
    gateway_ports: dict[str, int]
    """Where readers ask; by way of a proxy if there are links."""
    jwt_secret: str
    links: list[Link] = field(default_factory=list)
    """Each passes through a proxy; none unless the options want them."""
    clocks: dict[str, Clock] = field(default_factory=dict)
    """Of PostgreSQL, the market and the services, by name; none unless the options want them."""
    ahead: timedelta = timedelta(0)
    """How far the system's time is ahead of that of this process."""

    def now(self) -> datetime:
        """Return the time of the system."""
        return utc_now() + self.ahead

    @property
    def postgres(self) -> Postgres:
        """The primary; after its loss the replica that was promoted."""
        return self.postgres_servers[0]

    @property
    def nats(self) -> Nats | NatsMember:
        """The only server, or one of the cluster."""
        return self.nats_servers[0]

    @property
    def database_url(self) -> str:
        """The URL by which the primary is found, whichever server that is."""
        return _database_url(self.postgres_servers)

    @property
    def nats_urls(self) -> list[str]:
        return [server.url for server in self.nats_servers]

    @property
    def servers(self) -> list[Part]:
        return [*self.postgres_servers, *self.nats_servers]

    @property
    def parts(self) -> list[Part]:
        return [*self.servers, self.market, *self.all_services]

    @property
    def all_services(self) -> list[Service]:
        return [service for replicas in self.services.values() for service in replicas]

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def token(self, subject: str, *, lasts_seconds: int = 60) -> str:
        """Return a bearer token that the gateways trust."""
        return jwt.encode({"sub": subject, "exp": int(time.time()) + lasts_seconds}, self.jwt_secret, "HS256")

    def links_of(self, kind: str, target: str) -> list[Link]:
        """Return the links from all replicas of a service, or from the readers to all replicas of one."""
        return [link for link in self.links if link.joins(kind, target)]

    async def heal(self, parts: Iterable[Part] | None = None) -> None:
        """Thaw what is frozen, mend every link, set every clock right, and wait until everything is ready."""
        for link in self.links:
            await link.heal()
        for clock in self.clocks.values():
            clock.set_ahead(self.ahead)
        there = [part for part in parts or self.parts if not part.is_lost]
        for part in there:
            part.thaw()
        for part in there:
            await part.wait_until_ready()


@dataclass(frozen=True)
class Options:
    """What is different from the usual system."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Of all services."""
    wrapper: Mapping[str, str] = field(default_factory=dict)
    """By service, what runs it instead of its own module: a broken one, say."""
    postgres_settings: Mapping[str, str] = field(default_factory=dict)
    replicas: int = REPLICAS
    postgres_replica: bool = False
    """Whether PostgreSQL has a synchronous streaming replica."""
    nats_nodes: int = 1
    has_links: bool = False
    """Whether every connection between two parts, and from the readers, passes through a proxy."""
    clocks_ahead: timedelta | None = None
    """How far the time of the system is ahead; None: nobody's clock can be set."""


@asynccontextmanager
async def running(
    folder: Path, population: Population, options: Options | None = None
) -> AsyncIterator[System]:
    """Run a system with this population while the block runs; everything is ready when it begins."""
    options = options or Options()
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        clocks = _clocks(folder / "clocks", options)
        postgres_servers = await _postgres(
            folder, options, clocks["postgres"].environment if clocks else {}, stack
        )
        nats_servers = await _nats(folder, options, stack)
        postgres = postgres_servers[0]
        await asyncio.to_thread(_migrate, postgres.url)
        await audit.install(postgres.url)
        await population.insert(postgres.url)
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        market_port, jwt_secret = free_port(), kept_secret(folder / "jwt_secret")
        nats_url = ",".join(server.url for server in nats_servers)
        database_url = _services_database_url(postgres_servers)
        environment = _common(database_url, nats_url, market_port, jwt_secret) | dict(options.environment)
        services, gateway_ports = _services(logs, options, http, environment)
        links = await _link(stack, services, gateway_ports) if options.has_links else []
        market = Service(
            "market",
            module="services.market_simulator",
            environment=environment,
            folder=logs,
            health_url=f"http://127.0.0.1:{market_port}",
            http=http,
            ready_path="healthz",
        )
        for service in (market, *(each for replicas in services.values() for each in replicas)):
            if clocks:
                service.environment = {**service.environment, **clocks[service.name].environment}
        system = System(
            folder,
            population,
            postgres_servers,
            nats_servers,
            market,
            services,
            http,
            gateway_ports,
            jwt_secret,
            links=links,
            clocks=clocks,
            ahead=options.clocks_ahead or timedelta(0),
        )
        stack.push_async_callback(_end, [system.market, *system.all_services])
        early = [system.market, *system.services["price_feeder"], *system.services["api_gateway"]]
        for service in early:
            await service.start()
        await system.heal([*system.servers, *early])
        await _wait_for_prices(postgres.url, population)
        # Prices first: else the first snapshots would be without them.
        for service in system.services["snapshotter"]:
            await service.start()
        await system.heal()
        yield system


async def _wait_for_prices(database_url: str, population: Population) -> None:
    """Wait until every symbol that has a price has one."""
    wanted = {symbol for user in population.users for symbol in user.shares} - {UNKNOWN_SYMBOL}
    connection = await asyncpg.connect(database_url)

    async def are_there() -> bool:
        return wanted <= {row["symbol"] for row in await connection.fetch("SELECT symbol FROM asset_prices")}

    try:
        await eventually(are_there, timeout=30)
    finally:
        await connection.close()


async def _postgres(
    folder: Path, options: Options, environment: Mapping[str, str], stack: AsyncExitStack
) -> list[Postgres]:
    """Start PostgreSQL, and its replica if there is to be one."""
    primary = Postgres(
        "postgres",
        folder=folder / "postgres",
        port=free_port(),
        settings=options.postgres_settings,
        environment=environment,
    )
    await primary.start()
    stack.push_async_callback(primary.end)
    if not options.postgres_replica:
        return [primary]
    replica = Replica("postgres-replica", folder=folder / "replica", primary=primary)
    await replica.start()
    stack.push_async_callback(replica.end)
    assert primary.server is not None
    await asyncio.to_thread(replicate_synchronously, primary.server)
    return [primary, replica]


async def _nats(folder: Path, options: Options, stack: AsyncExitStack) -> Sequence[Nats | NatsMember]:
    """Start NATS, one server or a cluster."""
    if options.nats_nodes == 1:
        server = Nats("nats", folder=folder / "nats", port=free_port())
        await server.start()
        stack.push_async_callback(server.end)
        return [server]
    nodes = stack.enter_context(nats_cluster(folder / "nats", options.nats_nodes))
    members = [NatsMember(node.name, node=node) for node in nodes]
    for member in members:
        await member.start()
        stack.push_async_callback(member.end)
    return members


def _services_database_url(servers: Sequence[Postgres]) -> str:
    return joined_url(*(server.server for server in servers if server.server is not None))


def _database_url(servers: Sequence[Postgres]) -> str:
    """Return the URL for asyncpg itself, which is to look for the primary among several."""
    url = _services_database_url(servers)
    return url if len(servers) == 1 else f"{url}?target_session_attrs=primary"


async def _end(services: Sequence[Service]) -> None:
    await asyncio.gather(*(service.end() for service in reversed(services)))


def _services(
    folder: Path,
    options: Options,
    http: aiohttp.ClientSession,
    common: Mapping[str, str],
) -> tuple[dict[str, list[Service]], dict[str, int]]:
    """Return the services by kind, not started, and the ports of the gateways."""
    services: dict[str, list[Service]] = {kind: [] for kind in SERVICES}
    gateway_ports = {}
    for kind, replicas in services.items():
        for number in range(1, options.replicas + 1):
            name, health_port = f"{kind}-{number}", free_port()
            own = {"HEALTH_PORT": str(health_port)}
            if kind == "api_gateway":
                gateway_ports[name] = free_port()
                own["GATEWAY_PORT"] = str(gateway_ports[name])
            replicas.append(
                Service(
                    name,
                    module=options.wrapper.get(kind, f"services.{kind}"),
                    environment={**common, **own},
                    folder=folder,
                    health_url=f"http://127.0.0.1:{health_port}",
                    http=http,
                )
            )
    return services, gateway_ports


def _clocks(folder: Path, options: Options) -> dict[str, Clock]:
    """Return a clock for each part that can have one, by its name."""
    if options.clocks_ahead is None:
        return {}
    services = [f"{kind}-{number}" for kind in SERVICES for number in range(1, options.replicas + 1)]
    clocks = {name: Clock(folder / name) for name in ("postgres", "market", *services)}
    for clock in clocks.values():
        clock.set_ahead(options.clocks_ahead)
    return clocks


async def _link(
    stack: AsyncExitStack, services: Mapping[str, Sequence[Service]], gateway_ports: dict[str, int]
) -> list[Link]:
    """Put a proxy between each service and what it connects to, and between the readers and each gateway."""
    links: list[Link] = []
    for kind, replicas in services.items():
        for service in replicas:
            changed = dict(service.environment)
            for target, settings in TARGETS.items():
                if target == "market" and kind != "price_feeder":
                    continue
                url = urlsplit(changed[settings[0]])
                assert url.port is not None
                proxy = await stack.enter_async_context(proxied(url.port, seed=len(links)))
                links.append(Link(service.name, target, proxy))
                for setting in settings:
                    changed[setting] = _with_port(changed[setting], proxy.port)
            service.environment = changed
    for gateway, port in gateway_ports.items():
        proxy = await stack.enter_async_context(proxied(port, seed=len(links)))
        links.append(Link(READER, gateway, proxy))
        gateway_ports[gateway] = proxy.port
    return links


def _with_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))


def _common(database_url: str, nats_url: str, market_port: int, jwt_secret: str) -> dict[str, str]:
    """Return the environment of all services."""
    market_url = f"http://127.0.0.1:{market_port}"
    return {
        "PATH": os.environ["PATH"],
        "PYTHONUNBUFFERED": "1",
        "DATABASE_URL": database_url,
        "NATS_URL": nats_url,
        "NATS_STREAM_REPLICAS": "3" if "," in nats_url else "1",
        **SIMULATED_KEYS,
        "ALPACA_DATA_URL": market_url,
        "ALPACA_BASE_URL": market_url,
        "ALPACA_STREAM_URL": market_url.replace("http", "ws", 1),
        "ALPACA_REQUESTS_PER_MINUTE": "6000",
        "PRICE_UPDATE_INTERVAL_SECONDS": "1",
        "SNAPSHOT_INTERVAL_MINUTES": f"{SLOT / timedelta(minutes=1):.10f}",
        "SNAPSHOT_LATE_SECONDS_MAX": str(LATE_SECONDS_MAX),
        "SNAPSHOT_SHARDS": str(SHARDS),
        "SIMULATOR_PORT": str(market_port),
        "SIMULATOR_SEED": str(MARKET_SEED),
        "SIMULATOR_RATE_LIMIT": "100000",
        "USER_REQUESTS_PER_SECOND": "0",
        "JWT_SECRET": jwt_secret,
        "HEALTH_HOST": "127.0.0.1",
        "GATEWAY_HOST": "127.0.0.1",
    }


def _migrate(database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": database_url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
