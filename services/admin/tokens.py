"""Bearer tokens for the gateway, signed with the secret that it checks them with."""

from datetime import datetime, timedelta

import jwt

from services.admin.settings import TokenSettings

ALGORITHM = "HS256"


class TokensComeFromElsewhere(Exception):
    """No secret is set here to sign with; the text says what to do."""


def minted_token(settings: TokenSettings, subject: str, *, now: datetime, lifetime: timedelta) -> str:
    """Return a token for the user `subject` that is valid from `now` for `lifetime`."""
    if settings.jwt_jwks_url:
        raise TokensComeFromElsewhere(
            "JWT_JWKS_URL is set: the gateway trusts the tokens of that identity provider, get one there"
        )
    if settings.jwt_secret is None:
        raise TokensComeFromElsewhere("JWT_SECRET is not set: it must be the gateway's")
    claims: dict[str, object] = {"sub": subject, "iat": int(now.timestamp())}
    claims["exp"] = int((now + lifetime).timestamp())
    if settings.jwt_issuer:
        claims["iss"] = settings.jwt_issuer
    if settings.jwt_audience:
        claims["aud"] = settings.jwt_audience
    return jwt.encode(claims, settings.jwt_secret.get_secret_value(), algorithm=ALGORITHM)
