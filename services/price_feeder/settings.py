"""Settings of the price feeder."""

from datetime import timedelta
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from shared.settings import Port, ServiceSettings

TRADING_HOSTS = ("paper-api.alpaca.markets", "api.alpaca.markets")


def _plain_key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value().strip()
    if not all("!" <= character <= "~" for character in text):
        raise ValueError("must be plain letters and digits, without spaces")
    return SecretStr(text)


def _web_address(url: str) -> str:
    """Accept what people paste: with a slash or the API's version at the end."""
    url = url.strip().rstrip("/").removesuffix("/v2").rstrip("/")
    problem = "must be a web address such as https://data.alpaca.markets"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise ValueError(problem) from None
    if not valid or parts.query or parts.fragment:
        raise ValueError(problem)
    return url


def _stream_address(url: str) -> str:
    url = url.strip().rstrip("/").removesuffix("/v2").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("ws", "wss") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError("must be a websocket address such as wss://stream.data.alpaca.markets")
    return url


def _market_data_address(url: str) -> str:
    if urlsplit(url).hostname in TRADING_HOSTS:
        raise ValueError(
            "must be the market-data host (https://data.alpaca.markets); the trading host belongs in ALPACA_BASE_URL"
        )
    return url


Key = Annotated[SecretStr, AfterValidator(_plain_key)]
WebAddress = Annotated[str, AfterValidator(_web_address)]


class Settings(ServiceSettings):
    health_port: Port = Field(default=8082, description="Port of `/healthz`, `/readyz` and `/metrics`.")
    alpaca_api_key: Key | None = Field(
        default=None, description="Key id of the Alpaca account; needed while PRICE_UPDATE_ENABLED is true."
    )
    alpaca_secret_key: Key | None = Field(
        default=None,
        description="Secret key of the Alpaca account; needed while PRICE_UPDATE_ENABLED is true.",
    )
    alpaca_data_url: Annotated[WebAddress, AfterValidator(_market_data_address)] = Field(
        default="https://data.alpaca.markets", description="Market-data host, where prices come from."
    )
    alpaca_stream_url: Annotated[str, AfterValidator(_stream_address)] = Field(
        default="wss://stream.data.alpaca.markets", description="Host of the trade streams."
    )
    alpaca_base_url: WebAddress = Field(
        default="https://paper-api.alpaca.markets",
        description="Trading host, where the calendar of sessions comes from; no prices do.",
    )
    alpaca_feed: Literal["iex", "sip", "delayed_sip", "boats", "overnight", "otc"] = Field(
        default="iex", description="Source of equity prices; the free plan has `iex`."
    )
    price_update_enabled: bool = Field(
        default=True, description="Whether prices are fetched; when false the service runs and does nothing."
    )
    price_update_interval_seconds: Annotated[float, Field(ge=0.1, le=3600)] = Field(
        default=10, description="Seconds between two rounds; a fraction is allowed."
    )
    price_closed_interval_seconds: Annotated[float, Field(ge=0.1, le=86_400)] = Field(
        default=300, description="Seconds between two rounds for equities while their market is closed."
    )
    price_stream_enabled: bool = Field(
        default=True, description="Whether trades are streamed as well; polling goes on beside the streams."
    )
    alpaca_stream_symbols_max: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=30,
        description="Symbols that a stream carries, the most widely held ones; the free plan allows 30.",
    )
    price_replay_minutes: Annotated[float, Field(ge=0, le=60)] = Field(
        default=5, description="Minutes of ticks of every symbol that the stream PRICES keeps for a replay."
    )
    alpaca_requests_per_minute: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=200, description="Requests to Alpaca in any 60 seconds, at most."
    )
    price_refresh_cooldown_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        default=30, description="Seconds after which a user may ask for fresh prices again."
    )

    @property
    def interval(self) -> timedelta:
        return timedelta(seconds=self.price_update_interval_seconds)

    @property
    def closed_interval(self) -> timedelta:
        return timedelta(seconds=self.price_closed_interval_seconds)

    @property
    def refresh_cooldown(self) -> timedelta:
        return timedelta(seconds=self.price_refresh_cooldown_seconds)

    @property
    def replay(self) -> timedelta:
        return timedelta(minutes=self.price_replay_minutes)

    @model_validator(mode="after")
    def _keys_are_there(self) -> Self:
        keys = {"ALPACA_API_KEY": self.alpaca_api_key, "ALPACA_SECRET_KEY": self.alpaca_secret_key}
        missing = [name for name, key in keys.items() if key is None or not key.get_secret_value()]
        if self.price_update_enabled and missing:
            raise ValueError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: prices need a key of"
                " Alpaca (free at alpaca.markets); set PRICE_UPDATE_ENABLED=false to run without prices"
            )
        return self
