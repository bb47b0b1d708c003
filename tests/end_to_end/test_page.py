"""The page in a real browser, on a real gateway, PostgreSQL and NATS."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import pytest
from playwright.async_api import Browser, BrowserContext, Page, Route, expect
from pydantic import SecretStr

from services.api_gateway import pages
from shared.bus import Bus
from shared.clock import last_boundary, utc_now
from shared.database import Database
from tests import browser as browsers
from tests.factories import add_snapshot, create_user, set_price
from tests.gateway import running, token
from tests.market import closed_now
from tests.streams import trade

pytestmark = pytest.mark.xdist_group("browser")

MINUS = "\u2212"
BYTES_MAX = 300_000
FIRST_PAINT_MS_MAX = 1000
WIDTHS = (375, 768, 1440)
# Counts from its first line on what a test asks for later.
OBSERVE = """
    window.observed = {shift: 0, tints: 0};
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) window.observed.shift += entry.value;
    }).observe({type: "layout-shift", buffered: true});
    const animate = Element.prototype.animate;
    Element.prototype.animate = function (...given) {
      window.observed.tints += 1;
      return animate.apply(this, given);
    };
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    try:
        with browsers.chromium() as address:
            yield address
    except browsers.BrowserMissing as error:
        pytest.skip(str(error))


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    async with browsers.connected(chromium) as connected:
        yield connected


@pytest.fixture(autouse=True)
async def demo(database: Database) -> int:
    """The user of the seed's example, and a second position: worth 22,750.50."""
    await set_price(database, "AAPL", "175.00")
    await set_price(database, "IBM", "100.00")
    positions = {"AAPL": ("100", "15000.00"), "IBM": ("2.5", "300.00")}
    return await create_user(database, "demo", cash="5000.50", positions=positions)


@dataclass
class Visit:
    """A tab, and what its console said."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)

    async def see(self, selector: str, text: str) -> None:
        """Wait until an element's text is this."""
        await expect(self.page.locator(selector)).to_have_text(text, timeout=10_000)

    async def sign_in(self, credentials: str) -> None:
        await self.page.get_by_label("Token").fill(credentials)
        await self.page.get_by_role("button", name="Sign in").click()


@asynccontextmanager
async def visit(browser: Browser, port: int, *, width: int = 1440, **options: Any) -> AsyncIterator[Visit]:
    """Open the page in a browser that knows nothing yet."""
    context: BrowserContext = await browser.new_context(
        viewport={"width": width, "height": 900}, timezone_id="America/New_York", **options
    )
    try:
        await context.add_init_script(OBSERVE)
        visiting = Visit(await context.new_page(), f"http://127.0.0.1:{port}/")
        visiting.page.on("pageerror", lambda error: visiting.errors.append(str(error)))
        visiting.page.on(
            "console",
            lambda said: visiting.errors.append(said.text) if said.type in ("error", "warning") else None,
        )
        await visiting.page.goto(visiting.url)
        yield visiting
    finally:
        await context.close()


@asynccontextmanager
async def demonstration(
    browser: Browser,
    database_url: str,
    bus: Bus | None,
    *,
    chart_library: Path = pages.LIBRARY_FILE,
    **options: Any,
) -> AsyncIterator[Visit]:
    """Open a page that the demo user is signed in to already."""
    page_token = SecretStr(token(expires_in=3600))
    async with (
        running(database_url, bus=bus, chart_library=chart_library, gateway_page_token=page_token) as gateway,
        visit(browser, gateway.port, **options) as visiting,
    ):
        yield visiting


class Line:
    """A line to the gateway that can be cut, or fall silent."""

    def __init__(self, gateway_port: int) -> None:
        self._gateway_port = gateway_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passes = asyncio.Event()
        self._passes.set()
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def mend(self) -> None:
        self._passes.set()
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fall_silent(self) -> None:
        self._passes.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._gateway_port)
        self._writers |= {writer, onward_writer}
        for source, sink in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._passes.wait()
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()


# ---- signing in ----------------------------------------------------------------------------------


async def test_sign_in_with_a_token_that_stays_in_the_tab_until_sign_out(
    browser: Browser, database_url: str, bus: Bus
) -> None:
    async with running(database_url, bus=bus) as gateway, visit(browser, gateway.port) as visiting:
        page = visiting.page
        await expect(page.get_by_role("button", name="Open the demo portfolio")).to_be_hidden()
        await visiting.sign_in(token(secret="another secret of more than thirty-two bytes"))
        await visiting.see("#sign-in-problem", "The token is not valid here.")
        await visiting.sign_in(token(expires_in=-5))
        await visiting.see("#sign-in-problem", "Your session has expired. Sign in again with a new token.")
        await visiting.sign_in(token("nobody"))
        await visiting.see("#sign-in-problem", "The token is valid, but there is no user with its subject.")
        await visiting.sign_in(f"Bearer {token()}")
        await visiting.see("#total", "$22,750.50")
        await visiting.see("#who", "demo")
        await page.reload()
        await visiting.see("#connection-name", "Live")
        assert page.url == visiting.url
        assert await page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert token().split(".")[0] not in await page.evaluate("JSON.stringify(sessionStorage)")


