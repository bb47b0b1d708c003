"""What is measured, as processes of their own, and helpers that load and listen, so that they cost it nothing."""

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from local.settings import ROOT, service_environment

START_SECONDS_MAX = 30.0
ANSWER_SECONDS_MAX = 1800.0
_POLL_SECONDS = 0.05
_OPEN_FILES = 8192
_LINE_BYTES_MAX = 16 * 1024 * 1024


# ---- what is measured ----------------------------------------------------------------------------


@contextmanager
def running(module: str, environment: Mapping[str, str], *arguments: str) -> Iterator[psutil.Process]:
    """Run a module as a process for the block."""
    _raise_open_files()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=service_environment(environment),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(15)


async def wait_for_port(port: int) -> None:
    """Wait until something listens on a port of this machine."""

    async def listens() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    await wait_until(listens, f"something listens on port {port}", seconds_max=START_SECONDS_MAX)


async def wait_until(is_so: Callable[[], Awaitable[bool]], what: str, *, seconds_max: float) -> None:
    """Ask again and again; raises TimeoutError with `what` it was that did not come."""
    try:
        async with asyncio.timeout(seconds_max):
            while not await is_so():  # noqa: ASYNC110  # of another process no event can be had
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"after {seconds_max:g} s it is not so that {what}") from error


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU seconds that a process has used, in user and kernel mode."""
    times = process.cpu_times()
    return times.user + times.system


def memory_mb(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


# ---- helpers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Helper:
    """A process that is asked a question a line on its standard input."""

    process: asyncio.subprocess.Process

    @property
    def measured(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    async def ask(self, **question: object) -> dict[str, Any]:
        """Return the answer to a question; one question at a time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        line = await asyncio.wait_for(self.process.stdout.readline(), ANSWER_SECONDS_MAX)
        assert line, "the helper has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def helper(module: str, *arguments: str) -> AsyncIterator[Helper]:
    """Run a module as a helper for the block; it ends when its standard input does."""
    _raise_open_files()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES_MAX,
    )
    try:
        yield Helper(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), ANSWER_SECONDS_MAX)


async def answer_questions(answer: Callable[[dict[str, Any]], Awaitable[dict[str, object]]]) -> None:
    """Answer the questions on standard input until it ends; for helpers with an event loop."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await answer(json.loads(line))), flush=True)


def _raise_open_files() -> None:
    """Let this process and what it starts have a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
