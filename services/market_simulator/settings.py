"""Settings of the market simulator, from the environment."""

from pathlib import Path

from pydantic import AwareDatetime, Field, SecretStr

from shared.settings import LogSettings, Port


class Settings(LogSettings):
    simulator_host: str = Field(
        default="127.0.0.1", description="Address that the market simulator listens on."
    )
    simulator_port: Port = Field(
        default=8090, description="Its port, for data, streams, trading host and /healthz."
    )
    simulator_seed: int = Field(default=1, description="Chooses the synthetic market's random walk.")
    simulator_replay_file: Path | None = Field(
        default=None,
        description="Recorded one-minute bars to replay, CSV or CSV.gz with the columns"
        " timestamp,symbol,open,high,low,close,volume; the synthetic market when empty.",
    )
    simulator_replay_speed: float = Field(
        default=60.0, ge=0, le=1e6, description="Recorded seconds that a replay plays in a real second."
    )
    simulator_replay_start: AwareDatetime | None = Field(
        default=None, description="RFC 3339 instant at which a replay starts; the first bar when empty."
    )
    simulator_rate_limit: int = Field(
        default=200, ge=1, description="Requests a minute that each key may make, as Alpaca's basic plan."
    )
    simulator_stream_symbols_max: int = Field(
        default=30,
        ge=0,
        description="Symbols that an `iex` stream may have trades and quotes of, as Alpaca's basic plan.",
    )
    simulator_api_key: SecretStr | None = Field(
        default=None, description="The only key id that is let in; any when empty."
    )
    simulator_secret_key: SecretStr | None = Field(
        default=None, description="The only secret key that is let in; any when empty."
    )