async def test_demo_user_is_signed_in_until_he_signs_out(
    browser: Browser, database_url: str, bus: Bus
) -> None:
    async with demonstration(browser, database_url, bus) as visiting:
        await visiting.see("#total", "$22,750.50")
        await visiting.page.get_by_role("button", name="Sign out").click()
        await visiting.page.reload()
        await visiting.page.get_by_role("button", name="Open the demo portfolio").click()
        await visiting.see("#total", "$22,750.50")
        assert visiting.errors == []


@pytest.mark.parametrize(
    ("lifetime_seconds", "statement", "said"),
    [
        (3, None, "Your session has expired. Sign in again with a new token."),
        (600, "UPDATE users SET is_active = FALSE", "This user has been deactivated."),
    ],
)
async def test_session_that_ends_while_it_is_live_says_why(
    browser: Browser,
    database: Database,
    database_url: str,
    bus: Bus,
    *,
    lifetime_seconds: float,
    statement: str | None,
    said: str,
) -> None:
    async with running(database_url, bus=bus) as gateway, visit(browser, gateway.port) as visiting:
        await visiting.sign_in(token(expires_in=lifetime_seconds))
        await visiting.see("#connection-name", "Live")
        if statement:
            await database.fetch(statement)
        await visiting.see("#sign-in-problem", said)
        await expect(visiting.page.locator("#portfolio")).to_be_hidden()


# ---- what is shown -------------------------------------------------------------------------------


async def test_live_price_changes_value_and_total_and_moves_nothing(
    browser: Browser, database: Database, database_url: str, bus: Bus
) -> None:
    async with demonstration(browser, database_url, bus) as visiting:
        row = visiting.page.get_by_role("row", name="AAPL")
        await visiting.see("#connection-name", "Live")
        await expect(row).to_contain_text("+$2,500.00")
        await expect(visiting.page.locator("#chart canvas").first).to_be_attached()
        before = await visiting.page.evaluate("window.observed")
        await trade(database, bus, "AAPL", "180.0100")
        await visiting.see("#total", "$23,251.50")  # 18,001 + 250 + 5,000.50
        await expect(row).to_contain_text("$18,001.00")
        await expect(row).to_contain_text("+$3,001.00")
        await trade(database, bus, "AAPL", "90.00")
        await visiting.see("#total", "$14,250.50")
        await expect(row).to_contain_text(f"{MINUS}$6,000.00")
        after = await visiting.page.evaluate("window.observed")
        assert after["shift"] == before["shift"] == 0
        assert after["tints"] - before["tints"] == 6  # price, value and total, each twice
        assert visiting.errors == []


async def test_viewer_who_wants_no_motion_sees_the_numbers_change_without(
    browser: Browser, database: Database, database_url: str, bus: Bus
) -> None:
    async with demonstration(browser, database_url, bus, reduced_motion="reduce") as visiting:
        await visiting.see("#connection-name", "Live")
        await trade(database, bus, "AAPL", "180.01")
        await visiting.see("#total", "$23,251.50")
        assert (await visiting.page.evaluate("window.observed.tints")) == 0


async def test_page_is_small_and_quick(browser: Browser, database_url: str, bus: Bus) -> None:
    async with demonstration(browser, database_url, bus) as visiting:
        await visiting.see("#connection-name", "Live")
        await expect(visiting.page.locator("#chart canvas").first).to_be_attached()
        measured = json.loads(
            await visiting.page.evaluate(
                """JSON.stringify({
                  bytes: [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
                    .reduce((sum, entry) => sum + entry.transferSize, 0),
                  paint: performance.getEntriesByName("first-contentful-paint")[0].startTime,
                })"""
            )
        )
        assert 50_000 < measured["bytes"] <= BYTES_MAX
        assert measured["paint"] <= FIRST_PAINT_MS_MAX


