"""The contract of the answers. PostgreSQL writes them; these models describe and check them, strictly."""

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from services.api_gateway.performance import Timeframe


def _exact(value: Any) -> Any:
    """A JSON number without a fraction is a decimal too."""
    return Decimal(value) if type(value) is int else value


def _schema(description: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "number", "description": description})


_Exact = Annotated[Decimal, BeforeValidator(_exact), Field(allow_inf_nan=False)]
Dollars = Annotated[_Exact, Field(decimal_places=2), _schema("US dollars, two decimals.")]
SharePrice = Annotated[
    _Exact, Field(decimal_places=4), _schema("US dollars for one share or coin, two to four decimals.")
]
Quantity = Annotated[_Exact, Field(decimal_places=9), _schema("Shares or coins, up to nine decimals.")]
Percent = Annotated[_Exact, Field(decimal_places=2), _schema("Percent, two decimals.")]
Instant = Annotated[
    str,
    StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$"),
    Field(description="RFC 3339, in UTC.", json_schema_extra={"format": "date-time"}),
]
BucketStart = Annotated[
    str,
    StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:00Z$"),
    Field(description="Start of the bucket, RFC 3339, in UTC.", json_schema_extra={"format": "date-time"}),
]


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default")


def _only_when_present(schema: dict[str, Any]) -> None:
    """A field that is true or absent, never null."""
    del schema["anyOf"], schema["default"]
    schema.update({"type": "boolean", "const": True})


def _text_when_present(schema: dict[str, Any]) -> None:
    """A field that is a text or absent, never null."""
    (text,) = (choice for choice in schema.pop("anyOf") if choice != {"type": "null"})
    del schema["default"]
    schema.update(text | {"description": schema["description"]})


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Position(Answer):
    """A position that has a price."""

    ticker: str
    shares: Quantity
    cost_basis: Dollars
    current_value: Dollars
    price_per_share: SharePrice
    unrealized_gain_loss: Dollars
    unrealized_gain_loss_percent: Percent
    price_as_of: Instant
    price_status: Literal["live", "closed", "stale"] = Field(
        description="`live`: the feed confirmed the price within the last five minutes. `closed`: the market is closed "
        "and this is the last price of its session. `stale`: neither, the feed is behind. What trades outside the "
        "session (crypto, simulated prices) is never `closed`."
    )
    price_feed: str = Field(
        description="Where the price comes from: `iex`, `sip`, `us` (crypto) or `simulated`."
    )


class UnpricedPosition(Answer):
    """A position without a value; it is left out of the sums."""

    ticker: str
    shares: Quantity
    cost_basis: Dollars
    current_value: None
    price_per_share: None
    unrealized_gain_loss: None
    unrealized_gain_loss_percent: None
    price_status: Literal["missing"]
    reason: Literal["no_price", "value_out_of_range"] = Field(
        description="`no_price`: the feed has not had one yet. `value_out_of_range`: a trillion dollars or more."
    )


class Market(Answer):
    """The regular session of US equities, holidays and early closes included. Crypto trades at any time."""

    is_open: bool = Field(description="From the open until before the close.")
    next_open: Instant = Field(description="When the next session opens; RFC 3339, in UTC.")
    next_close: Instant = Field(
        description="When the session under way closes, else the next one; RFC 3339, in UTC."
    )


class CurrentPortfolio(Answer):
    """The portfolio at the last known prices."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "total_value": 125000.50,
                    "investment_value": 120000.00,
                    "cash_balance": 5000.50,
                    "positions": [
                        {
                            "ticker": "AAPL",
                            "shares": 100,
                            "cost_basis": 15000.00,
                            "current_value": 17500.00,
                            "price_per_share": 175.00,
                            "unrealized_gain_loss": 2500.00,
                            "unrealized_gain_loss_percent": 16.67,
                            "price_as_of": "2024-01-02T14:59:58.123456Z",
                            "price_status": "live",
                            "price_feed": "iex",
                        },
                        {
                            "ticker": "BTC/USD",
                            "shares": 2.5,
                            "cost_basis": 102500.00,
                            "current_value": 102500.00,
                            "price_per_share": 41000.00,
                            "unrealized_gain_loss": 0.00,
                            "unrealized_gain_loss_percent": 0.00,
                            "price_as_of": "2024-01-02T14:59:59Z",
                            "price_status": "live",
                            "price_feed": "us",
                        },
                    ],
                    "last_updated": "2024-01-02T15:00:00Z",
                    "price_fresh": True,
                    "unpriced": [],
                    "simulated": False,
                    "market": {
                        "is_open": True,
                        "next_open": "2024-01-03T14:30:00Z",
                        "next_close": "2024-01-02T21:00:00Z",
                    },
                }
            ]
        }
    )

    total_value: Dollars
    investment_value: Dollars
    cash_balance: Dollars
    positions: list[Position] = Field(description="In order of their ticker.")
    last_updated: Instant
    price_fresh: bool = Field(
        description="Every priced position's price is `live` or `closed`. "
        "False when there are positions and none has a price; true for cash alone."
    )
    unpriced: list[UnpricedPosition] = Field(description="In order of their ticker.")
    simulated: bool = Field(description="A price behind the value comes from a market simulator.")
    market: Market


class DataPoint(Answer):
    """The last snapshot inside a bucket. A bucket without a snapshot has no point."""

    timestamp: BucketStart
    value: Dollars
    partial: Literal[True] | None = Field(
        default=None,
        description="Present when positions without a price are missing from the value.",
        json_schema_extra=_only_when_present,
    )


class Performance(Answer):
    """The portfolio's total value over the timeframe, until now or until an instant of the past."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "timeframe": "1D",
                    "data_points": [
                        {"timestamp": "2024-01-01T09:30:00Z", "value": 120000.00},
                        {"timestamp": "2024-01-01T09:35:00Z", "value": 120500.00},
                    ],
                    "start_value": 120000.00,
                    "current_value": 125000.50,
                    "profit_loss": 5000.50,
                    "profit_loss_percent": 4.17,
                    "data_available": True,
                    "simulated": False,
                }
            ]
        }
    )

    timeframe: Timeframe
    until: BucketStart | None = Field(
        default=None,
        description="Present when the range is over: its end, which no point has reached. It is the `until` that was "
        "asked for, or the end of the last bucket before it.",
        json_schema_extra=_text_when_present,
    )
    data_points: list[DataPoint] = Field(description="Oldest first.")
    start_value: Dollars | None = Field(description="The first point's value; null without a point.")
    current_value: Dollars | None = Field(
        description="The live value, which is the `total_value` of the current portfolio, never null. When the range "
        "is over, the last point's value; null without a point."
    )
    profit_loss: Dollars | None = Field(description="`current_value` - `start_value`; null without a point.")
    profit_loss_percent: Percent | None = Field(
        description="Of `start_value`, 0 when that is 0; null without a point."
    )
    data_available: bool = Field(description="There is at least one point.")
    simulated: bool = Field(description="A price behind the values comes from a market simulator.")


