"""Take the pictures of docs/screenshots: `make screenshot`. Runs a system of its own, as `make run` does."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.async_api import Browser, Page, expect

from local.settings import ROOT, free_port
from local.terminal import say
from tests.browser import BrowserMissing, chromium, connected
from tests.waiting import eventually

FOLDER = ROOT / "docs" / "screenshots"
START_SECONDS_MAX = 60.0
# Name: width, height, scheme, timeframe.
PICTURES = {
    "wide-light": (1440, 1100, "light", "1M"),
    "wide-dark": (1440, 1100, "dark", "1M"),
    "narrow-light": (375, 812, "light", "1D"),
    "narrow-dark": (375, 812, "dark", "1D"),
}
PERIODS = {"1D": "past 24 hours", "1M": "past month"}


async def take(browser: Browser, url: str, name: str) -> None:
    """Take one picture once everything on the page is there and nothing of it is tinted."""
    width, height, scheme, timeframe = PICTURES[name]
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
        timezone_id="America/New_York",
        device_scale_factor=1 if width > 1000 else 2,
    )
    page: Page = await context.new_page()
    await page.goto(url)
    await expect(page.locator("#connection-name")).to_have_text("Live", timeout=20_000)
    await page.get_by_role("radio", name=timeframe, exact=True).check(force=True)
    await expect(page.locator("#change .period")).to_have_text(PERIODS[timeframe])
    await expect(page.locator("#chart canvas").first).to_be_visible()
    await page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    path = FOLDER / f"{name}.png"
    # With 256 colours a picture has a third of the size, and looks the same.
    picture = Image.open(BytesIO(await page.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    say(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")
    await context.close()


async def take_all(address: str, url: str, names: Sequence[str]) -> None:
    async with connected(address) as browser:
        for name in names:
            await take(browser, url, name)


async def run(folder: Path) -> None:
    """Start a system, wait until it says that it runs, take the pictures and stop it."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALPACA_")}
    environment |= {"LOCAL_DATA_DIR": str(folder / "data"), "GATEWAY_PORT": str(port)}
    screen = folder / "screen"
    with screen.open("wb") as output:
        system = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "local", "run", cwd=ROOT, env=environment, stdout=output, stderr=output
        )

    async def is_running() -> bool:
        if system.returncode is not None:
            raise RuntimeError(screen.read_text())
        return "Foliotick is running" in screen.read_text()

    try:
        await eventually(is_running, timeout=START_SECONDS_MAX)
        url = f"http://127.0.0.1:{port}/"
        # The canvas of the chart is as fine as the browser itself is started for, not as a picture asks for.
        with chromium() as address:
            await take_all(address, url, [name for name in PICTURES if name.startswith("wide")])
        with chromium("--force-device-scale-factor=2") as address:
            await take_all(address, url, [name for name in PICTURES if name.startswith("narrow")])
    finally:
        if system.returncode is None:
            system.terminate()
            await system.wait()


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(run(Path(folder)))
        except BrowserMissing as error:
            sys.stderr.write(f"{error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