async def test_timeframe_is_chosen_by_keyboard(
    browser: Browser, database: Database, database_url: str, bus: Bus, demo: int
) -> None:
    now = last_boundary(utc_now(), timedelta(hours=1))
    await add_snapshot(database, demo, now - timedelta(hours=2), "22000.00")
    await add_snapshot(database, demo, now - timedelta(days=3), "25000.00")
    async with demonstration(browser, database_url, bus) as visiting:
        # 22,750.50 - 22,000 = 750.50, of 22,000: 3.411 %.
        await visiting.see("#change", "+$750.50 (+3.41%)past 24 hours")
        await visiting.page.get_by_role("radio", name="1D").focus()
        await visiting.page.keyboard.press("ArrowRight")
        await expect(visiting.page.get_by_role("radio", name="1W")).to_be_checked()
        # 22,750.50 - 25,000 = -2,249.50, of 25,000: -8.998 %.
        await visiting.see("#change", f"{MINUS}$2,249.50 ({MINUS}9.00%)past week")
        await visiting.see("#readout", "Low $22,000.00  ·  High $25,000.00")
        assert visiting.errors == []


async def test_everything_is_reached_by_keyboard_in_order(
    browser: Browser, database_url: str, bus: Bus
) -> None:
    async with demonstration(browser, database_url, bus) as visiting:
        await visiting.see("#connection-name", "Live")
        reached = []
        for _ in range(5):
            await visiting.page.keyboard.press("Tab")
            reached.append(
                await visiting.page.evaluate(
                    "document.activeElement.value || document.activeElement.textContent.trim()"
                )
            )
        assert reached == ["Skip to the portfolio", "Sign out", "1D", "TradingView, Inc.", "Refresh prices"]


async def test_old_missing_and_closed_prices_are_told_apart(
    browser: Browser, database: Database, database_url: str, bus: Bus
) -> None:
    await set_price(database, "OLD", "10.00", age=timedelta(hours=3))
    positions = {"OLD": ("1", "10.00"), "NOSUCH": ("3", "12.00"), "AAPL": ("1", "1.00")}
    await create_user(database, "carol", positions=positions)
    async with running(database_url, bus=bus) as gateway, visit(browser, gateway.port) as visiting:
        await visiting.sign_in(token("carol"))
        await expect(visiting.page.get_by_role("row", name="OLD")).to_contain_text("Stale3 h ago")
        await expect(visiting.page.get_by_role("row", name="AAPL")).to_contain_text("Live")
        await expect(visiting.page.locator("#unpriced")).to_contain_text("NOSUCH")
        await expect(visiting.page.locator("#unpriced")).to_contain_text("no price for it yet")
        await visiting.see("#total", "$185.00")
        await visiting.see("#market-name", "Open")
    async with (
        running(database_url, bus=bus, hours=closed_now()) as gateway,
        visit(browser, gateway.port) as visiting,
    ):
        await visiting.sign_in(token("carol"))
        await visiting.see("#market-name", "Closed")
        await expect(visiting.page.locator("#market-next")).to_contain_text("9:30 AM E")  # EST or EDT
        await expect(visiting.page.get_by_role("row", name="AAPL")).to_contain_text("At close")


async def test_simulated_prices_are_said_so(
    browser: Browser, database: Database, database_url: str, bus: Bus
) -> None:
    async with demonstration(browser, database_url, bus) as visiting:
        await visiting.see("#connection-name", "Live")
        await expect(visiting.page.locator("#simulated")).to_be_hidden()
        await trade(database, bus, "AAPL", "175.00", feed="simulated")
        await expect(visiting.page.locator("#simulated")).to_be_visible()
        await visiting.page.reload()
        await visiting.see("#connection-name", "Live")
        await expect(visiting.page.locator("#simulated")).to_be_visible()


@pytest.mark.parametrize("width", WIDTHS)
async def test_page_fits_whatever_is_held(
    browser: Browser, database: Database, database_url: str, bus: Bus, width: int
) -> None:
    await set_price(database, "HUGE", "99999999999.9999")
    many = {f"LONG-TICKER-{number:03}/USD": ("123456.789012345", "1.00") for number in range(198)}
    for ticker in many:
        await set_price(database, ticker, "1234.5678")
    await create_user(
        database,
        "rich",
        cash="9876543210123.45",
        positions=many | {"HUGE": ("9.5", "0.01"), "NONE": ("1", "1")},
    )
    await create_user(database, "poor")
    async with (
        running(database_url, bus=bus) as gateway,
        visit(browser, gateway.port, width=width) as visiting,
    ):
        await visiting.sign_in(token("rich"))
        await expect(visiting.page.locator("#positions-rows tr")).to_have_count(199)
        assert await overflowing(visiting.page) == []
        await visiting.page.get_by_role("button", name="Sign out").click()
        await visiting.sign_in(token("poor"))
        await visiting.see("#total", "$0.00")
        await visiting.see("#change", "No history yet")
        await expect(visiting.page.locator("#positions-empty")).to_be_visible()
        await expect(visiting.page.locator("#chart-message")).to_contain_text("No history")
        assert await overflowing(visiting.page) == []


