"""Which of the servers that a URL names is the primary: found, followed through a failover, and an old one shunned.

A promotion begins a new timeline. Of several servers that say they are the primary, the one on the latest timeline is;
one on an earlier timeline than was ever seen is an old primary that came back, and nothing is read from it or written
to it.
"""

import asyncio
import time
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit
from weakref import WeakKeyDictionary, WeakValueDictionary

import asyncpg
from asyncpg.connect_utils import SessionAttribute
from prometheus_client import Counter

from shared import logs

HOST_SECONDS_MAX = 0.8
"""What one of several servers may take to let us in: one that is frozen or cut off must not keep us from the next."""
LOOK_SECONDS = 1.0
"""Between two looks for another primary, at least."""
PORT = 5432

ServerConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# Of a server that says it is the primary. Its timeline is in the names of its log files.
STANDING = """
SELECT
    (SELECT system_identifier FROM pg_control_system()) AS cluster,
    ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::integer AS timeline
"""

primaries_followed = Counter("database_primary_changes", "Times that another server became the primary")
log = logs.get_logger()


class NoPrimary(Exception):
    """None of the servers is the primary; the text says of each why it is not."""


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Standing(NamedTuple):
    """Which cluster a primary has, and since which promotion."""

    cluster: int
    timeline: int


# What a server says that is there and lets nobody in: no other one would do instead.
_REFUSED = (
    asyncpg.InsufficientResourcesError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
# What connecting to one of several servers may fail with: another one may do.
_ELSEWHERE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InternalClientError, NoPrimary)


