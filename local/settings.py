"""Settings of `make run`, and the environment that it gives to each service."""

import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from pydantic import Field, SecretStr

from shared.settings import LogSettings, Port

ROOT = Path(__file__).resolve().parent.parent

# What the local system decides itself, whatever `.env` says for containers.
_OWN = (
    "DATABASE_URL",
    "NATS_URL",
    "NATS_STREAM_REPLICAS",
    "JWT_SECRET",
    "JWT_JWKS_URL",
    "JWT_ISSUER",
    "JWT_AUDIENCE",
    "HEALTH_PORT",
    "GATEWAY_PAGE_TOKEN",
)


SIMULATED_KEYS = {"ALPACA_API_KEY": "simulated", "ALPACA_SECRET_KEY": "simulated"}


class LocalSettings(LogSettings):
    local_data_dir: Path = Field(
        default=Path(".foliotick"), description="Folder of `make run`: databases, logs, secrets."
    )
    gateway_host: str = Field(default="127.0.0.1", description="Address that the API listens on.")
    gateway_port: Port = Field(default=8000, description="Port that the API listens on.")
    alpaca_api_key: SecretStr | None = Field(
        default=None, description="Key id of the Alpaca account; without one the market is simulated."
    )

    alpaca_secret_key: SecretStr | None = Field(default=None, description="Secret key of the Alpaca account.")
    simulator_replay_file: Path | None = Field(
        default=None, description="Recorded bars to replay instead of the synthetic market."
    )

    @property
    def folder(self) -> Path:
        """Where everything is kept; a replayed market has a place of its own, as its dates are others."""
        folder = ROOT / self.local_data_dir
        return folder / "replay" if self.simulated and self.simulator_replay_file else folder

    @property
    def simulated(self) -> bool:
        return self.alpaca_api_key is None

    @property
    def page_signs_in(self) -> bool:
        """Whether the page has the demo user's token already.

        The gateway gives it to whoever asks from this machine, other accounts included. That is right for made-up
        portfolios at made-up prices, and no longer where the portfolio may be a person's own, or the network is let in.
        """
        return self.simulated and is_loopback(self.gateway_host)


def read_dotenv() -> None:
    """Add what `.env` sets and the environment does not."""
    for name, value in dotenv_values(ROOT / ".env").items():
        if value and name not in os.environ:
            os.environ[name] = value


def service_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a service: ours, less what `make run` decides itself, and `own`."""
    decided = {name for setting in _OWN for name in (setting, f"{setting}_FILE")}
    inherited = {name: value for name, value in os.environ.items() if name not in decided}
    return {**inherited, "PYTHONUNBUFFERED": "1", **own}


def is_loopback(host: str) -> bool:
    """Tell whether an address to listen on is for this machine alone; of names only `localhost` is known to be."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
