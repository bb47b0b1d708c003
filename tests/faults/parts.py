"""The parts of a system: real processes, to be killed, frozen and stopped, that come up again by themselves."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import psutil

from local.servers import NatsNode, Server, ServerFailed, child_command, nats_server, postgres, replica_of
from local.settings import ROOT
from tests.faults import tampered
from tests.waiting import eventually

LOOK_SECONDS = 0.05
RESTART_PAUSE_SECONDS = 0.2
"""As long as a container engine waits before it starts anew what has ended."""
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 15.0
ASK_SECONDS_MAX = 3.0
KILLED, FROZEN, STOPPING = "killed", "frozen", "stopping"
DEADLY = {each.__name__ for each in (tampered.die_before_acknowledging, tampered.die_before_publishing)}
"""Of what is done to services on purpose, that by which they kill themselves."""
NOT_STOPPED = "not stopped in time, and killed"


@dataclass
class Spell:
    """A stretch of time in which a part was dead, frozen or stopping; times are of `time.monotonic`."""

    why: str
    began_at: float
    ended_at: float | None = None

    def overlaps(self, began_at: float, ended_at: float, *, after_seconds: float = 0.0) -> bool:
        """Tell whether it was under way between two moments, or had ended at most so long before."""
        return self.began_at <= ended_at and (
            self.ended_at is None or began_at <= self.ended_at + after_seconds
        )


@dataclass(frozen=True)
class End:
    """How a process ended, and why it may have."""

    code: int
    """Negative for a signal."""
    after: frozenset[str]
    """What had befallen it: why its spells came over it."""


@dataclass
class Part(ABC):
    """A process that is started again whenever it ends, until it is not wanted any more."""

    name: str
    spells: list[Spell] = field(default_factory=list)
    overloads: list[Spell] = field(default_factory=list)
    """When it had so much to do that it might refuse, but not fall silent."""
    ends: list[End] = field(default_factory=list)
    """Of each process that ended."""
    stop_seconds_max: float = STOP_SECONDS_MAX
    """What it may take to stop when it is asked to; then it is killed."""
    process: "subprocess.Popen[bytes] | None" = None
    _wanted: bool = False
    _watching: asyncio.Task[None] | None = None
    _struck: "subprocess.Popen[bytes] | None" = None
    """The process that the present spell befell."""
    _befallen: set[str] = field(default_factory=set)
    """Why spells came over the present process."""
    _is_frozen: bool = False

    @abstractmethod
    async def _launch(self) -> "subprocess.Popen[bytes]":
        """Start the process."""

    @abstractmethod
    async def is_ready(self) -> bool:
        """Tell whether it can do its work."""

    async def _clean_up(self) -> None:  # noqa: B027  # most leave nothing
        """Clear away what a process that has ended left behind."""

    def pids(self) -> list[int]:
        """Return the ids of its processes, the one that starts the others first."""
        return [self.process.pid] if self.process is not None and self.process.poll() is None else []

    @property
    def exit_codes(self) -> list[int]:
        """Of each process that ended, negative for a signal."""
        return [end.code for end in self.ends]

    # ---- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start it, and keep it running."""
        self._wanted = True
        self._begin("starting")
        await self._launch_anew()
        self._watching = asyncio.create_task(self._keep_running())

    async def wait_until_ready(self, seconds_max: float = START_SECONDS_MAX) -> None:
        """Wait until it is ready and nothing is the matter with it."""

        async def is_well() -> bool:
            return self.spell is None and await self.is_ready()

        try:
            await eventually(is_well, timeout=seconds_max, every=LOOK_SECONDS)
        except AssertionError:
            raise AssertionError(f"{self.name} was not ready within {seconds_max:g} s") from None

    async def end(self) -> int | None:
        """Let it stop, for good; return its exit code, None when it had to be killed."""
        self._wanted = False
        self.thaw()
        code = await self.terminate()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._clean_up()
        return code

    async def _keep_running(self) -> None:
        """Start it anew when it has ended, and note when it is ready again."""
        while self._wanted:
            assert self.process is not None
            code = self.process.poll()
            if code is not None:
                self.ends.append(End(code, frozenset(self._befallen)))
                if self.spell is None:
                    self._begin(f"ended by itself with {code}")
                await self._clean_up()
                await asyncio.sleep(RESTART_PAUSE_SECONDS)
                if self._wanted:
                    await self._launch_anew()
            elif self.spell is not None and self.process is not self._struck and await self.is_ready():
                self._heal()
            await asyncio.sleep(LOOK_SECONDS)

    async def _launch_anew(self) -> None:
        self._befallen.clear()
        self._is_frozen = False
        self.process = await self._launch()

    # ---- faults ----------------------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Tell whether it is gone for good."""
        return not self._wanted

    @property
    def spell(self) -> Spell | None:
        """What is the matter with it now."""
        return self.spells[-1] if self.spells and self.spells[-1].ended_at is None else None

    def kill(self) -> None:
        """Kill it with SIGKILL; it is started anew."""
        self._begin(KILLED)
        for pid in self.pids()[:1]:
            os.kill(pid, signal.SIGKILL)

    def lose(self) -> None:
        """Kill it for good, as a machine that is lost."""
        self._wanted = False
        self.kill()

    def freeze(self) -> None:
        """Stop it in its tracks, until `thaw`."""
        self._begin(FROZEN)
        self._is_frozen = True
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._is_frozen = False
        for pid in reversed(self.pids()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        if self.spell is not None and self.spell.why == FROZEN:
            self._heal()

    async def terminate(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Ask it to stop, and wait; return its exit code, None when it had to be killed. It is started anew."""
        process = self.process
        if process is None or process.poll() is not None:
            return None if process is None else process.returncode
        self._begin(STOPPING)
        process.send_signal(number)
        deadline = time.monotonic() + self.stop_seconds_max
        while process.poll() is None:
            if self._is_frozen:  # what is frozen cannot stop, and hears of it when it goes on
                deadline = time.monotonic() + self.stop_seconds_max
            elif time.monotonic() > deadline:
                self._begin(NOT_STOPPED)
                process.kill()
                await asyncio.to_thread(process.wait)
                return None
            await asyncio.sleep(LOOK_SECONDS)
        return process.returncode

    def _begin(self, why: str) -> None:
        if self.spell is not None:
            self._heal()
        self.spells.append(Spell(why, time.monotonic()))
        self._befallen.add(why)
        self._struck = self.process

    def _heal(self) -> None:
        assert self.spell is not None
        self.spell.ended_at = time.monotonic()


@dataclass
class Service(Part):
    """A service as a process of its own."""

    module: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()
    health_url: str = ""
    http: aiohttp.ClientSession | None = None
    ready_path: str = "readyz"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    async def _launch(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as output:
            return subprocess.Popen(
                child_command([sys.executable, "-m", *self.module.split()]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=dict(self.environment),
                start_new_session=True,
            )

    async def is_ready(self) -> bool:
        status, _ = await self.ask(self.ready_path)
        return status == 200

    @property
    def kills_itself(self) -> bool:
        """Tell whether it was tampered with so that the first replica to come to some point dies there."""
        _, _, tampering = self.module.partition("tests.faults.tampered ")
        return bool(DEADLY.intersection(tampering.partition(" ")[0].split(",")))

    def last_error(self) -> str:
        """Return what its log has last of level error, or at all."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if '"level":"error"' in line.replace(" ", "")] or lines
        return errors[-1][:500] if errors else "its log says nothing"

    async def ask(self, path: str) -> tuple[int, str]:
        """Return status and text of an address on the health port; status 0 when there is no answer."""
        assert self.http is not None
        try:
            async with self.http.get(
                f"{self.health_url}/{path}",
                headers={"Connection": "close"},  # else it is a task of the service for 15 s, and no leak
                timeout=aiohttp.ClientTimeout(total=ASK_SECONDS_MAX),
            ) as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return 0, ""


@dataclass
class _Embedded(Part):
    """A server from a wheel; it comes up again on the same port, with the same data."""

    folder: Path = Path()
    port: int = 0
    server: Server | None = None
    _context: AbstractContextManager[Server] | None = None

    @abstractmethod
    def _open(self) -> AbstractContextManager[Server]: ...

    @property
    def url(self) -> str:
        assert self.server is not None
        return self.server.url

    async def _launch(self) -> "subprocess.Popen[bytes]":
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            self._context = self._open()
            try:
                self.server = await asyncio.to_thread(self._context.__enter__)
            except ServerFailed:  # after a kill its processes may still hold the data, or the port
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RESTART_PAUSE_SECONDS)
            else:
                return self.server.process

    async def _clean_up(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            await asyncio.to_thread(context.__exit__, None, None, None)

    async def is_ready(self) -> bool:
        return await _accepts(self.port)


@dataclass
class Postgres(_Embedded):
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def _open(self) -> AbstractContextManager[Server]:
        return postgres(self.folder, settings=self.settings, port=self.port, environment=self.environment)

    async def is_ready(self) -> bool:
        try:
            connection = await asyncpg.connect(self.url, timeout=ASK_SECONDS_MAX)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        connection.terminate()
        return True

    def pids(self) -> list[int]:
        """Return the postmaster and its children: one that is frozen alone only lets nobody in."""
        found = super().pids()
        if found:
            with suppress(psutil.NoSuchProcess):
                found += [child.pid for child in psutil.Process(found[0]).children(recursive=True)]
        return found

    async def terminate(self, number: signal.Signals = signal.SIGINT) -> int | None:
        """Shut it down fast: clients are cut off, everything is written."""
        return await super().terminate(number)


@dataclass
class Nats(_Embedded):
    def _open(self) -> AbstractContextManager[Server]:
        return nats_server(self.folder, port=self.port)


@dataclass
class Replica(Postgres):
    """A streaming replica, to be promoted."""

    primary: Postgres | None = None

    def _open(self) -> AbstractContextManager[Server]:
        assert self.primary is not None
        assert self.primary.server is not None
        return replica_of(self.primary.server, self.folder, settings=self.settings)


@dataclass
class NatsMember(Part):
    """A server of a cluster."""

    node: NatsNode | None = None

    @property
    def _node(self) -> NatsNode:
        assert self.node is not None
        return self.node

    @property
    def url(self) -> str:
        return self._node.url

    async def _launch(self) -> "subprocess.Popen[bytes]":
        if self._node.process is None:  # of a new cluster it runs already
            await asyncio.to_thread(self._node.start)
        assert self._node.process is not None
        return self._node.process

    async def _clean_up(self) -> None:
        await asyncio.to_thread(self._node.stop)

    async def is_ready(self) -> bool:
        return await _accepts(urlsplit(self.url).port or 0)


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), ASK_SECONDS_MAX)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


@asynccontextmanager
async def frozen(part: Part) -> AsyncIterator[None]:
    """Freeze a part while the block runs."""
    part.freeze()
    try:
        yield
    finally:
        part.thaw()
