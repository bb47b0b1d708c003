"""Whose token is accepted: shared secret and published keys, over HTTP."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from services.api_gateway import keys
from services.api_gateway.auth import Verifier
from services.api_gateway.problems import Problem
from shared.database import Database
from tests.factories import create_user
from tests.gateway import SECRET, Answer, Gateway, running, token
from tests.waiting import eventually

CURRENT = "/api/portfolio/current"


@pytest.fixture
async def gateway(database: Database, database_url: str) -> AsyncIterator[Gateway]:
    await create_user(database)
    async with running(database_url) as started:
        yield started


async def ask(gateway: Gateway, credentials: str | None) -> Answer:
    headers = {} if credentials is None else {"Authorization": credentials}
    return await gateway.ask("GET", CURRENT, headers=headers)


def encoded(value: Any) -> str:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def hand_signed(header: dict[str, Any], claims: dict[str, Any], secret: bytes) -> str:
    """Sign as HS256 whatever the header says; the library would refuse to."""
    signed = f"{encoded(header)}.{encoded(claims)}"
    return f"{signed}.{encoded(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


def claims(**changes: Any) -> dict[str, Any]:
    return {"sub": "demo", "exp": int(time.time()) + 600} | changes


# ---- shared secret -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_good_token_is_accepted_and_again(gateway: Gateway, scheme: str) -> None:
    credentials = f"{scheme} {token()}"
    for _ in range(2):  # verified, then remembered
        assert (await ask(gateway, credentials)).status == 200


@pytest.mark.parametrize(
    ("credentials", "problem", "detail"),
    [
        ("Basic ZGVtbzpkZW1v", "token-malformed", "not `Bearer <token>`"),
        ("Bearer", "token-malformed", "not `Bearer <token>`"),
        ("Bearer   ", "token-malformed", "not `Bearer <token>`"),
        ("Bearer abc", "token-malformed", "not a signed JSON Web Token"),
        ("Bearer a.b.c", "token-malformed", "not a signed JSON Web Token"),
        ("Bearer ...", "token-malformed", "not a signed JSON Web Token"),
        (f"Bearer {encoded(b'[' * 5000)}.e30.AA", "token-malformed", "not a signed JSON Web Token"),
        (f"Bearer {encoded([1])}.e30.AA", "token-malformed", "not a signed JSON Web Token"),
        (
            f"Bearer {encoded({'alg': 'HS256', 'kid': 7})}.e30.AA",
            "token-malformed",
            "not a signed JSON Web Token",
        ),
        (f"Bearer {encoded({'alg': ['HS256']})}.e30.AA", "token-invalid", "algorithm is not accepted"),
        (f"Bearer {encoded({})}.e30.AA", "token-invalid", "algorithm is not accepted"),
    ],
)
async def test_what_is_no_token_is_refused(
    gateway: Gateway, credentials: str, problem: str, detail: str
) -> None:
    refused(await ask(gateway, credentials), problem, detail)


def refused(answer: Answer, problem: str, detail: str) -> None:
    assert answer.status == 401, answer.text
    assert answer.problem().type == f"urn:foliotick:problem:{problem}"
    assert detail in answer.problem().detail
    assert answer.headers["WWW-Authenticate"].startswith('Bearer error="invalid_token", error_description="')


async def test_missing_token_is_asked_for(gateway: Gateway) -> None:
    answer = await ask(gateway, None)
    assert answer.status == 401
    assert answer.problem().type == "urn:foliotick:problem:token-missing"
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="foliotick"'


@pytest.mark.parametrize(
    ("changes", "problem", "detail"),
    [
        ({"expires_in": -1}, "token-expired", "expired"),
        ({"exp": None}, "token-invalid", "has no exp"),
        ({"exp": "soon"}, "token-malformed", "not a signed"),
        ({"sub": None}, "token-invalid", "has no sub"),
        ({"nbf": 4102444800}, "token-invalid", "not valid yet"),
        ({"secret": "another secret of thirty-two bytes"}, "token-invalid", "signature is wrong"),
        ({"subject": ""}, "token-invalid", "sub is not a subject"),
        ({"subject": "x" * 256}, "token-invalid", "sub is not a subject"),
        ({"subject": "a\x00b"}, "token-invalid", "sub is not a subject"),
        ({"subject": "\ud800"}, "token-invalid", "sub is not a subject"),
    ],
)
async def test_token_that_proves_nothing_is_refused(
    gateway: Gateway, changes: dict[str, Any], problem: str, detail: str
) -> None:
    refused(await ask(gateway, f"Bearer {token(**changes)}"), problem, detail)


@pytest.mark.parametrize("sub", [7, ["demo"], {"a": 1}, True])
async def test_subject_that_is_no_text_is_refused(gateway: Gateway, sub: Any) -> None:
    signed = hand_signed({"alg": "HS256"}, claims(sub=sub), SECRET.encode())
    refused(await ask(gateway, f"Bearer {signed}"), "token-invalid", "sub is not a subject")


@pytest.mark.parametrize("alg", ["none", "None", "HS512", "RS256", ""])
async def test_other_algorithm_is_refused(gateway: Gateway, alg: str) -> None:
    for signature in ("", encoded(b"x" * 32)):
        forged = f"{encoded({'alg': alg, 'typ': 'JWT'})}.{encoded(claims())}.{signature}"
        refused(await ask(gateway, f"Bearer {forged}"), "token-invalid", "algorithm is not accepted")
    signed = hand_signed({"alg": alg}, claims(), SECRET.encode())
    refused(await ask(gateway, f"Bearer {signed}"), "token-invalid", "algorithm is not accepted")


async def test_changed_claims_are_refused(gateway: Gateway) -> None:
    header, _, signature = token().split(".")
    forged = f"{header}.{encoded(claims(sub='alice'))}.{signature}"
    refused(await ask(gateway, f"Bearer {forged}"), "token-invalid", "signature is wrong")


async def test_two_tokens_are_refused(gateway: Gateway) -> None:
    twice = [("Authorization", f"Bearer {token()}"), ("Authorization", f"Bearer {token('alice')}")]
    answer = await gateway.ask("GET", CURRENT, headers=twice)
    refused(answer, "token-malformed", "more than one")


async def test_remembered_token_expires_to_the_second(gateway: Gateway) -> None:
    credentials = f"Bearer {token(expires_in=2)}"
    assert (await ask(gateway, credentials)).status == 200

    async def is_expired() -> bool:
        answer = await ask(gateway, credentials)
        return answer.status == 401 and answer.problem().type == "urn:foliotick:problem:token-expired"

    await eventually(is_expired, timeout=4)


async def test_good_or_bad_token_is_verified_once_and_a_very_long_one_each_time() -> None:
    class Counted(keys.SharedSecret):
        asked = 0

        async def key(self, key_id: str | None) -> bytes:
            self.asked += 1
            return await super().key(key_id)

    counted = Counted(SECRET)
    verifier = Verifier(counted, issuer=None, audience=None)
    for credentials in (f"Bearer {token()}", f"Bearer {token('alice')}"):
        assert await verifier.identity([credentials]) == await verifier.identity([credentials])
    assert counted.asked == 2
    forged = f"Bearer {token(secret='y' * 32)}"
    for _ in range(2):
        with pytest.raises(Problem) as refused:
            await verifier.identity([forged])
        assert refused.value.kind.name == "token-invalid"
    assert counted.asked == 3
    long = f"Bearer {token(claim='x' * 2048)}"
    for _ in range(2):
        assert (await verifier.identity([long])).subject == "demo"
    assert counted.asked == 5


async def test_refusal_repeats_nothing_of_the_token(gateway: Gateway) -> None:
    answer = await ask(gateway, f"Bearer {token(subject='very-private', secret='y' * 32)}")
    assert answer.status == 401
    assert "very-private" not in answer.text
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"iss": "https://issuer.example", "aud": "foliotick"}, 200),
        ({"iss": "https://issuer.example", "aud": ["other", "foliotick"]}, 200),
        ({"iss": "https://other.example", "aud": "foliotick"}, 401),
        ({"iss": "https://issuer.example", "aud": "other"}, 401),
        ({"iss": "https://issuer.example"}, 401),
        ({"aud": "foliotick"}, 401),
    ],
)
async def test_issuer_and_audience_are_checked_when_set(
    database: Database, database_url: str, changes: dict[str, Any], status: int
) -> None:
    await create_user(database)
    async with running(
        database_url, jwt_issuer="https://issuer.example", jwt_audience="foliotick"
    ) as gateway:
        assert (await ask(gateway, f"Bearer {token(**changes)}")).status == status


async def test_issuer_and_audience_are_ignored_when_not_set(gateway: Gateway) -> None:
    assert (await ask(gateway, f"Bearer {token(iss='anyone', aud='anything')}")).status == 200


# ---- published keys ------------------------------------------------------------------------------


@dataclass
class Issuer:
    """A token issuer that publishes whatever `keys` holds, and counts who asks."""

    url: str = ""
    keys: list[Any] = field(default_factory=list)
    status: int = 200
    body: bytes | None = None
    asked: int = 0

    async def publish(self, _: web.Request) -> web.Response:
        self.asked += 1
        body = self.body if self.body is not None else json.dumps({"keys": self.keys}).encode()
        return web.Response(body=body, status=self.status)


@asynccontextmanager
async def publishing(issuer: Issuer, port: int = 0) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_get("/jwks.json", issuer.publish)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    issuer.url = f"http://127.0.0.1:{site.port}/jwks.json"
    try:
        yield
    finally:
        await runner.cleanup()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    started = Issuer()
    async with publishing(started):
        yield started


@pytest.fixture
async def trusting(database: Database, database_url: str, issuer: Issuer) -> AsyncIterator[Gateway]:
    """A gateway that trusts the issuer's published keys."""
    await create_user(database)
    async with running(database_url, jwt_jwks_url=issuer.url) as started:
        yield started


