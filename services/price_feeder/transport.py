"""HTTP to Alpaca, with what requests lacks: a deadline for the whole answer, bounds, a budget, pauses.

The only module that imports requests and urllib3.
"""

import http.client
import io
import json
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from requests import PreparedRequest, RequestException, Response
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from services.price_feeder.budget import RateBudget, pause_asked_for
from services.price_feeder.failures import (
    BadRequest,
    MarketDataError,
    MarketDataUnavailable,
    RateLimited,
    Unauthorized,
    Unsent,
)
from shared import clock

CONNECT_SECONDS_MAX = 3.0
BODY_BYTES_MAX = 16 * 1024 * 1024
"""Bound of an answer as it is sent, and of what it is unpacked to; 100 trades are 15 KB."""
UNAUTHORIZED_PAUSE = timedelta(seconds=60)
WAITING_MAX = 2000
"""Requests that wait for a thread: 200,000 symbols, or what many rounds gave up while all threads hung."""

_CHUNK_BYTES = 65_536
_PROBLEM_LENGTH_MAX = 200

P = ParamSpec("P")
T = TypeVar("T")


class Pause:
    """While it is on, no request is sent."""

    def __init__(self) -> None:
        self._until = 0.0
        self._reason: MarketDataError | None = None

    def begin(self, reason: MarketDataError, length: timedelta) -> None:
        """Send nothing for `length`; a longer pause that is on already stays."""
        until = time.monotonic() + length.total_seconds()
        if until > self._until:
            self._until, self._reason = until, reason

    def reason(self) -> MarketDataError | None:
        """Return why nothing is to be sent, or None when the pause is over."""
        return self._reason if time.monotonic() < self._until else None


class Door(HTTPAdapter):
    """The way out for one client's requests: each takes from the budget, respects the pauses and ends in time.

    `shared_pause` holds for all doors (too many requests, a wrong key), its own for this one (not in the plan).
    """

    def __init__(
        self, budget: RateBudget, shared_pause: Pause, *, connections_max: int, request_seconds_max: float
    ) -> None:
        self._budget = budget
        self._shared_pause = shared_pause
        self._pause = Pause()
        self._this_thread = threading.local()
        self._seconds_max = request_seconds_max
        super().__init__(pool_connections=1, pool_maxsize=connections_max, max_retries=0)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def expect_one_request(self) -> None:
        """Say that this thread is about to send one request; a second one, of a paging client, is refused."""
        self._this_thread.requests = 0
        self._this_thread.headers = {}

    @property
    def answer_headers(self) -> Mapping[str, str]:
        """The headers of the answer that this thread received."""
        headers: Mapping[str, str] = self._this_thread.headers
        return headers

    def send(self, request: PreparedRequest, *_: Any, **options: Any) -> Response:
        """Send and return a 200 with its whole body; anything else is a MarketDataError, or Unsent."""
        if self._this_thread.requests:
            raise MarketDataUnavailable("answered in pages, which latest trades do not have")
        pause = self._shared_pause.reason() or self._pause.reason()
        if pause or not self._budget.start(time.monotonic()):
            raise Unsent(pause)
        self._this_thread.requests = 1
        try:
            bounds = Timeout(connect=CONNECT_SECONDS_MAX, total=self._seconds_max)
            response = super().send(request, **(options | {"stream": True, "timeout": bounds}))
            body = _body(response)
        except (RequestException, HTTPError, http.client.HTTPException, OSError) as error:
            raise MarketDataUnavailable(_cause(error, self._seconds_max)) from error
        finally:
            self._budget.end(time.monotonic())
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.headers, body)
        self._this_thread.headers = response.headers
        response.raw = io.BytesIO(body)
        return response

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> MarketDataError:
        """Turn an answer other than 200 into an error, and begin the pause that it asks for."""
        message = _message(body)
        problem = f"answered {status}: {message[:_PROBLEM_LENGTH_MAX]}".removesuffix(": ")
        if status == 429 or (status == 503 and "Retry-After" in headers):
            now = clock.utc_now()
            length = pause_asked_for(headers, now)
            limited = RateLimited(problem, now + length)
            self._shared_pause.begin(limited, length)
            return limited
        if status in (401, 403):
            plan = ", and that the plan has the feed ALPACA_FEED" if status == 403 else ""
            advice = f"check ALPACA_API_KEY and ALPACA_SECRET_KEY{plan}"
            unauthorized = Unauthorized(f"Alpaca {problem.rstrip('.')}: {advice}")
            # 401 is about the key; 403 may be about this feed alone.
            (self._shared_pause if status == 401 else self._pause).begin(unauthorized, UNAUTHORIZED_PAUSE)
            return unauthorized
        if status in (400, 422):
            return BadRequest(problem, message)
        return MarketDataUnavailable(problem)


