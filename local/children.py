"""The services as child processes: started, heard, watched and stopped."""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from local.servers import child_command
from local.settings import ROOT
from local.terminal import say

STOP_SECONDS_MAX = 12.0
LOG_LINE_BYTES_MAX = 1024 * 1024
_SHOWN = {"warning", "error", "critical"}
_HIDDEN_KEYS = {"event", "level", "timestamp", "service", "exception"}


class Child:
    """A service as a child process; its log goes to a file, and what a person must see to the terminal."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.quiet = True
        """While true, warnings are not shown: a system that starts has some."""
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._last_error = "its log says nothing"

    async def start(self, environment: Mapping[str, str]) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *child_command([sys.executable, "-m", f"services.{self.name}"]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=ROOT,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C at the terminal is for the supervisor alone
            limit=LOG_LINE_BYTES_MAX,
        )
        self._listening = asyncio.create_task(self._listen())

    async def ended(self) -> str:
        """Wait for the process to end; return one line that says how it ended."""
        assert self._process is not None
        assert self._listening is not None
        code = await self._process.wait()
        await asyncio.wait({self._listening}, timeout=1.0)
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"{self.name} ended with {how}: {self._last_error} (log: {self._log})"

    async def stop(self) -> None:
        """Ask the process to stop, wait, and kill it if it does not."""
        if self._process is None or self._listening is None:
            return
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_SECONDS_MAX):
                    await self._process.wait()
            except TimeoutError:
                say(f"{self.name} did not stop within {STOP_SECONDS_MAX:g} s and was killed")
                self._process.kill()
                await self._process.wait()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._log.open("wb", buffering=0) as log:
            while True:
                try:
                    line = await self._process.stdout.readline()
                except ValueError:  # longer than any line of ours; the rest follows as the next ones
                    continue
                if not line:
                    return
                log.write(line)
                self._hear(line.decode(errors="replace").strip())

    def _hear(self, line: str) -> None:
        try:
            record = json.loads(line)
            level, event = str(record["level"]), str(record["event"])
        except (ValueError, KeyError, TypeError):
            if line:
                self._last_error = line
            return
        if level not in _SHOWN:
            return
        details = " ".join(f"{key}={value}" for key, value in record.items() if key not in _HIDDEN_KEYS)
        text = f"{event} {details}"[:300]
        if level != "warning":
            self._last_error = text
        if not self.quiet:
            say(f"{record.get('timestamp', '')[11:19]} {self.name} {level}: {text}")