RSA_KEYS = {name: rsa.generate_private_key(public_exponent=65537, key_size=2048) for name in ("one", "two")}


def published(key: Any, algorithm: str, key_id: str | None) -> dict[str, Any]:
    made: dict[str, Any] = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
    made.pop("key_ops", None)
    return made | {"alg": algorithm, "use": "sig"} | ({"kid": key_id} if key_id else {})


def signed_by(key: Any, algorithm: str, key_id: str | None, **changes: Any) -> str:
    return "Bearer " + jwt.encode(
        claims(**changes), key, algorithm, headers={"kid": key_id} if key_id else None
    )


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("RS256", RSA_KEYS["one"]),
        ("ES256", ec.generate_private_key(ec.SECP256R1())),
        ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
    ],
)
@pytest.mark.parametrize("key_id", ["k1", None])
async def test_token_signed_with_a_published_key_is_accepted(
    trusting: Gateway, issuer: Issuer, algorithm: str, key: Any, key_id: str | None
) -> None:
    issuer.keys = [published(key, algorithm, "k1")]
    assert (await ask(trusting, signed_by(key, algorithm, key_id))).status == 200
    assert (await ask(trusting, signed_by(key, algorithm, key_id, exp=1))).status == 401


async def test_keys_are_fetched_once_for_many_tokens(trusting: Gateway, issuer: Issuer) -> None:
    issuer.keys = [published(RSA_KEYS["one"], "RS256", "k1")]
    for number in range(5):
        assert (await ask(trusting, signed_by(RSA_KEYS["one"], "RS256", "k1", jti=str(number)))).status == 200
    assert issuer.asked == 1


