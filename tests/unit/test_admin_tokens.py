"""Bearer tokens of the administrator."""

from datetime import UTC, datetime, timedelta

import jwt
import pytest

from services.admin.settings import TokenSettings
from services.admin.tokens import TokensComeFromElsewhere, minted_token
from shared import settings
from shared.settings import SettingsError

SECRET = "a-secret-of-the-tests-with-40-characters"
NOW = datetime(2026, 11, 22, 16, 0, 0, tzinfo=UTC)
DAY = timedelta(hours=24)
SETTINGS = ("JWT_SECRET", "JWT_SECRET_FILE", "JWT_JWKS_URL", "JWT_ISSUER", "JWT_AUDIENCE")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def claims_of(token: str) -> dict[str, object]:
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    options = jwt.types.Options(verify_aud=False, verify_exp=False, verify_iat=False)
    return jwt.decode(token, SECRET, algorithms=["HS256"], options=options)


def test_token_names_the_user_and_when_it_ends(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("JWT_SECRET", SECRET)
    token = minted_token(settings.load(TokenSettings), "demo", now=NOW, lifetime=DAY)
    assert claims_of(token) == {"sub": "demo", "iat": 1795363200, "exp": 1795449600}


def test_token_has_issuer_and_audience_when_the_gateway_asks_for_them(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("JWT_SECRET", SECRET)
    environment.setenv("JWT_ISSUER", "https://login.test")
    environment.setenv("JWT_AUDIENCE", "portfolio")
    token = minted_token(settings.load(TokenSettings), "demo", now=NOW, lifetime=DAY)
    assert claims_of(token)["iss"] == "https://login.test"
    assert claims_of(token)["aud"] == "portfolio"


def test_no_token_is_minted_when_an_identity_provider_does_it(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("JWT_JWKS_URL", "https://login.test/keys")
    with pytest.raises(TokensComeFromElsewhere, match="JWT_JWKS_URL is set"):
        minted_token(settings.load(TokenSettings), "demo", now=NOW, lifetime=DAY)


def test_no_token_is_minted_without_a_secret() -> None:
    with pytest.raises(TokensComeFromElsewhere, match="JWT_SECRET is not set"):
        minted_token(settings.load(TokenSettings), "demo", now=NOW, lifetime=DAY)


def test_short_secret_is_refused_and_not_shown(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("JWT_SECRET", "too-short")
    with pytest.raises(SettingsError) as refused:
        settings.load(TokenSettings)
    assert (
        str(refused.value) == "JWT_SECRET must be at least 32 bytes long (`openssl rand -hex 32` makes one)"
    )
