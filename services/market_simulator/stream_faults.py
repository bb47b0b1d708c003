"""Faults of streams on command, for tests. Pure.

Some happen once, to the streams that are open when they are ordered (`error`, `drop`, `garbage`, `half_frame`). The
others stand: those that refuse are due `times` times (once when nothing is said) or for some `seconds`, the rest for
some seconds or until the faults are deleted. A fault concerns the streams whose path begins with `path`, or all.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from services.market_simulator.stream_messages import ERRORS

STREAM_FAULTS_MAX = 100


def _known_path(path: str) -> str:
    if not path.startswith("/v"):
        raise ValueError("must begin with /v, as Alpaca's paths do")
    return path


def _known_code(code: int) -> int:
    if code not in ERRORS:
        raise ValueError(f"must be one of {', '.join(map(str, ERRORS))}")
    return code


ErrorCode = Annotated[int, AfterValidator(_known_code)]
CloseCode = Annotated[int, Field(ge=1000, le=4999)]


class _StreamFault(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, AfterValidator(_known_path)] | None = Field(default=None, max_length=200)


class _Once(_StreamFault):
    """Happens to the open streams when it is ordered."""


class _Standing(_StreamFault):
    seconds: float | None = Field(default=None, gt=0, le=86_400)


class _Counted(_Standing):
    times: int | None = Field(default=None, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _times_or_seconds(self) -> "_Counted":
        if self.times is not None and self.seconds is not None:
            raise ValueError("give times or seconds, not both")
        return self


class StreamError(_Once):
    """Sends an error; then closes the stream, if ordered."""

    kind: Literal["error"]
    code: ErrorCode = 500
    close: bool = False


class Drop(_Once):
    """Ends every open stream, with a close code or (without) by breaking the connection off."""

    kind: Literal["drop"]
    code: CloseCode | None = None
    after_seconds: float = Field(default=0.0, ge=0, le=3600)


class Garbage(_Once):
    """Sends one frame that is no message in any format."""

    kind: Literal["garbage"]


class HalfFrame(_Once):
    """Sends the begin of a frame and breaks the connection off."""

    kind: Literal["half_frame"]


class RefuseHandshake(_Counted):
    kind: Literal["refuse_handshake"]
    status: int = Field(default=503, ge=400, le=599)


class RefuseAuth(_Counted):
    """Answers the authentication with an error and closes."""

    kind: Literal["refuse_auth"]
    code: ErrorCode = 402


class RefuseSubscribe(_Counted):
    """Answers a subscription with an error; the stream stays open and subscribed to what it was."""

    kind: Literal["refuse_subscribe"]
    code: ErrorCode = 405


class MalformedMessage(_Counted):
    """Puts a malformed message into the middle of the next frames of market data, among the good ones."""

    kind: Literal["malformed"]
    message: Any = "not a message"


class Mute(_Standing):
    """Sends no market data, which is lost; answers everything else, pings too."""

    kind: Literal["mute"]


class Freeze(_Standing):
    """Does nothing at all: no handshake, no answer, no pong; market data of that time is lost."""

    kind: Literal["freeze"]


class Lag(_Standing):
    """Sends every frame some seconds late."""

    kind: Literal["lag"]
    lag_seconds: float = Field(gt=0, le=600)


class SlowDrip(_Standing):
    """Sends frames in small pieces with a pause after each; pongs wait for the frame to end."""

    kind: Literal["slow_drip"]
    piece_bytes: int = Field(default=1, ge=1, le=65_536)
    interval_seconds: float = Field(default=0.05, gt=0, le=60)


class SymbolLimit(_Standing):
    """Lowers (or raises) the number of symbols that a stream may have trades and quotes of, for new subscriptions."""

    kind: Literal["symbol_limit"]
    symbols_max: int = Field(ge=0, le=100_000)


class HeldConnection(_Standing):
    """Counts a stream as open for some seconds after it has ended: who reconnects sooner gets a 406."""

    kind: Literal["held_connection"]
    held_seconds: float = Field(gt=0, le=3600)


class DropAfter(_Standing):
    """Ends each stream some seconds after its authentication."""

    kind: Literal["drop_after"]
    after_seconds: float = Field(gt=0, le=3600)
    code: CloseCode | None = None


Once = StreamError | Drop | Garbage | HalfFrame
Standing = (
    RefuseHandshake
    | RefuseAuth
    | RefuseSubscribe
    | MalformedMessage
    | Mute
    | Freeze
    | Lag
    | SlowDrip
    | SymbolLimit
    | HeldConnection
    | DropAfter
)
StreamFault = Annotated[Once | Standing, Field(discriminator="kind")]

S = TypeVar("S", bound=Standing)


@dataclass(slots=True)
class _Due:
    fault: Standing
    remaining: int | None
    ends_s: float | None


class StreamFaults:
    """The faults that stand, oldest first; of several of a kind the oldest counts."""

    def __init__(self) -> None:
        self._due: list[_Due] = []

    def add(self, fault: Standing, now_s: float) -> None:
        """Order a fault; raises OverflowError when too many stand."""
        self._forget(now_s)
        if len(self._due) >= STREAM_FAULTS_MAX:
            raise OverflowError(f"{STREAM_FAULTS_MAX} faults of streams stand; delete them first")
        remaining = None
        if isinstance(fault, _Counted) and fault.seconds is None:
            remaining = fault.times or 1
        self._due.append(_Due(fault, remaining, None if fault.seconds is None else now_s + fault.seconds))

    def clear(self) -> None:
        self._due.clear()

    def standing(self, kind: type[S], path: str, now_s: float) -> S | None:
        """Return the fault of a kind that stands for a path."""
        if not self._due:
            return None
        self._forget(now_s)
        due = self._first(kind, path)
        return None if due is None else due[1]

    def take(self, kind: type[S], path: str, now_s: float) -> S | None:
        """Return the fault of a kind that is due for a path, and count it."""
        if not self._due:
            return None
        self._forget(now_s)
        due = self._first(kind, path)
        if due is None:
            return None
        if due[0].remaining is not None:
            due[0].remaining -= 1
        return due[1]

    def listed(self, now_s: float) -> list[dict[str, Any]]:
        """Return the faults that stand for people."""
        self._forget(now_s)
        return [
            due.fault.model_dump(mode="json", exclude_none=True, exclude={"times", "seconds"})
            | ({} if due.remaining is None else {"times": due.remaining})
            | ({} if due.ends_s is None else {"seconds": round(due.ends_s - now_s, 3)})
            for due in self._due
        ]

    def _first(self, kind: type[S], path: str) -> tuple[_Due, S] | None:
        for due in self._due:
            if isinstance(due.fault, kind) and path.startswith(due.fault.path or "/"):
                return due, due.fault
        return None

    def _forget(self, now_s: float) -> None:
        self._due = [
            due for due in self._due if due.remaining != 0 and (due.ends_s is None or now_s < due.ends_s)
        ]