async def test_token_signed_with_an_unpublished_key_is_refused(trusting: Gateway, issuer: Issuer) -> None:
    issuer.keys = [published(RSA_KEYS["one"], "RS256", "k1")]
    refused(
        await ask(trusting, signed_by(RSA_KEYS["two"], "RS256", "k1")), "token-invalid", "signature is wrong"
    )
    refused(
        await ask(trusting, signed_by(RSA_KEYS["two"], "RS256", "k2")), "token-invalid", "key that its issuer"
    )


async def test_without_a_key_id_two_keys_are_no_answer(trusting: Gateway, issuer: Issuer) -> None:
    issuer.keys = [published(RSA_KEYS[name], "RS256", name) for name in ("one", "two")]
    refused(
        await ask(trusting, signed_by(RSA_KEYS["one"], "RS256", None)), "token-invalid", "key that its issuer"
    )


async def test_new_key_is_found_when_a_token_names_it(
    trusting: Gateway, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "UNKNOWN_KEY_COOLDOWN_SECONDS", 0.2)
    issuer.keys = [published(RSA_KEYS["one"], "RS256", "k1")]
    assert (await ask(trusting, signed_by(RSA_KEYS["one"], "RS256", "k1"))).status == 200
    issuer.keys = [published(RSA_KEYS["two"], "RS256", "k2")]

    async def is_accepted() -> bool:
        return (await ask(trusting, signed_by(RSA_KEYS["two"], "RS256", "k2"))).status == 200

    await eventually(is_accepted, timeout=5)
    withdrawn = signed_by(RSA_KEYS["one"], "RS256", "k1", jti="not remembered")
    refused(await ask(trusting, withdrawn), "token-invalid", "key that its issuer")


