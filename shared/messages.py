"""Every subject and payload of the bus, version 1, and the symbol codec.

Payloads are frozen; decimals travel as strings and times as RFC 3339 in UTC; readers ignore unknown fields.
A breaking change is a new version, served side by side with this one.
"""

import re
from base64 import b64decode
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, NamedTuple, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from shared.money import Money, Price

Symbol = Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[!-~]+$")]
"""The instrument at the venue: `AAPL`, `BRK.B`, `BTC/USD`. Printable ASCII without spaces, as `positions.ticker`."""


INTEGER_MAX, BIGINT_MAX = 2**31 - 1, 2**63 - 1
"""The largest numbers that columns of the tables hold."""

UserId = Annotated[int, Field(ge=1, le=INTEGER_MAX)]
FeedName = Annotated[str, StringConstraints(max_length=32)]


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
SNAPSHOT_REQUESTED = "portfolio.v1.snapshot_requested"
REQUESTED_SNAPSHOT_TAKEN = "portfolio.v1.requested_snapshot_taken"
FEED_STATUS = "feed.v1.status"
PRICES_CONFIRMED = "feed.v1.confirmed"
PRICES_REQUESTED = "feed.v1.prices_requested"
REFRESH_REQUESTED = "feed.v1.refresh_requested"
ALL_TICKETS = "gateway.v1.tickets.*"
ALL_DEAD_LETTERS = "dead_letters.v1.*"
ALL_PROBES = "probes.v1.*"


def price_subject(symbol: str) -> str:
    """Return the subject of a symbol's ticks: `prices.v1.equity.BRK_2EB` for `BRK.B`."""
    return f"prices.v1.{asset_class(symbol)}.{symbol_token(symbol)}"


def ticket_subject(digest: str) -> str:
    """Return the subject of a ticket that a gateway gave out; `digest` is one token."""
    return f"gateway.v1.tickets.{digest}"


def dead_letter_subject(consumer: str) -> str:
    """Return the subject of the messages that a consumer has put aside."""
    return f"dead_letters.v1.{consumer}"


def probe_subject(service: str) -> str:
    """Return the subject on which a service looks whether JetStream stores what it is told."""
    return f"probes.v1.{service}"


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

    symbol: Symbol = Field(description="The instrument at the venue: `AAPL`, `BRK.B`, `BTC/USD`.")
    price: Price = Field(description="Of the last trade, in US dollars per share or coin.")
    traded_at: AwareDatetime = Field(description="When the trade happened at the venue.")
    received_at: AwareDatetime = Field(description="When the price feeder received it.")
    feed: FeedName = Field(description="Where it comes from: `iex`, `sip`, `us` (crypto) or `simulated`.")
    sequence: int = Field(ge=1, le=BIGINT_MAX, description="Counts the symbol's changes, without gaps.")


class SnapshotDue(Message):
    """A shard's portfolios are to be valued for a slot. On `timer.v1.snapshot`, at least once."""

    scheduled_at: AwareDatetime = Field(description="The slot; becomes the timestamp of its snapshots.")
    shard: int = Field(default=0, ge=0, description="Which of the shards, counted from 0.")
    shards: int = Field(
        default=1, ge=1, le=1024, description="Into how many units of work the slot is divided."
    )

    @model_validator(mode="after")
    def _shard_exists(self) -> Self:
        if self.shard >= self.shards:
            raise ValueError(f"there is no shard {self.shard} of {self.shards}")
        return self


class SnapshotsTaken(Message):
    """A shard's snapshots of a slot are committed. On `portfolio.v1.snapshots_taken`."""

    scheduled_at: AwareDatetime = Field(description="The slot, and the timestamp of its snapshots.")
    shard: int = Field(description="Which of the shards, counted from 0.")
    shards: int = Field(description="Into how many units of work the slot is divided.")
    portfolios: int = Field(description="Snapshots of portfolios.")
    positions: int = Field(description="Positions with a price in them.")
    unpriced: int = Field(description="Positions without a price, left out of the values.")


class SnapshotRequested(Message):
    """A user wants a snapshot now. A request on `portfolio.v1.snapshot_requested`; the answer is `SnapshotTaken`.

    Refused with 429 while the user's last request is too young, 404 for an unknown user, 403 for a deactivated one.
    """

    user_id: UserId = Field(description="As `users.id`.")
    requested_at: AwareDatetime = Field(description="Becomes the snapshot's timestamp.")


