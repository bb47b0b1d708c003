"""The page's files as the gateway serves them, and to whom it gives the token of a demonstration."""

import gzip
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr

from services.api_gateway import pages
from tests.gateway import Gateway, running

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": "text/html; charset=utf-8",
    "/page/main.js": "text/javascript; charset=utf-8",
    "/page/style.css": "text/css; charset=utf-8",
    "/page/icon.svg": "image/svg+xml",
}


@pytest.fixture
async def gateway(database_url: str) -> AsyncIterator[Gateway]:
    async with running(database_url, gateway_page_token=SecretStr("the.demo.token")) as started:
        yield started


async def start(gateway: Gateway, headers: Mapping[str, str] | None = None) -> str | None:
    """Return the token that the page would get."""
    answer = await gateway.ask("GET", "/page/start", headers=headers)
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    token: str | None = answer.json()["token"]
    return token


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "content_type"), FILES.items())
async def test_file_comes_with_a_strict_policy_and_again_only_when_it_has_changed(
    gateway: Gateway, path: str, content_type: str
) -> None:
    answer = await gateway.get(path, None)
    assert (answer.status, answer.headers["Content-Type"]) == (200, content_type)
    assert answer.headers.getall("Content-Security-Policy") == [POLICY]  # type: ignore[attr-defined]
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    again = await gateway.ask("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.text) == (304, "")


async def test_answers_of_the_api_keep_their_own_policy(gateway: Gateway) -> None:
    answer = await gateway.get("/api/openapi.json", None)
    assert answer.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


async def test_file_is_compressed_for_who_accepts_it(gateway: Gateway) -> None:
    url = f"http://127.0.0.1:{gateway.port}/page/style.css"
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.get(url, headers={"Accept-Encoding": "gzip"}) as answer,
    ):
        assert answer.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(await answer.read()) == (pages.FOLDER / "style.css").read_bytes()


@pytest.mark.parametrize(
    "path", ["/page/package.json", "/page/package-lock.json", "/page/", "/page/../settings.py"]
)
async def test_nothing_else_of_the_folder_is_served(gateway: Gateway, path: str) -> None:
    assert (await gateway.get(path, None)).status == 404


def test_page_has_nothing_inline_and_asks_no_other_host() -> None:
    html = (pages.FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", html)
    asked = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert {address for address in asked if not address.startswith("/page/")} == {
        "https://www.tradingview.com/"
    }
    for address in asked:
        if address.startswith("/page/"):
            assert (pages.FOLDER / address.removeprefix("/page/")).is_file(), address


def test_routes_are_those_of_the_files_that_are_there() -> None:
    app = web.Application()
    app.add_routes(pages.routes(None, pages.LIBRARY_FILE))
    paths = {resource.canonical for resource in app.router.resources()}
    modules = {f"/page/{path.name}" for path in pages.FOLDER.glob("*.js")}
    assert paths == {"/", "/page/style.css", "/page/icon.svg", "/page/start", pages.LIBRARY_ADDRESS, *modules}


async def test_without_the_chart_library_the_page_is_told_and_the_rest_is_served(
    database_url: str, tmp_path: Path
) -> None:
    async with running(database_url, chart_library=tmp_path / "not-installed.mjs") as gateway:
        assert (await gateway.get("/page/start", None)).json()["has_chart_library"] is False
        missing = await gateway.get(pages.LIBRARY_ADDRESS, None)
        assert missing.status == 404
        assert "npm ci" in missing.problem().detail
        assert (await gateway.get("/", None)).status == 200


# ---- the token of a demonstration ----------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.9.9.9"])
async def test_token_is_given_to_the_page_on_this_machine(gateway: Gateway, host: str) -> None:
    assert await start(gateway, {"Host": host, "Sec-Fetch-Site": "same-origin"}) == "the.demo.token"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # whose name has been made to resolve to 127.0.0.1
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Host": "10.0.0.5:8000"},
        {"Host": "user@evil.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Sec-Fetch-Site": "same-site"},  # another port of this machine
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://localhost:3000"},
        {"X-Forwarded-For": "203.0.113.7"},  # by a proxy on this machine
        {"Forwarded": "for=203.0.113.7"},
        {"Via": "1.1 proxy"},
    ],
)
async def test_token_is_not_given_to_others(gateway: Gateway, headers: dict[str, str]) -> None:
    assert await start(gateway) == "the.demo.token"
    assert await start(gateway, headers) is None


@pytest.mark.parametrize(
    ("peer", "is_ours"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("192.168.1.7", False), ("", False)],
)
def test_peer_must_be_this_machine(peer: str, is_ours: bool) -> None:
    assert pages._is_loopback(peer) is is_ours


async def test_without_the_setting_there_is_no_token(database_url: str) -> None:
    async with running(database_url) as gateway:
        assert await start(gateway) is None
