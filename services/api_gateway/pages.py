"""The page at `/`: its files, finished at the start, and what a browser must know before it can begin."""

import gzip
import hashlib
import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from aiohttp import hdrs, web
from pydantic import SecretStr

from services.api_gateway import negotiation
from services.api_gateway.edge import Handler
from services.api_gateway.finished import Finished, Kind
from services.api_gateway.problems import NOT_FOUND, Problem

FOLDER = Path(__file__).parent / "page"
LIBRARY_FILE = FOLDER / "node_modules/lightweight-charts/dist/lightweight-charts.standalone.production.mjs"
LIBRARY_ADDRESS = "/page/lightweight-charts.js"
START_ADDRESS = "/page/start"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Every file is asked for again with its tag, so that a newer page is seen at once; mostly the answer is 304.
_HEADERS = {
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FORWARDING_HEADERS = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP")


def routes(token: SecretStr | None, library: Path) -> list[web.RouteDef]:
    """Return the page's routes; `library` is the chart library's file, which may be missing."""
    has_library = library.is_file()
    return [
        *(web.get(address, _file(path)) for address, path in _addresses().items()),
        web.get(LIBRARY_ADDRESS, _file(library) if has_library else _library_missing),
        web.get(START_ADDRESS, _start(token, has_library=has_library)),
    ]


def _addresses() -> dict[str, Path]:
    """Return what of the folder is served, by its address."""
    served = sorted(path for path in FOLDER.iterdir() if path.suffix in _TYPES)
    return {"/" if path.name == "index.html" else f"/page/{path.name}": path for path in served}


def _file(path: Path) -> Handler:
    """Return the handler that answers with the file as it is now, plain or compressed, or with 304."""
    body = path.read_bytes()
    compressed = gzip.compress(body, mtime=0)
    tag = hashlib.sha256(body).hexdigest()[:32]
    typed = {"Content-Type": _TYPES[path.suffix], **_HEADERS}
    plain_kind, gzip_kind = Kind(200, typed), Kind(200, typed | {"Content-Encoding": "gzip"})
    known_kind = Kind(304, _HEADERS)

    async def answer(request: web.Request) -> Finished:
        asked = request.headers
        is_gzip = negotiation.is_gzip_wanted(asked, len(body), negotiation.COMPRESSED_BYTES_MIN)
        entity_tag = f'"{tag}-gzip"' if is_gzip else f'"{tag}"'
        if negotiation.is_match(",".join(asked.getall(hdrs.IF_NONE_MATCH, ())), entity_tag):
            return Finished(known_kind, None, entity_tag)
        return (
            Finished(gzip_kind, compressed, entity_tag) if is_gzip else Finished(plain_kind, body, entity_tag)
        )

    return answer


async def _library_missing(_request: web.Request) -> web.Response:
    raise Problem(NOT_FOUND, "The chart library is not installed: npm ci in services/api_gateway/page.")


def _start(token: SecretStr | None, *, has_library: bool) -> Handler:
    """Return the handler that tells the page whether there are charts, and the token of a local demonstration."""

    async def answer(request: web.Request) -> web.Response:
        given = token.get_secret_value() if token is not None and _is_from_this_machine(request) else None
        body = orjson.dumps({"token": given, "has_chart_library": has_library})
        headers = {"Content-Type": "application/json", "Cross-Origin-Resource-Policy": "same-origin"}
        return web.Response(body=body, headers=headers)

    return answer


def _is_from_this_machine(request: web.Request) -> bool:
    """Tell whether a page of ours, opened at a loopback address, asks from this machine.

    The peer alone does not tell: a page of the internet whose name is made to resolve to 127.0.0.1 asks from here too,
    but with its own name as Host; a page of another port sends Sec-Fetch-Site or Origin; a proxy on this machine hands
    on what comes from elsewhere, and says so in one of its headers.
    """
    asked = request.headers
    return (
        _is_loopback(request.remote or "")
        and _is_loopback_name(asked.getall(hdrs.HOST, ()))
        and asked.get("Sec-Fetch-Site", "same-origin") == "same-origin"
        and hdrs.ORIGIN not in asked
        and not any(name in asked for name in _FORWARDING_HEADERS)
    )


def _is_loopback_name(hosts: list[str] | tuple[str, ...]) -> bool:
    if len(hosts) != 1:
        return False
    try:
        name = urlsplit(f"//{hosts[0]}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)