async def overflowing(page: Page) -> list[str]:
    """Return what stands out of the page, or is a number that is cut off."""
    found: list[str] = await page.evaluate(
        """() => {
          const wide = document.documentElement.scrollWidth > innerWidth ? ["the page"] : [];
          const numbers = document.querySelectorAll("#total, .figures dd, #positions-rows .number");
          return wide.concat([...numbers].filter((cell) => cell.scrollWidth > cell.clientWidth + 1)
            .map((cell) => `${cell.className || cell.id}: ${cell.textContent}`));
        }"""
    )
    return found


async def test_without_the_chart_library_the_page_says_what_is_missing_and_works(
    browser: Browser,
    database: Database,
    database_url: str,
    bus: Bus,
    *,
    demo: int,
    tmp_path: Path,
) -> None:
    await add_snapshot(database, demo, last_boundary(utc_now(), timedelta(hours=1)), "22000.00")
    missing = tmp_path / "not-installed.mjs"
    async with demonstration(browser, database_url, bus, chart_library=missing) as visiting:
        await expect(visiting.page.locator("#chart-message")).to_contain_text("Install Node.js with npm")
        await visiting.see("#change", "+$750.50 (+3.41%)past 24 hours")
        await trade(database, bus, "AAPL", "180.01")
        await visiting.see("#total", "$23,251.50")
        assert visiting.errors == []


# ---- the connection ------------------------------------------------------------------------------


async def test_lost_connection_is_said_and_regained_with_what_was_missed(
    browser: Browser, database: Database, database_url: str, bus: Bus
) -> None:
    async with (
        running(database_url, bus=bus) as gateway,
        Line(gateway.port) as line,
        visit(browser, line.port) as visiting,
    ):
        await visiting.sign_in(token())
        await visiting.see("#connection-name", "Live")
        await line.cut()
        await visiting.see("#connection-name", "Reconnecting")
        await expect(visiting.page.locator("#connection-wait")).to_contain_text(" s")
        await trade(database, bus, "AAPL", "180.01")
        await line.mend()
        await visiting.see("#connection-name", "Live")
        await visiting.see("#total", "$23,251.50")


async def test_stream_that_falls_silent_is_given_up(browser: Browser, database_url: str, bus: Bus) -> None:
    async with (
        running(database_url, bus=bus) as gateway,
        Line(gateway.port) as line,
        visit(browser, line.port) as visiting,
    ):
        await visiting.page.clock.install()
        await visiting.page.reload()
        await visiting.sign_in(token())
        await visiting.see("#connection-name", "Live")
        line.fall_silent()
        await visiting.page.clock.fast_forward(39_000)
        await visiting.see("#connection-name", "Live")
        await visiting.page.clock.fast_forward(2_000)
        await visiting.see("#connection-name", "Reconnecting")


async def test_where_no_stream_is_offered_the_page_asks_by_turns_and_says_so(
    browser: Browser, database: Database, database_url: str
) -> None:
    # Without a bus there are no tickets.
    async with demonstration(browser, database_url, None) as visiting:
        await visiting.page.clock.install()
        await visiting.page.reload()
        await visiting.see("#connection-name", "Updating every 10 s")
        await visiting.see("#total", "$22,750.50")
        await set_price(database, "AAPL", "180.01")
        await visiting.page.clock.fast_forward(10_000)
        await visiting.see("#total", "$23,251.50")


async def test_refresh_says_what_came_of_it(browser: Browser, database_url: str, bus: Bus) -> None:
    answers: list[dict[str, Any]] = [
        {"status": 429, "headers": {"Retry-After": "7"}, "json": {"title": "Too soon"}},
        {"status": 200, "json": {"symbols": 2, "confirmed": 2}},
    ]

    async def answer(route: Route) -> None:
        await route.fulfill(**answers.pop(0))

    async with demonstration(browser, database_url, bus) as visiting:
        await visiting.page.clock.install()
        await visiting.page.reload()
        await visiting.see("#connection-name", "Live")
        button = visiting.page.get_by_role("button", name="Refresh prices")
        await button.click()  # and no price feeder is there to answer
        await visiting.see("#refresh-outcome", "Not possible now")
        await visiting.page.clock.fast_forward(5000)
        await visiting.page.route("**/api/portfolio/refresh-prices", answer)
        await button.click()
        await visiting.see("#refresh-outcome", "Again in 7 s")
        await expect(button).to_be_disabled()
        await visiting.page.clock.fast_forward(7000)
        await button.click()
        await visiting.see("#refresh-outcome", "All prices confirmed")