class Hosts:
    """The servers of one URL, and what is known of them. With a single server it is taken for the primary as it is."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.addresses = addresses(url)
        self._primary: Address | None = None
        self._known: Standing | None = None
        self._problem = ""
        self._refusal: Exception | None = None
        """What a server said that is there and lets nobody in, while no other one is the primary."""
        self._made: WeakKeyDictionary[ServerConnection, Standing] = WeakKeyDictionary()
        self._asking = asyncio.Lock()
        self._asked_at = 0.0

    @property
    def are_several(self) -> bool:
        return len(self.addresses) > 1

    async def connect(self, *, timeout: float, **options: Any) -> ServerConnection:
        """Connect to the primary within `timeout` seconds; `options` are asyncpg's.

        Raises NoPrimary, or what a server said that let nobody in. The connection is ended when another server becomes
        the primary.
        """
        if not self.are_several:
            return await asyncpg.connect(self._url, timeout=timeout, **options)
        async with asyncio.timeout(timeout):
            if self._primary is not None:
                try:
                    return await self._connect_to(self._primary, options)
                except _REFUSED:
                    raise
                except _ELSEWHERE:
                    pass
            return await self._connect_to(await self._find(), options)

    async def look(self) -> None:
        """See whether another server has become the primary; with doubts about the one that there was."""
        if self.are_several and time.monotonic() - self._asked_at >= LOOK_SECONDS:
            with suppress(NoPrimary, *_REFUSED):
                await self._find()

    async def _find(self) -> Address:
        """Return the primary: all servers are asked at once, and once for all who want to know."""
        wanted_at = time.monotonic()
        async with self._asking:
            if self._asked_at < wanted_at:
                self._asked_at = time.monotonic()
                await self._ask_all()
        if self._primary is None:
            raise self._refusal or NoPrimary(self._problem)
        return self._primary

    async def _ask_all(self) -> None:
        asked = {asyncio.create_task(self._ask(address)): address for address in self.addresses}
        found: dict[Address, Standing] = {}
        problems: dict[Address, str] = dict.fromkeys(self.addresses, "no answer in time")
        refusal: Exception | None = None
        waiting, ends_at = set(asked), time.monotonic() + HOST_SECONDS_MAX
        try:
            # Nobody else can be newer than one that is newer than all before.
            while waiting and not any(self._is_new(standing) for standing in found.values()):
                seconds = max(ends_at - time.monotonic(), 0)
                answered, waiting = await asyncio.wait(
                    waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                )
                if not answered:
                    break
                for task in answered:
                    try:
                        found[asked[task]] = task.result()
                    except _ELSEWHERE as error:
                        problems[asked[task]] = str(error) or "no answer in time"
                        refusal = error if isinstance(error, _REFUSED) else refusal
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if found:
            self._follow(*max(found.items(), key=lambda each: (each[1].timeline, each[0] == self._primary)))
        else:
            self._primary, self._refusal = None, refusal
            self._problem = "no primary: " + ", ".join(
                f"{address} {problem}" for address, problem in problems.items()
            )

    async def _ask(self, address: Address) -> Standing:
        connection, standing = await self._open(address, {})
        connection.terminate()
        return standing

    async def _connect_to(self, address: Address, options: dict[str, Any]) -> ServerConnection:
        connection, standing = await self._open(address, options)
        if address != self._primary:  # another one was found meanwhile
            connection.terminate()
            raise NoPrimary(f"{address} was the primary")
        if standing != self._known:  # another server answers there
            self._follow(address, standing)
        self._made[connection] = standing
        return connection

    async def _open(self, address: Address, options: dict[str, Any]) -> tuple[ServerConnection, Standing]:
        """Connect to a server that is a primary and not an old one."""
        async with asyncio.timeout(HOST_SECONDS_MAX):
            # `primary` and not `read-write`: our own sessions may be read-only.
            try:
                connection = await asyncpg.connect(
                    self._url,
                    host=address.host,
                    port=address.port,
                    target_session_attrs=SessionAttribute.primary,
                    **options,
                )
            except asyncpg.TargetServerAttributeNotMatched as error:
                raise NoPrimary("is a replica") from error
            try:
                standing = await self._standing_of(connection)
            except BaseException:
                connection.terminate()
                raise
            return connection, standing

    async def _standing_of(self, connection: ServerConnection) -> Standing:
        try:
            row = await connection.fetchrow(STANDING)
        except (
            asyncpg.InterfaceError
        ) as error:  # the driver's word for a connection that ended before it was used
            raise ConnectionResetError(str(error)) from error
        assert row is not None
        standing = Standing(*row)
        if self._is_old(standing):
            raise NoPrimary(f"is an old primary, on timeline {standing.timeline}: shut it down")
        return standing

    def _is_new(self, standing: Standing) -> bool:
        return self._known is not None and standing.timeline > self._known.timeline

    def _is_old(self, standing: Standing) -> bool:
        """Tell whether there is a later primary; one of another cluster was put in its place by an operator."""
        known = self._known
        return known is not None and standing.cluster == known.cluster and standing.timeline < known.timeline

    def _follow(self, primary: Address, standing: Standing) -> None:
        known, self._known = self._known, standing
        self._primary = primary
        for connection in [made for made, its_standing in self._made.items() if its_standing != standing]:
            connection.terminate()
        if known is not None and known != standing:
            primaries_followed.inc()
            log.warning(
                "database_primary_changed",
                primary=str(primary),
                timeline=standing.timeline,
                advice="see that the old primary is shut down, then bring it back as a replica",
            )


_known: WeakValueDictionary[str, Hosts] = WeakValueDictionary()


def hosts_of(url: str) -> Hosts:
    """Return the servers of a URL: the same for all in this process, so that what one learns holds for all."""
    hosts = _known.get(url)
    if hosts is None:
        hosts = _known[url] = Hosts(url)
    return hosts


def addresses(url: str) -> tuple[Address, ...]:
    """Return where the servers of the URL are; raise ValueError for a port that is no number."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    hosts = parts.netloc.rpartition("@")[2] or query.get("host", [""])[-1]
    ports = query.get("port", [str(PORT)])[-1].split(",")
    named = [part.strip() for part in hosts.split(",")]
    if len(ports) != len(named):
        ports = ports[:1] * len(named)
    return tuple(_address(host, port) for host, port in zip(named, ports, strict=True))


def _address(host: str, default_port: str) -> Address:
    if host.startswith("["):  # IPv6
        name, _, port = host[1:].partition("]")
        port = port.removeprefix(":")
    else:
        name, _, port = host.partition(":")
    return Address(unquote(name), int(port or default_port))