class PortfolioChange(Answer):
    """The event `change`: the totals, and of the positions those that have changed."""

    total_value: Dollars
    investment_value: Dollars
    cash_balance: Dollars
    last_updated: Instant
    price_fresh: bool
    simulated: bool
    market: Market
    positions: list[Position] = Field(description="Whole, in order of their ticker.")


class Heartbeat(Answer):
    """The event `heartbeat`: there was no other for a while."""

    at: Instant
    last_updated: Instant
    price_fresh: bool


class StreamEnd(Answer):
    """The event `end`: the stream closes."""

    reason: Literal["token_expired", "user_deactivated", "user_unknown", "going_away"] = Field(
        description="`going_away`: the gateway stops; connect again, there may be another one."
    )


class Ticket(Answer):
    """What opens one stream, as `?ticket=`, without a header."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "ticket": "7Ux1tOYoXEzJBZcB_wAJvbFvP5REd8Hz_tZCK7L3Qxg",
                    "expires_at": "2024-01-02T15:02:40.123456Z",
                }
            ]
        }
    )

    ticket: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")]
    expires_at: Instant


class TakenSnapshot(Answer):
    """A snapshot that was taken because the user asked for it; a point of his charts like any other."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "timestamp": "2024-01-02T15:02:10.123456Z",
                    "total_value": 125000.50,
                    "cash_balance": 5000.50,
                    "investment_value": 120000.00,
                    "unpriced_positions": 0,
                    "partial": False,
                    "simulated": False,
                }
            ]
        }
    )

    timestamp: Instant
    total_value: Dollars
    cash_balance: Dollars
    investment_value: Dollars
    unpriced_positions: int = Field(
        ge=0, description="Positions without a price, which are left out of the values."
    )
    partial: bool = Field(description="There are such positions.")
    simulated: bool = Field(description="A price behind it comes from a market simulator.")


class RefreshedPrices(Answer):
    """What asking the market for the prices of the user's symbols brought."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "refreshed_at": "2024-01-02T15:02:10.123456Z",
                    "symbols": 3,
                    "confirmed": 2,
                    "changed": 1,
                    "rejected": 1,
                }
            ]
        }
    )

    refreshed_at: Instant
    symbols: int = Field(ge=0, description="Symbols that the user holds.")
    confirmed: int = Field(
        ge=0, description="Of these, how many have a price that is now known to be the last."
    )
    changed: int = Field(ge=0, description="Of these, how many have another price than before.")
    rejected: int = Field(ge=0, description="Symbols for which the market had no usable price.")


class ProblemDetails(BaseModel):
    """RFC 9457 problem details; `type` is stable and may be compared with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Annotated[str, StringConstraints(pattern=r"^urn:foliotick:problem:[a-z-]+$")]
    title: str
    status: int
    detail: str
    request_id: str = Field(description="Finds the request in the log; also the header X-Request-Id.")
    allowed: list[str] = Field(
        default=[], description="What would have been accepted.", json_schema_extra=_without_default
    )
    known: list[str] = Field(
        default=[], description="The query parameters that exist.", json_schema_extra=_without_default
    )


class Health(BaseModel):
    """The process runs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    service: str
    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether what the gateway needs answers. Why something does not is said on the health port, to operators alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    service: str
    status: Literal["ready", "degraded", "not ready"]
    checks: dict[str, Literal["ok", "degraded", "failed"]]