async def test_withdrawn_key_stops_working_when_the_keys_are_old(
    trusting: Gateway, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REFRESH_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(keys, "UNKNOWN_KEY_COOLDOWN_SECONDS", 0.0)
    issuer.keys = [published(RSA_KEYS[name], "RS256", name) for name in ("one", "two")]
    assert (await ask(trusting, signed_by(RSA_KEYS["one"], "RS256", "one"))).status == 200
    del issuer.keys[0]

    async def is_refused() -> bool:
        fresh = signed_by(RSA_KEYS["one"], "RS256", "one", jti=str(time.monotonic()))
        return (await ask(trusting, fresh)).status == 401

    await eventually(is_refused, timeout=5)


async def test_unknown_key_ids_do_not_storm_the_issuer(trusting: Gateway, issuer: Issuer) -> None:
    issuer.keys = [published(RSA_KEYS["one"], "RS256", "k1")]
    for number in range(20):
        answer = await ask(trusting, signed_by(RSA_KEYS["two"], "RS256", f"unknown-{number}"))
        assert answer.status == 401
    assert issuer.asked == 1  # within the cooldown of the first fetch


async def test_public_key_is_no_shared_secret(trusting: Gateway, issuer: Issuer) -> None:
    issuer.keys = [published(RSA_KEYS["one"], "RS256", "k1")]
    public = RSA_KEYS["one"].public_key()
    for encoding, layout in (
        (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
        (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    ):
        forged = hand_signed({"alg": "HS256", "kid": "k1"}, claims(), public.public_bytes(encoding, layout))
        refused(await ask(trusting, f"Bearer {forged}"), "token-invalid", "algorithm is not accepted")
    confused = hand_signed({"alg": "RS256", "kid": "k1"}, claims(), b"x" * 32)
    refused(await ask(trusting, f"Bearer {confused}"), "token-invalid", "signature is wrong")
    unsigned = f"{encoded({'alg': 'none', 'kid': 'k1'})}.{encoded(claims())}."
    refused(await ask(trusting, f"Bearer {unsigned}"), "token-invalid", "algorithm is not accepted")


async def test_algorithm_must_be_the_keys_own(trusting: Gateway, issuer: Issuer) -> None:
    issuer.keys = [published(RSA_KEYS["one"], "RS256", "k1")]
    curve = ec.generate_private_key(ec.SECP256R1())
    refused(
        await ask(trusting, signed_by(curve, "ES256", "k1")), "token-invalid", "algorithm is not accepted"
    )


async def test_key_that_is_not_for_signatures_or_too_weak_is_not_used(
    trusting: Gateway, issuer: Issuer
) -> None:
    secret = b"s" * 32
    issuer.keys = [
        {"kty": "oct", "kid": "oct", "k": encoded(secret), "alg": "HS256"},
        published(RSA_KEYS["one"], "RS256", "enc") | {"use": "enc"},
        "nonsense",
        {"kty": "RSA", "kid": "half"},
        published(RSA_KEYS["two"], "RS256", "good"),
    ]
    shared = hand_signed({"alg": "HS256", "kid": "oct"}, claims(), secret)
    assert (await ask(trusting, f"Bearer {shared}")).status == 401
    assert (await ask(trusting, signed_by(RSA_KEYS["one"], "RS256", "enc"))).status == 401
    assert (await ask(trusting, signed_by(RSA_KEYS["two"], "RS256", "good"))).status == 200


async def test_keys_are_kept_when_the_issuer_goes_away(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REFRESH_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(keys, "UNKNOWN_KEY_COOLDOWN_SECONDS", 0.0)
    await create_user(database)
    issuer = Issuer(keys=[published(RSA_KEYS["one"], "RS256", "k1")])
    async with publishing(issuer):
        gateway_context = running(database_url, jwt_jwks_url=issuer.url)
        gateway = await gateway_context.__aenter__()
        assert (await ask(gateway, signed_by(RSA_KEYS["one"], "RS256", "k1"))).status == 200
    try:
        for number in range(3):
            late = signed_by(RSA_KEYS["one"], "RS256", "k1", jti=str(number))
            assert (await ask(gateway, late)).status == 200
        assert (await ask(gateway, signed_by(RSA_KEYS["two"], "RS256", "k2"))).status == 401
    finally:
        await gateway_context.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"oops"),
        (200, b"<html>"),
        (200, b'{"keys": []}'),
        (200, b"[]"),
        (200, b'{"keys": {"a": 1}}'),
        (200, b"[" * 100000),
        (200, b'{"keys": [' + b" " * 300_000 + b"]}"),
    ],
)
async def test_keys_never_fetched_are_a_failure_of_ours_that_heals(
    trusting: Gateway, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes
) -> None:
    monkeypatch.setattr(keys, "NEVER_FETCHED_COOLDOWN_SECONDS", 0.05)
    issuer.status, issuer.body = status, body
    good = signed_by(RSA_KEYS["one"], "RS256", "k1")
    answer = await ask(trusting, good)
    assert answer.status == 503
    assert answer.problem().type == "urn:foliotick:problem:keys-unavailable"
    assert answer.headers["Retry-After"] == "2"
    issuer.status, issuer.body, issuer.keys = 200, None, [published(RSA_KEYS["one"], "RS256", "k1")]

    async def is_accepted() -> bool:
        return (await ask(trusting, good)).status == 200

    await eventually(is_accepted, timeout=5)