class SnapshotTaken(Message):
    """A user's requested snapshot is committed. On `portfolio.v1.requested_snapshot_taken`."""

    user_id: UserId = Field(description="As `users.id`.")
    timestamp: AwareDatetime = Field(description="The snapshot's; the moment of the request.")
    total_value: Money = Field(description="Investment value and cash, in US dollars.")
    cash_balance: Money = Field(description="In US dollars.")
    investment_value: Money = Field(description="The sum of all priced positions, in US dollars.")
    unpriced_positions: int = Field(ge=0, description="Positions without a price, left out of the values.")
    simulated: bool = Field(description="A price behind it comes from a market simulator.")


class FeedState(StrEnum):
    LIVE = "live"
    """Every symbol that may be streamed is, and what is streamed is heard."""
    POLLING = "polling"
    """Prices are asked for on every interval; streams are off, away or not whole."""
    STALE = "stale"
    """No price was confirmed for a while, though the market is open."""
    MARKET_CLOSED = "market_closed"
    """Only session-bound symbols are held, and there is no session."""
    STOPPED = "stopped"


class FeedStatus(Message):
    """The state of the price feed has changed. On `feed.v1.status`, last value kept."""

    state: FeedState
    since: AwareDatetime = Field(description="When it came to that.")
    detail: str = Field(description="Why, for a person.")
    streamed: int = Field(default=0, ge=0, description="Held symbols whose trades are streamed.")
    polled: int = Field(default=0, ge=0, description="Held symbols that are polled alone.")


class PricesConfirmed(Message):
    """The last prices of these symbols are still the last. On `feed.v1.confirmed`, after every round or refresh.

    It names what was asked for, at most 2,000 symbols: several messages may belong to a round, and a refresh has few
    symbols. The last value that the stream keeps is therefore not the whole list; a request for prices has them all.
    A `PriceTick` confirms its own symbol at `received_at`. A price that nothing has confirmed for five minutes, while
    its market is open, is stale.
    """

    confirmed_at: AwareDatetime = Field(description="When these prices were known to be the last.")
    symbols: tuple[Symbol, ...] = Field(description="The confirmed ones, in no order.")


class PricesRequested(Message):
    """What do these symbols cost? A request on `feed.v1.prices_requested`; the answer is `PricesReply`."""

    symbols: tuple[Symbol, ...] = Field(
        min_length=1,
        max_length=1000,
        description="Of whatever class; one that is named twice is answered once.",
    )


class CurrentPrice(PriceTick):
    """A symbol's last price, and when the feed last confirmed that it is the last."""

    confirmed_at: AwareDatetime = Field(description="When the feed last knew that this price is the last.")


class PricesReply(Message):
    """The prices that are known, in the order of the request, and the symbols without one."""

    prices: tuple[CurrentPrice, ...] = Field(description="Of the symbols that have one.")
    unknown: tuple[Symbol, ...] = Field(
        description="Symbols without a price: not held, or unknown to the market."
    )


class RefreshRequested(Message):
    """A user wants the prices of what he holds now. A request on `feed.v1.refresh_requested`.

    The answer is `PricesRefreshed`. Refused with 429 while the user's last request is too young, 404 for an unknown
    user, 503 while prices cannot be asked for.
    """

    user_id: UserId = Field(description="As `users.id`.")
    requested_at: AwareDatetime = Field(description="When the user asked.")


class PricesRefreshed(Message):
    """The market was asked for the prices of a user's symbols."""

    refreshed_at: AwareDatetime = Field(description="When the answers of the market were stored.")
    symbols: int = Field(ge=0, description="Symbols that the user holds.")
    confirmed: int = Field(
        ge=0, description="Of these, how many have a price that is now known to be the last."
    )
    changed: int = Field(ge=0, description="Of these, how many have another price than before.")
    rejected: int = Field(ge=0, description="Symbols for which the market had no usable price.")


class StreamTicket(Message):
    """What a ticket to the portfolio stream stands for. On `gateway.v1.tickets.<digest of the ticket>`, taken once."""

    subject: str = Field(description="Whose portfolio, as the bearer token said.")
    ticket_expires_at: AwareDatetime = Field(description="Until when a stream may be begun with it.")
    token_expires_at: AwareDatetime = Field(description="When the stream ends.")


