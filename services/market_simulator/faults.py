"""Faults on command, for tests: what kinds there are, and which one is due for a request. Pure.

A fault is due `times` times or for some seconds, for requests whose path begins with `path` and, when it names
symbols, that ask for one of them. Faults that spoil the body add up; of those that replace the answer the first wins.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

FAULTS_MAX = 100
DATA_PATHS = ("/v2/stocks", "/v1beta3/crypto")

_SymbolText = Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[!-~]+$")]


def _known_path(path: str) -> str:
    if not path.startswith("/v"):
        raise ValueError("must begin with /v, as Alpaca's paths do")
    return path


class _Fault(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    times: int | None = Field(
        default=None, ge=1, le=1_000_000, description="How often; 1 when nothing is said."
    )
    seconds: float | None = Field(
        default=None, gt=0, le=86_400, description="How long, instead of how often."
    )
    symbols: tuple[_SymbolText, ...] = Field(default=(), max_length=1000)
    path: Annotated[str, AfterValidator(_known_path)] | None = Field(
        default=None, max_length=200, description="Prefix of the path; market data when nothing is said."
    )

    @model_validator(mode="after")
    def _times_or_seconds(self) -> "_Fault":
        if self.times is not None and self.seconds is not None:
            raise ValueError("give times or seconds, not both")
        return self


class Replacement(_Fault):
    """Replaces the answer."""

    kind: Literal["bad_gateway", "empty_body", "reset", "unauthorized", "forbidden", "redirect"]


class RateLimited(_Fault):
    kind: Literal["rate_limited"]
    retry_after_seconds: int = Field(default=1, ge=0, le=3600)


class ServerError(_Fault):
    kind: Literal["server_error"]
    status: int = Field(default=500, ge=500, le=599)


class Hang(_Fault):
    """Sends nothing until the client leaves, at most for some seconds; then closes the connection."""

    kind: Literal["hang"]
    hang_seconds: float = Field(default=60.0, gt=0, le=600)


class ByteDrip(_Fault):
    """Sends head and body of the answer byte by byte; stops after ten minutes."""

    kind: Literal["byte_drip"]
    interval_seconds: float = Field(default=0.1, ge=0, le=60)


class Truncation(_Fault):
    """Cuts the JSON in the middle."""

    kind: Literal["truncated_json"]


class BadPrice(_Fault):
    kind: Literal["nan", "negative_price", "huge_price", "zero_price"]


class WrongTypes(_Fault):
    """Gives each price as another JSON type; `string` is the number in quotes, `text` is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    kind: Literal["wrong_types"]
    as_type: Literal["string", "text", "object", "bool", "array", "null"] = Field(
        default="string", alias="as"
    )


class BadSymbols(_Fault):
    """Leaves symbols out, or gives null for them: the named ones, or all."""

    kind: Literal["missing_symbols", "null_symbols"]


class UnknownSymbols(_Fault):
    """Adds symbols that nobody asked for."""

    kind: Literal["unknown_symbols"]
    symbols: tuple[_SymbolText, ...] = Field(default=("ZZZZ",), min_length=1, max_length=1000)


class OldTrades(_Fault):
    """Trades of months ago, or (out_of_order) older than the last one sent for the symbol."""

    kind: Literal["stale_trades", "out_of_order"]
    age_seconds: float | None = Field(
        default=None, gt=0, le=1e9, description="90 days for stale_trades, 60 s for out_of_order."
    )
    price: Decimal | None = Field(
        default=None, gt=0, max_digits=15, description="The price of those trades; the market's when None."
    )


Fault = Annotated[
    Replacement
    | RateLimited
    | ServerError
    | Hang
    | ByteDrip
    | Truncation
    | BadPrice
    | WrongTypes
    | BadSymbols
    | UnknownSymbols
    | OldTrades,
    Field(discriminator="kind"),
]

SPOILERS = (Truncation, BadPrice, WrongTypes, BadSymbols, UnknownSymbols, OldTrades)
"""The faults that change the answer's body; the others replace the answer."""


@dataclass(slots=True)
class _Pending:
    fault: Fault
    remaining: int | None
    ends_s: float | None


class Faults:
    """The faults that are due, oldest first."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(self, fault: Fault, now_s: float) -> None:
        """Order a fault; raises OverflowError when too many are waiting."""
        self._forget(now_s)
        if len(self._pending) >= FAULTS_MAX:
            raise OverflowError(f"{FAULTS_MAX} faults are waiting; delete them first")
        if fault.seconds is not None:
            self._pending.append(_Pending(fault, None, now_s + fault.seconds))
        else:
            self._pending.append(_Pending(fault, fault.times or 1, None))

    def clear(self) -> None:
        self._pending.clear()

    def take(self, path: str, symbols: frozenset[str], now_s: float) -> list[Fault]:
        """Return what is due for a request and count it: spoilers, and at most one other, which is the last."""
        self._forget(now_s)
        taken: list[Fault] = []
        for pending in self._pending:
            if not _concerns(pending.fault, path, symbols):
                continue
            if pending.remaining is not None:
                pending.remaining -= 1
            taken.append(pending.fault)
            if not isinstance(pending.fault, SPOILERS):
                break
        self._forget(now_s)
        return taken

    def listed(self, now_s: float) -> list[dict[str, Any]]:
        """Return the waiting faults for people."""
        self._forget(now_s)
        return [
            pending.fault.model_dump(
                mode="json", by_alias=True, exclude_none=True, exclude={"times", "seconds"}
            )
            | (
                {"times": pending.remaining}
                if pending.ends_s is None
                else {"seconds": round(pending.ends_s - now_s, 3)}
            )
            for pending in self._pending
        ]

    def _forget(self, now_s: float) -> None:
        self._pending = [
            pending
            for pending in self._pending
            if pending.remaining != 0 and (pending.ends_s is None or now_s < pending.ends_s)
        ]


def _concerns(fault: Fault, path: str, symbols: frozenset[str]) -> bool:
    if not path.startswith(DATA_PATHS if fault.path is None else fault.path):
        return False
    return isinstance(fault, UnknownSymbols) or not fault.symbols or not symbols.isdisjoint(fault.symbols)
