"""Settings of the administrator's commands: the database, the bus, or what tokens are signed with."""

from pydantic import Field

from shared.settings import BusSettings, DatabaseUrl, JwtSecret, LogSettings


class DatabaseSettings(LogSettings):
    """What the commands about users and positions need."""

    database_url: DatabaseUrl = Field(
        description="PostgreSQL 16 or later, `postgresql://user:password@host:port/database`."
    )


class DeadLetterSettings(BusSettings):
    """What the commands about dead letters need."""


class TokenSettings(LogSettings):
    """What minting a token needs: the gateway's own settings."""

    jwt_secret: JwtSecret | None = Field(
        default=None,
        description="Secret that bearer tokens are signed with (HS256), at least 32 bytes.",
    )
    jwt_jwks_url: str | None = Field(
        default=None, description="Where the identity provider publishes its keys, instead of JWT_SECRET."
    )
    jwt_issuer: str | None = Field(default=None, description="The `iss` that tokens must have.")
    jwt_audience: str | None = Field(default=None, description="The `aud` that tokens must have.")