class DeadLetter(Message):
    """A message that could not be handled and was put aside. On `dead_letters.v1.<consumer>`, for an operator.

    `admin dead-letters` lists them, `admin replay-dead-letter` publishes one again as it was.
    """

    subject: str = Field(description="Where the message was published.")
    payload: str = Field(description="What it said, in base64; of a message that is too large the beginning.")
    size: int = Field(ge=0, description="Bytes of the message; more than the payload has when that was cut.")
    reason: str = Field(description="Why it could not be handled, for a person.")
    deliveries: int = Field(ge=1, description="How often it was delivered.")
    published_at: AwareDatetime = Field(description="When it was published.")
    put_aside_at: AwareDatetime = Field(description="When it was put aside.")
    put_aside_by: str = Field(description="The service that did.")

    @field_validator("payload")
    @classmethod
    def _is_base64(cls, text: str) -> str:
        b64decode(text, validate=True)  # its error is a ValueError
        return text

    @property
    def content(self) -> bytes:
        """What the message said, or the beginning of it."""
        return b64decode(self.payload)

    @property
    def is_whole(self) -> bool:
        """Tell whether all of the message is here, so that it can be published again."""
        return len(self.content) == self.size


PROBE_BYTES = 4096


class Probe(Message):
    """A service looks whether JetStream stores what it is told. On `probes.v1.<service>`, last value kept."""

    probed_at: AwareDatetime = Field(description="When the service looked.")
    filler: str = Field(
        default="-" * PROBE_BYTES, description="As much as a disk gives at once, so that it needs room."
    )


# ---- streams -------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """A JetStream stream: what is kept of the subjects, and for how long."""

    name: str
    subjects: tuple[str, ...]
    messages_per_subject: int | None = None
    """The newest so many of each subject are kept, however old; None: all."""
    max_age: timedelta | None = None
    in_memory: bool = False
    bytes_max: int | None = None
    """A stream that has reached it refuses what would make it larger; a subject that has all it may keep goes on."""
    discards_oldest: bool = False
    """A stream that has reached its bounds discards its oldest messages instead."""
    messages_max: int | None = None
    recoverable: bool = False
    """What is in it can be published again, so that it need not be on the platter before it is acknowledged."""


TICKS_PER_SECOND_MAX = 4
"""Ticks of a symbol that the feeder publishes in a second, at most."""
PRICE_REPLAY_DEFAULT = timedelta(minutes=5)
PRICES_BYTES_MAX = 1024 * 1024 * 1024
"""Half of what the server may keep in files: ticks must not fill it, as slots and snapshots need it too."""


def prices_stream(replay: timedelta) -> Stream:
    """Return the stream of ticks, from which at least the last `replay` of every symbol can be had.

    What is kept is counted, not aged: the last value of a symbol that has not traded for days is there. All of them are
    in PostgreSQL, and the feeder publishes them again when the server has been away.
    """
    kept = max(1, int(replay.total_seconds() * TICKS_PER_SECOND_MAX))
    return Stream("PRICES", (ALL_PRICES,), kept, bytes_max=PRICES_BYTES_MAX, recoverable=True)


PRICES = prices_stream(PRICE_REPLAY_DEFAULT)
FEED = Stream("FEED", (FEED_STATUS, PRICES_CONFIRMED), messages_per_subject=1)
# A message takes about so many bytes there: a due shard 190, a shard that was taken 260, a requested snapshot 330, a
# ticket 250. Together with PRICES it is three quarters of what the server may keep, so that none takes another's share.
TIMER = Stream(
    "TIMER",
    (SNAPSHOT_DUE,),
    max_age=timedelta(days=2),
    bytes_max=128 * 1024 * 1024,  # 700,000 of them: a slot every second in four shards
    discards_oldest=True,
)
PORTFOLIO = Stream(
    "PORTFOLIO",
    (SNAPSHOTS_TAKEN, REQUESTED_SNAPSHOT_TAKEN),
    max_age=timedelta(days=7),
    bytes_max=256 * 1024 * 1024,  # 800,000 of them: 10,000 users who ask eleven times a day
    discards_oldest=True,
)
TICKETS = Stream(
    "TICKETS",
    (ALL_TICKETS,),
    max_age=timedelta(minutes=1),
    in_memory=True,
    bytes_max=16 * 1024 * 1024,  # 65,000 of them, a quarter of the memory; nobody loses one that he has
)
DEAD_LETTER_PAYLOAD_BYTES_MAX = 64 * 1024
"""So that a letter, with its payload in base64, is far below what the server takes (256 KB)."""
DEAD_LETTERS = Stream(
    "DEAD_LETTERS",
    (ALL_DEAD_LETTERS,),
    max_age=timedelta(days=30),
    messages_max=1000,
    bytes_max=32 * 1024 * 1024,
    discards_oldest=True,
)
PROBES = Stream("PROBES", (ALL_PROBES,), messages_per_subject=1)

STREAMS = (PRICES, FEED, TIMER, PORTFOLIO, TICKETS, DEAD_LETTERS, PROBES)