# ---- a deadline for the whole answer -------------------------------------------------------------


class _BoundedReader(io.RawIOBase):
    """Reads from a socket until a deadline, whatever the pace, and not more than the bound."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw
        # urllib3 has just set the socket's timeout to what is left of the request's total time.
        self._deadline = time.monotonic() + (sock.gettimeout() or CONNECT_SECONDS_MAX)
        self._bytes_left = BODY_BYTES_MAX

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer did not end in time")
        if self._bytes_left <= 0:
            raise OSError(_TOO_LONG)
        self._sock.settimeout(left)
        count: int | None = self._raw.readinto(buffer)
        self._bytes_left -= count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedAnswer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_BoundedReader(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _BoundedAnswer


class _SecureConnection(HTTPSConnection):
    response_class = _BoundedAnswer


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS = {"http": _Pool, "https": _SecurePool}
_TOO_LONG = f"the answer is longer than {BODY_BYTES_MAX:,} bytes"


def _body(response: Response) -> bytes:
    """Read and unpack the body, within the bound."""
    body = bytearray()
    with response.raw:  # a body that is left before its end takes the connection with it
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=True):
            body += chunk
            if len(body) > BODY_BYTES_MAX:
                raise OSError(_TOO_LONG)
    return bytes(body)


# ---- problems in words ---------------------------------------------------------------------------


def _message(body: bytes) -> str:
    """Return what an error's body says, for a person: the JSON message, the HTML title, or its beginning."""
    text = body[:10_000].decode(errors="replace")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict) and isinstance(parsed.get("message"), str):
        text = parsed["message"]
    elif title := re.search(r"<title>([^<]*)", text, re.IGNORECASE):
        text = title[1]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _cause(error: BaseException, seconds_max: float) -> str:
    """Return the innermost cause in words, without the addresses and URLs that the outer ones are full of."""
    while (inner := error.__cause__ or error.__context__) and not isinstance(error, TimeoutError):
        error = inner
    if isinstance(error, TimeoutError):
        return f"no complete answer within {seconds_max:g} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut off"
    return getattr(error, "strerror", None) or str(error)[:_PROBLEM_LENGTH_MAX] or type(error).__name__


# ---- threads -------------------------------------------------------------------------------------


class DaemonThreads(Executor):
    """A fixed number of threads that the end of the process does not wait for, whatever they hang in.

    Work beyond `WAITING_MAX` that waits for a thread fails at once with MarketDataUnavailable. (Resolving a name has no
    deadline; the threads of ThreadPoolExecutor are joined at exit.)
    """

    def __init__(self, count: int, *, name: str) -> None:
        self._count = count
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    def submit(self, work: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        if self._work.qsize() >= WAITING_MAX:
            future.set_exception(MarketDataUnavailable("too many requests wait for one that hangs"))
            return future

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work(*args, **options)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._work.put(run)
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Let each thread end after what it does now."""
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self) -> None:
        while (run := self._work.get()) is not None:
            run()
