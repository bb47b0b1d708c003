"""Whose portfolio: the `sub` of a verified bearer token, never anything else of the request."""

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import jwt

from services.api_gateway.keys import IssuerKeys, Keys, SharedSecret
from services.api_gateway.problems import (
    TOKEN_EXPIRED,
    TOKEN_INVALID,
    TOKEN_MALFORMED,
    TOKEN_MISSING,
    Kind,
    Problem,
)
from services.api_gateway.settings import Settings

CLOCK_LEEWAY_SECONDS = 10
"""How far the issuer's clock may be ahead (`nbf`, `iat`). A token's end (`exp`) is taken to the second."""
SUBJECT_LENGTH_MAX = 255
REMEMBERED_SECONDS = 60.0
REMEMBERED_TOKENS_MAX = 4096
REMEMBERED_LENGTH_MAX = 2048
"""A longer header is verified each time, so that what is remembered takes 10 MB at most."""
REFUSED_SECONDS = 10.0
"""How long a token that was refused is refused again unseen; its issuer may have a new key by then."""
REFUSED_TOKENS_MAX = 1024

_UNKNOWN_KEY = "The token is signed with a key that its issuer does not have."
_NOT_A_SUBJECT = "The token's sub is not a subject."
_REFUSALS = (
    (jwt.ExpiredSignatureError, TOKEN_EXPIRED, "The token has expired."),
    (jwt.ImmatureSignatureError, TOKEN_INVALID, "The token is not valid yet."),
    (jwt.InvalidAlgorithmError, TOKEN_INVALID, "The token's algorithm is not accepted here."),
    (jwt.InvalidSignatureError, TOKEN_INVALID, "The token's signature is wrong."),
    (jwt.InvalidAudienceError, TOKEN_INVALID, "The token is for another audience."),
    (jwt.InvalidIssuerError, TOKEN_INVALID, "The token is from another issuer."),
    (jwt.exceptions.InvalidSubjectError, TOKEN_INVALID, _NOT_A_SUBJECT),
)


class Identity(NamedTuple):
    """Who a token says that its bearer is, and until when, in seconds since the epoch."""

    subject: str
    expires_at: float


class Verifier:
    """Verifies tokens, and remembers the verified ones for a minute, at most until they expire."""

    def __init__(self, keys: Keys, *, issuer: str | None, audience: str | None) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._remembered: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self._refused: OrderedDict[str, tuple[Kind, str, float]] = OrderedDict()

    async def check(self) -> str | None:
        """Return None when tokens can be verified, else why not. For readiness."""
        return await self._keys.check()

    async def identity(self, authorization: Sequence[str]) -> Identity:
        """Return the identity of the bearer token in the Authorization headers; raises Problem without a good one."""
        # Remembered under the header as it came: to take it apart and to hash it costs more than to find it.
        if len(authorization) == 1:
            remembered = self._remembered.get(authorization[0])
            if remembered is not None and time.time() < remembered[1]:
                return remembered[0]
            known = self._refused.get(authorization[0])
            if known is not None and time.time() < known[2]:
                raise _refused(known[0], known[1])
        token = _bearer_token(authorization)
        try:
            identity = await self._verified(token)
        except Problem as problem:
            self._remember_refusal(authorization[0], problem)
            raise
        if len(authorization[0]) <= REMEMBERED_LENGTH_MAX:
            until = min(identity.expires_at, time.time() + REMEMBERED_SECONDS)
            self._remembered[authorization[0]] = identity, until
            if len(self._remembered) > REMEMBERED_TOKENS_MAX:
                self._remembered.popitem(last=False)
        return identity

    def _remember_refusal(self, header: str, problem: Problem) -> None:
        """Remember a token that is not valid: who sends it again and again costs no signature each time."""
        is_final = problem.kind.status == 401 and problem.detail != _UNKNOWN_KEY  # it may be known any moment
        if is_final and len(header) <= REMEMBERED_LENGTH_MAX:
            self._refused[header] = problem.kind, problem.detail, time.time() + REFUSED_SECONDS
            if len(self._refused) > REFUSED_TOKENS_MAX:
                self._refused.popitem(last=False)

    async def _verified(self, token: str) -> Identity:
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in self._keys.algorithms:  # before any key is looked for
                raise jwt.InvalidAlgorithmError
            key = await self._keys.key(header.get("kid"))
            if key is None:
                raise _refused(TOKEN_INVALID, _UNKNOWN_KEY)
            claims: dict[str, Any] = jwt.decode(
                token,
                key=key,
                algorithms=list(self._keys.algorithms),
                issuer=self._issuer,
                audience=self._audience,
                leeway=CLOCK_LEEWAY_SECONDS,
                options={
                    "require": ["exp", "sub"],
                    "verify_iss": self._issuer is not None,
                    "verify_aud": self._audience is not None,
                },
            )
            expires_at = float(claims["exp"])
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _refusal(error) from error
        subject = claims["sub"]
        if expires_at <= time.time():
            raise _refused(TOKEN_EXPIRED, "The token has expired.")
        if not is_storable(subject):
            raise _refused(TOKEN_INVALID, _NOT_A_SUBJECT)
        return Identity(subject, expires_at)


def is_storable(subject: str) -> bool:
    """Tell whether `users.subject` can hold it: PostgreSQL's text has no NUL and no lone surrogates."""
    try:
        subject.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(subject) <= SUBJECT_LENGTH_MAX and "\x00" not in subject


def _bearer_token(authorization: Sequence[str]) -> str:
    if not authorization:
        raise Problem(TOKEN_MISSING, "Send the header `Authorization: Bearer <token>`.")
    if len(authorization) > 1:
        raise _refused(TOKEN_MALFORMED, "There is more than one Authorization header.")
    scheme, _, token = authorization[0].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or not token.isascii():
        raise _refused(TOKEN_MALFORMED, "The Authorization header is not `Bearer <token>`.")
    return token


def _refusal(error: Exception) -> Problem:
    """Say why a token is refused, in words of our own: the library's may quote the token or the key."""
    if isinstance(error, jwt.MissingRequiredClaimError):
        return _refused(TOKEN_INVALID, f"The token has no {error.claim}.")
    for reason, kind, detail in _REFUSALS:
        if isinstance(error, reason):
            return _refused(kind, detail)
    return _refused(TOKEN_MALFORMED, "The token is not a signed JSON Web Token.")


def _refused(kind: Kind, detail: str) -> Problem:
    challenge = f'Bearer error="invalid_token", error_description="{detail.replace("`", "")}"'
    return Problem(kind, detail, headers={"WWW-Authenticate": challenge})


@asynccontextmanager
async def verifier(settings: Settings) -> AsyncIterator[Verifier]:
    """Open what the settings trust: the shared secret, or the issuer's published keys."""
    if settings.jwt_secret is not None:
        keys = SharedSecret(settings.jwt_secret.get_secret_value())
        yield Verifier(keys, issuer=settings.jwt_issuer, audience=settings.jwt_audience)
        return
    assert settings.jwt_jwks_url is not None
    async with IssuerKeys(settings.jwt_jwks_url) as issuer_keys:
        yield Verifier(issuer_keys, issuer=settings.jwt_issuer, audience=settings.jwt_audience)
