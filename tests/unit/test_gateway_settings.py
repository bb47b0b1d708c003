"""The gateway's settings say in words what is wrong with them."""

from pathlib import Path

import pytest

from services.api_gateway.settings import Settings
from shared import settings
from shared.settings import SettingsError

SECRET = "x" * 32


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(f"{name.upper()}_FILE", raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:password@127.0.0.1/foliotick")


def refusal() -> str:
    with pytest.raises(SettingsError) as refused:
        settings.load(Settings)
    return str(refused.value)


def test_defaults_are_the_documented_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", SECRET)
    loaded = settings.load(Settings)
    assert (loaded.gateway_port, loaded.health_port) == (8000, 8081)
    assert loaded.market_timezone == "America/New_York"
    assert loaded.cors_allowed_origins == ()
    assert loaded.request_timeout_seconds == 5


def test_a_gateway_must_know_whose_tokens_to_trust() -> None:
    assert "JWT_JWKS_URL must be set when JWT_SECRET is not" in refusal()


def test_a_gateway_trusts_one_of_secret_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", SECRET)
    monkeypatch.setenv("JWT_JWKS_URL", "https://issuer.example/jwks.json")
    assert "JWT_JWKS_URL must be unset when JWT_SECRET is set" in refusal()


def test_a_short_secret_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", "hunter2hunter2")
    said = refusal()
    assert "JWT_SECRET must be at least 32 bytes long" in said
    assert "hunter2" not in said


def test_the_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    monkeypatch.setenv("JWT_SECRET_FILE", str(tmp_path / "secret"))
    loaded = settings.load(Settings)
    assert loaded.jwt_secret is not None
    assert loaded.jwt_secret.get_secret_value() == SECRET


def test_replica_is_optional_and_may_come_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JWT_SECRET", SECRET)
    monkeypatch.setenv("DATABASE_READ_URL", "")
    assert settings.load(Settings).database_read_url is None
    (tmp_path / "url").write_text("postgresql://reader:a%2Cb@replica:5432/foliotick\n")
    monkeypatch.delenv("DATABASE_READ_URL")
    monkeypatch.setenv("DATABASE_READ_URL_FILE", str(tmp_path / "url"))
    loaded = settings.load(Settings)
    assert loaded.database_read_url is not None
    assert loaded.database_read_url.get_secret_value().endswith("@replica:5432/foliotick")
    assert loaded.read_replica_lag_seconds_max == 5


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("GATEWAY_PORT", "70000", "GATEWAY_PORT must be"),
        ("MARKET_TIMEZONE", "Mars/Olympus", "MARKET_TIMEZONE must be an IANA time zone"),
        ("MARKET_TIMEZONE", "../etc/passwd", "MARKET_TIMEZONE must be an IANA time zone"),
        ("JWT_JWKS_URL", "ftp://issuer.example", "JWT_JWKS_URL must be an https:// or http:// URL"),
        ("CORS_ALLOWED_ORIGINS", "*", "CORS_ALLOWED_ORIGINS must be origins"),
        ("CORS_ALLOWED_ORIGINS", "https://*.example.com", "CORS_ALLOWED_ORIGINS must be origins"),
        ("CORS_ALLOWED_ORIGINS", "https://example.com/", "CORS_ALLOWED_ORIGINS must be origins"),
        ("CORS_ALLOWED_ORIGINS", "null", "CORS_ALLOWED_ORIGINS must be origins"),
        ("REQUEST_TIMEOUT_SECONDS", "0", "REQUEST_TIMEOUT_SECONDS must be"),
        ("DATABASE_READ_URL", "mysql://a/b", "DATABASE_READ_URL must be a URL like postgresql://"),
        ("DATABASE_READ_URL", "postgresql://u:p@a,b/d", "DATABASE_READ_URL must be the URL of one server"),
        ("DATABASE_READ_URL", "postgresql:///d?host=a,b", "DATABASE_READ_URL must be the URL of one server"),
        ("READ_REPLICA_LAG_SECONDS_MAX", "0.5", "READ_REPLICA_LAG_SECONDS_MAX must be"),
    ],
)
def test_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv("JWT_SECRET", SECRET)
    monkeypatch.setenv(name, value)
    assert said in refusal()


def test_everything_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "many")
    monkeypatch.setenv("MARKET_TIMEZONE", "Nowhere")
    said = refusal()
    assert all(name in said for name in ("GATEWAY_PORT", "MARKET_TIMEZONE", "JWT_JWKS_URL"))


def test_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", SECRET)
    monkeypatch.setenv("CORS_ALLOWED_ORIGINS", "https://app.example.com, http://localhost:3000")
    assert settings.load(Settings).cors_allowed_origins == (
        "https://app.example.com",
        "http://localhost:3000",
    )
