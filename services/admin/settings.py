"""Settings of the administrator's commands: the database, or what tokens are signed with."""

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from shared.settings import DatabaseUrl, LogSettings

SECRET_BYTES_MIN = 32


def _long_enough(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value().encode()) < SECRET_BYTES_MIN:
        raise ValueError(f"at least {SECRET_BYTES_MIN} bytes long")
    return secret


class DatabaseSettings(LogSettings):
    """What the commands about users and positions need."""

    database_url: DatabaseUrl = Field(
        description="PostgreSQL 16 or later, `postgresql://user:password@host:port/database`."
    )


class TokenSettings(LogSettings):
    """What minting a token needs: the gateway's own settings."""

    jwt_secret: Annotated[SecretStr, AfterValidator(_long_enough)] | None = Field(
        default=None,
        description="Secret that bearer tokens are signed with (HS256), at least 32 bytes.",
    )
    jwt_jwks_url: str | None = Field(
        default=None, description="Where the identity provider publishes its keys, instead of JWT_SECRET."
    )
    jwt_issuer: str | None = Field(default=None, description="The `iss` that tokens must have.")
    jwt_audience: str | None = Field(default=None, description="The `aud` that tokens must have.")
