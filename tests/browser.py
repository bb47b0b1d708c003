"""Debian's Chromium for tests and pictures of the page: a process that is started once and connected to."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from playwright.async_api import Browser, async_playwright

START_SECONDS_MAX = 20.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Without the latter ones it looks for its maker's hosts at every start.
_OPTIONS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--hide-scrollbars",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class BrowserMissing(Exception):
    """No Chromium is installed."""


@contextmanager
def chromium(*options: str) -> Iterator[str]:
    """Run Chromium while the block runs, and yield the address that it is driven at; raises BrowserMissing."""
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        raise BrowserMissing("there is no Chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [executable, *_OPTIONS, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield f"http://127.0.0.1:{_port(process, Path(profile) / 'DevToolsActivePort')}"
            finally:
                process.terminate()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Browser]:
    """Connect to the running Chromium from this event loop."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.connect_over_cdp(address)
        try:
            yield browser
        finally:
            await browser.close()


def _port(process: subprocess.Popen[bytes], announced: Path) -> int:
    """Wait until Chromium has written its port; in two steps, so an empty file is not there yet."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        if announced.exists() and (lines := announced.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError("Chromium did not start")
