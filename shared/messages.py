"""Every subject and payload of the bus, version 1, and the symbol codec.

Payloads are frozen; decimals travel as strings and times as RFC 3339 in UTC; readers ignore unknown fields.
A breaking change is a new version, served side by side with this one.
"""

import re
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from shared.money import Price

Symbol = Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[!-~]+$")]
"""The instrument at the venue: `AAPL`, `BRK.B`, `BTC/USD`. Printable ASCII without spaces, as `positions.ticker`."""


class AssetClass(StrEnum):
    EQUITY = "equity"
    CRYPTO = "crypto"


def asset_class(symbol: str) -> AssetClass:
    """A crypto symbol is a pair with a slash; all others are equities."""
    return AssetClass.CRYPTO if "/" in symbol else AssetClass.EQUITY


# ---- subjects ------------------------------------------------------------------------------------

ALL_PRICES = "prices.v1.>"
SNAPSHOT_DUE = "timer.v1.snapshot"
SNAPSHOTS_TAKEN = "portfolio.v1.snapshots_taken"
FEED_STATUS = "feed.v1.status"


def price_subject(symbol: str) -> str:
    """Return the subject of a symbol's ticks: `prices.v1.equity.BRK_2EB` for `BRK.B`."""
    return f"prices.v1.{asset_class(symbol)}.{symbol_token(symbol)}"


def symbol_token(symbol: str) -> str:
    """Encode a symbol as one subject token: every byte outside `[A-Za-z0-9-]` becomes `_XX` in hex."""
    return re.sub(rb"[^A-Za-z0-9-]", lambda byte: b"_%02X" % ord(byte[0]), symbol.encode()).decode()


def symbol_of_token(token: str) -> str:
    """Decode what `symbol_token` made; raises ValueError for anything else."""
    symbol = re.sub(rb"_([0-9A-F]{2})", lambda code: bytes([int(code[1], 16)]), token.encode()).decode()
    if symbol_token(symbol) != token:
        raise ValueError(f"{token!r} is not a symbol token")
    return symbol


# ---- payloads ------------------------------------------------------------------------------------


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PriceTick(Message):
    """A symbol's last trade has changed. On `prices.v1.<class>.<token>`, last value kept."""

    symbol: Symbol
    price: Price
    traded_at: AwareDatetime = Field(description="When the trade happened at the venue.")
    received_at: AwareDatetime = Field(description="When the price feeder received it.")
    feed: str = Field(description="Where it comes from: `iex`, `sip`, `us` (crypto) or `simulated`.")
    sequence: int = Field(ge=1, description="Counts the symbol's changes, without gaps.")


class SnapshotDue(Message):
    """A shard's portfolios are to be valued for a slot. On `timer.v1.snapshot`, at least once."""

    scheduled_at: AwareDatetime
    shard: int = Field(default=0, ge=0)
    shards: int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="after")
    def _shard_exists(self) -> Self:
        if self.shard >= self.shards:
            raise ValueError(f"there is no shard {self.shard} of {self.shards}")
        return self


class SnapshotsTaken(Message):
    """A shard's snapshots of a slot are committed. On `portfolio.v1.snapshots_taken`."""

    scheduled_at: AwareDatetime
    shard: int
    shards: int
    portfolios: int
    positions: int
    unpriced: int


class FeedState(StrEnum):
    LIVE = "live"
    POLLING = "polling"
    STALE = "stale"
    MARKET_CLOSED = "market_closed"
    STOPPED = "stopped"


class FeedStatus(Message):
    """The state of the price feed has changed. On `feed.v1.status`, last value kept."""

    state: FeedState
    since: AwareDatetime
    detail: str


# ---- streams -------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """A JetStream stream: what is kept of the subjects, and for how long."""

    name: str
    subjects: tuple[str, ...]
    last_value_only: bool = False
    max_age: timedelta | None = None


PRICES = Stream("PRICES", (ALL_PRICES,), last_value_only=True)
FEED = Stream("FEED", (FEED_STATUS,), last_value_only=True)
TIMER = Stream("TIMER", (SNAPSHOT_DUE,), max_age=timedelta(days=2))
PORTFOLIO = Stream("PORTFOLIO", (SNAPSHOTS_TAKEN,), max_age=timedelta(days=7))

STREAMS = (PRICES, FEED, TIMER, PORTFOLIO)
