"""Answers that are finished bytes, sent with a head that is rendered once for all of a kind.

The library builds and renders every head anew, a fourth of what a kept answer costs; only the entity tag, the request
id, the length and the date are an answer's own.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict, CIMultiDictProxy, istr

_REQUEST_ID = istr("X-Request-Id")


@dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """What many answers have in common. There are few, made at the start: heads are kept for each."""

    status: int
    headers: Mapping[str, str]


class Finished(web.StreamResponse):
    """An answer of finished bytes. The edge gives it a head, or lets the library answer with `in_full`.

    The library's own state is not set up: its server asks for nothing but what stands here. What would change an answer
    on its way out (cookies, compression, `on_response_prepare`) has no say.
    """

    def __init__(self, kind: Kind, body: bytes | None, entity_tag: str | None = None) -> None:
        self.kind = kind
        self.body = body
        self.entity_tag = entity_tag
        self._head = ""
        self._request_id = ""
        self._length = 0

    @property
    def status(self) -> int:
        return self.kind.status

    @property
    def headers(self) -> CIMultiDictProxy[str]:  # type: ignore[override]  # none can be added to what is finished
        """Its headers before the edge adds its own."""
        headers = CIMultiDict(self.kind.headers)
        if self.entity_tag is not None:
            headers["ETag"] = self.entity_tag
        return CIMultiDictProxy(headers)

    @property
    def keep_alive(self) -> bool:
        return True  # else it would be answered in full

    @property
    def body_length(self) -> int:
        return self._length

    def in_full(self) -> web.Response:
        """Return the same answer as a response of the library, without the edge's headers."""
        return web.Response(body=self.body, status=self.status, headers=self.headers)

    def put_under(self, head: str, request_id: str) -> None:
        """Give it its kind's `head`; what it is sent with."""
        self._head = head
        self._request_id = request_id

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Send the whole; there is nothing to be added to it later."""
        body = self.body
        tag = "" if self.entity_tag is None else f"ETag: {self.entity_tag}\r\n"
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        head = (self._head % (tag, self._request_id, length, _date())).encode()
        writer = request.writer
        # As one piece, the last one: the writer refuses a lost connection and waits for a client that reads slowly.
        await writer.write_eof(head if body is None else head + body)
        self._length = writer.output_size
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing more."""
        assert not data


def is_usual(request: web.BaseRequest) -> bool:
    """Tell whether a request may be answered with a finished head: GET over a connection of HTTP/1.1 that stays."""
    return request.method == "GET" and request.version == HttpVersion11 and request.keep_alive


def head(status: int, reason: str, headers: Mapping[str, str]) -> str:
    """Return a head with places for the ETag's line, the request id, the length's line and the date, in this order.

    The headers are those of an answer of its kind, from the kind's own to X-Request-Id and the edge's.
    """
    lines = [f"HTTP/1.1 {status} {reason}\r\n"]
    for name, value in headers.items():
        assert not any(character in name + value for character in "\r\n\0"), name
        if name == _REQUEST_ID:
            lines.append(f"%s{name}: %s\r\n")
        else:
            lines.append(f"{name}: {value}\r\n".replace("%", "%%"))
    return "".join((*lines, "%sDate: %s\r\n\r\n"))


_dated = 0, ""


def _date() -> str:
    """Return the Date header's value, rendered once a second."""
    global _dated  # noqa: PLW0603  # the same for all
    now = int(time.time())
    second, text = _dated
    if second != now:
        text = formatdate(now, usegmt=True)
        _dated = now, text
    return text
