"""The keys that verify tokens: a shared secret, or the public keys that a token issuer publishes (JWKS)."""

import asyncio
import json
import time
from typing import Protocol, Self

import aiohttp
import jwt

from services.api_gateway.problems import KEYS_UNAVAILABLE, Problem
from shared import health, logs

FETCH_TIMEOUT_SECONDS = 3.0
FETCH_BYTES_MAX = 256 * 1024
KEYS_MAX = 100
REFRESH_AFTER_SECONDS = 600.0
"""Keys older than this are fetched again beside the request, so that a withdrawn key stops working."""
UNKNOWN_KEY_COOLDOWN_SECONDS = 10.0
"""At most one fetch in this time for a key that is not known, however many tokens name one."""
NEVER_FETCHED_COOLDOWN_SECONDS = 1.0

log = logs.get_logger()


class Keys(Protocol):
    """Where a token's key comes from, and the algorithms that it may be used with."""

    algorithms: tuple[str, ...]

    async def key(self, key_id: str | None) -> jwt.PyJWK | bytes | None:
        """Return the key to verify with; None when there is no such key."""

    async def check(self) -> str | None:
        """Return None when tokens can be verified, else why not. For readiness."""


class SharedSecret:
    """One secret for signing and verifying, HS256."""

    algorithms: tuple[str, ...] = ("HS256",)

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def key(self, key_id: str | None) -> bytes:
        return self._secret

    async def check(self) -> str | None:
        return None


class _FetchFailed(Exception):
    """The issuer did not answer with usable keys."""


class IssuerKeys:
    """The issuer's public keys, fetched when first needed and kept when the issuer is away.

    Use as an async context manager. Asymmetric algorithms only: no public key can pass for a shared secret.
    """

    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: list[jwt.PyJWK] = []
        self._tried_at = float("-inf")
        self._fetched_at = float("-inf")
        self._problem: str | None = "not fetched yet"
        self._fetching: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_TIMEOUT_SECONDS))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)
        assert self._session is not None
        await self._session.close()

    async def key(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return the issuer's key of this id; without an id, its only key. Raises Problem while none is known."""
        if not self._keys:
            await self._refresh(cooldown=NEVER_FETCHED_COOLDOWN_SECONDS)
            if not self._keys:
                raise Problem(KEYS_UNAVAILABLE, "The token issuer's keys could not be fetched yet.")
        elif time.monotonic() - self._fetched_at > REFRESH_AFTER_SECONDS:
            self._start_fetch(cooldown=UNKNOWN_KEY_COOLDOWN_SECONDS)
        found = self._known(key_id)
        if found is None and key_id is not None:
            await self._refresh(cooldown=UNKNOWN_KEY_COOLDOWN_SECONDS)
            found = self._known(key_id)
        return found

    async def check(self) -> str | None:
        if not self._keys:
            await self._refresh(cooldown=NEVER_FETCHED_COOLDOWN_SECONDS)
        if not self._problem:
            return None
        told = f"JWT_JWKS_URL: {self._problem}"
        if not self._keys:
            return told
        minutes = (time.monotonic() - self._fetched_at) / 60
        return health.Degraded(f"{told}; the keys of {minutes:.0f} minutes ago are used")

    def _known(self, key_id: str | None) -> jwt.PyJWK | None:
        if key_id is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.key_id == key_id), None)

    async def _refresh(self, *, cooldown: float) -> None:
        """Fetch the keys, together with whoever else wants them now, unless that was tried a moment ago."""
        self._start_fetch(cooldown=cooldown)
        if self._fetching is not None:
            await asyncio.shield(self._fetching)

    def _start_fetch(self, *, cooldown: float) -> None:
        if self._fetching is None and time.monotonic() - self._tried_at > cooldown:
            self._tried_at = time.monotonic()
            self._fetching = asyncio.create_task(self._fetch())
            self._fetching.add_done_callback(self._fetch_ended)

    def _fetch_ended(self, _: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _fetch(self) -> None:
        try:
            keys = _usable_keys(await self._body(), self.algorithms)
        except (aiohttp.ClientError, OSError, TimeoutError, _FetchFailed) as error:
            problem = str(error) or type(error).__name__
            if problem != self._problem:  # once on the change, not once per attempt
                log.warning(
                    "token_keys_not_fetched",
                    error=problem,
                    keys_kept=len(self._keys),
                    advice="see whether the issuer at JWT_JWKS_URL answers; new tokens wait for it, known keys go on",
                )
            self._problem = problem
            return
        if {key.key_id for key in keys} != {key.key_id for key in self._keys} or self._problem:
            log.info("token_keys_fetched", keys=len(keys))
        self._keys, self._fetched_at, self._problem = keys, time.monotonic(), None

    async def _body(self) -> bytes:
        assert self._session is not None
        async with self._session.get(self._url) as response:
            if response.status != 200:
                raise _FetchFailed(f"the issuer answered {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > FETCH_BYTES_MAX:
                    raise _FetchFailed(f"the issuer's answer is larger than {FETCH_BYTES_MAX} bytes")
            return bytes(body)


def _usable_keys(body: bytes, algorithms: tuple[str, ...]) -> list[jwt.PyJWK]:
    """Return the signature keys of a key set that have one of the algorithms; raises _FetchFailed without any."""
    try:
        entries = json.loads(body)["keys"]
        assert isinstance(entries, list)
    except (AssertionError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise _FetchFailed("the issuer's answer is not a JSON Web Key Set") from error
    usable = [key for entry in entries[:KEYS_MAX] if (key := _usable_key(entry, algorithms))]
    if not usable:
        raise _FetchFailed(f"the issuer has no signature key for {', '.join(algorithms)}")
    return usable


def _usable_key(entry: object, algorithms: tuple[str, ...]) -> jwt.PyJWK | None:
    """Return the key, or None for one of another use or algorithm, or too short."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK(entry)
        if key.algorithm_name not in algorithms or key.Algorithm.check_key_length(key.key):
            return None
    except (jwt.PyJWTError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return key
