"""Who may ask, and how often: Alpaca's two key headers and its requests a minute."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import SecretStr

KEY_HEADER = "APCA-API-KEY-ID"
SECRET_HEADER = "APCA-API-SECRET-KEY"  # noqa: S105 - the name of a header

_WINDOW_SECONDS = 60.0
_CALLERS_MAX = 10_000
_COUNTED_MAX = 100_000


class Refused(Exception):
    """A request is answered with an error: the status and Alpaca's `message`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def key_of(headers: Mapping[str, str]) -> str | None:
    """Return the key id of a request with both headers; None without."""
    return (headers.get(SECRET_HEADER) and headers.get(KEY_HEADER)) or None


@dataclass(frozen=True, slots=True)
class Credentials:
    """The one key pair that is let in; when None, every pair is."""

    key: SecretStr | None
    secret: SecretStr | None

    def check(self, headers: Mapping[str, str], *, required: bool) -> None:
        """Raise Refused 401 without both headers, 403 with wrong ones."""
        if key_of(headers) is None:
            if required:
                raise Refused(401, "unauthorized.")
            return
        for name, expected in ((KEY_HEADER, self.key), (SECRET_HEADER, self.secret)):
            if expected is not None and headers[name] != expected.get_secret_value():
                raise Refused(403, "forbidden.")


@dataclass(frozen=True, slots=True)
class Quota:
    """What a caller has left in this minute."""

    limit: int
    remaining: int
    reset_at: int
    retry_after_seconds: int
    exceeded: bool

    def headers(self) -> dict[str, str]:
        return {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(self.reset_at),
        }


class RateLimit:
    """Counts each caller's requests in minutes that begin with the first request of each."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._windows: dict[str, tuple[float, int]] = {}  # caller → end of the minute, requests in it

    def spend(self, caller: str, now_s: float) -> Quota:
        """Count one request at `now_s` (Unix time); a request over the limit is not counted."""
        ends_s, spent = self._windows.get(caller, (0.0, 0))
        if now_s >= ends_s:
            self._forget(caller, now_s)
            ends_s, spent = now_s + _WINDOW_SECONDS, 0
        exceeded = spent >= self.per_minute
        if not exceeded:
            spent += 1
        self._windows[caller] = (ends_s, spent)
        return Quota(
            limit=self.per_minute,
            remaining=self.per_minute - spent,
            reset_at=math.ceil(ends_s),
            retry_after_seconds=math.ceil(ends_s - now_s),
            exceeded=exceeded,
        )

    def _forget(self, caller: str, now_s: float) -> None:
        """Make room for a new minute of a caller: minutes that are over go, and the oldest ones of a full table."""
        self._windows.pop(caller, None)
        # All minutes are equally long, so the table, in the order of their begin, is in that of their end too.
        while self._windows:
            oldest = next(iter(self._windows))
            if self._windows[oldest][0] > now_s and len(self._windows) < _CALLERS_MAX:
                break
            del self._windows[oldest]


@dataclass(slots=True)
class BusiestMinute:
    """The most requests that came within any 60 seconds: what a client's budget must hold."""

    requests: int = 0
    _came_at_s: deque[float] = field(default_factory=lambda: deque(maxlen=_COUNTED_MAX))

    def count(self, now_s: float) -> None:
        """Count a request that comes at `now_s`, of a clock that never goes back."""
        self._came_at_s.append(now_s)
        while self._came_at_s[0] <= now_s - _WINDOW_SECONDS:
            self._came_at_s.popleft()
        self.requests = max(self.requests, len(self._came_at_s))
