"""Settings of the API gateway."""

from typing import Annotated
from urllib.parse import parse_qs

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from shared.settings import DatabaseUrl, JwtSecret, Port, ServiceSettings, Timezone, parts_of_url


def _http_url(value: str) -> str:
    parts = parts_of_url(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an https:// or http:// URL")
    return value


def _separated(value: object) -> object:
    if isinstance(value, str):
        return tuple(part for part in (piece.strip() for piece in value.split(",")) if part)
    return value


def _origins(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        parts = parts_of_url(value)
        if (
            parts.scheme not in ("http", "https")
            or value != f"{parts.scheme}://{parts.netloc}"
            or "*" in value
        ):
            raise ValueError(
                "origins with commas between, each like https://app.example.com, without a path or `*`"
            )
    return values


def _single_server(url: SecretStr) -> SecretStr:
    parts = parts_of_url(url.get_secret_value())
    if any("," in host for host in (parts.netloc.rpartition("@")[2], *parse_qs(parts.query).get("host", ()))):
        raise ValueError("the URL of one server: how far it is behind is measured, not that of another")
    return url


class Settings(ServiceSettings):
    """The API gateway. Exactly one of JWT_SECRET and JWT_JWKS_URL says which tokens it trusts."""

    gateway_host: str = Field(default="0.0.0.0", description="Address that the API listens on.")  # noqa: S104
    gateway_port: Port = Field(default=8000, description="Port that the API listens on.")
    health_port: Port = Field(
        default=8081, description="Port of the gateway's /healthz, /readyz and /metrics."
    )
    jwt_secret: JwtSecret | None = Field(
        default=None, description="Shared secret of HS256 tokens, at least 32 bytes. Or set JWT_JWKS_URL."
    )
    jwt_jwks_url: Annotated[str, AfterValidator(_http_url)] | None = Field(
        default=None,
        validate_default=True,
        description="Where the token issuer publishes its public keys (RS256, ES256, EdDSA). Or set JWT_SECRET.",
    )
    jwt_issuer: str | None = Field(default=None, description="The `iss` that tokens must have; unset: any.")
    jwt_audience: str | None = Field(default=None, description="The `aud` that tokens must have; unset: any.")
    market_timezone: Timezone = Field(
        default="America/New_York", description="Time zone of the market dates that daily charts are made of."
    )
    cors_allowed_origins: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_separated), AfterValidator(_origins)
    ] = Field(
        default=(), description="Origins of web pages that may call the API, commas between; empty: none."
    )
    request_timeout_seconds: float = Field(
        default=5.0, gt=0, le=8, description="A request that takes longer is answered with 503."
    )
    gateway_database_connections: int = Field(
        default=10, ge=1, le=200, description="The most connections that one gateway opens to PostgreSQL."
    )
    gateway_connections_max: int = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="Connections of clients that one gateway holds, at most, streams among them.",
    )
    user_requests_per_second: float = Field(
        default=50.0,
        ge=0,
        le=100_000,
        description="Requests a second that one gateway takes from each user; with 0 any number.",
    )
    user_requests_burst: int = Field(
        default=200, ge=1, le=1_000_000, description="Of these, how many may come at once after a pause."
    )
    gateway_drain_seconds: float = Field(
        default=2.0,
        ge=0,
        le=5,
        description="Seconds that a gateway still serves after SIGTERM, no longer ready, so that balancers leave it.",
    )
    database_read_url: Annotated[DatabaseUrl, AfterValidator(_single_server)] | None = Field(
        default=None,
        description="A streaming replica of DATABASE_URL's server to read from, one server, no balancer; unset: none.",
    )
    read_replica_lag_seconds_max: float = Field(
        default=5.0,
        ge=1,
        le=60,
        description="Seconds that the replica may be behind; while it is further behind, reads come from the primary.",
    )
    database_listen_url: DatabaseUrl | None = Field(
        default=None,
        description="DATABASE_URL's server past any pooler of transactions, to hear what changes; unset: DATABASE_URL.",
    )
    gateway_streams_max: int = Field(
        default=5000, ge=1, le=100_000, description="Portfolio streams that one gateway keeps open, at most."
    )
    stream_heartbeat_seconds: float = Field(
        default=15.0,
        ge=1,
        le=300,
        description="After so many seconds without an event a stream sends a heartbeat.",
    )
    gateway_chart_cache_megabytes: int = Field(
        default=64, ge=0, le=4096, description="Memory for finished charts; with 0 none is kept."
    )

    gateway_page_token: SecretStr | None = Field(
        default=None,
        description="A token that the page signs in with by itself, on this machine alone; for demonstrations.",
    )

    @field_validator("jwt_jwks_url")
    @classmethod
    def _exactly_one_trust(cls, url: str | None, info: ValidationInfo) -> str | None:
        if "jwt_secret" not in info.data:  # wrong by itself, and said so already
            return url
        if url is None and info.data["jwt_secret"] is None:
            raise ValueError("set when JWT_SECRET is not: the gateway must know whose tokens to trust")
        if url is not None and info.data["jwt_secret"] is not None:
            raise ValueError("unset when JWT_SECRET is set: a gateway trusts one of the two")
        return url
