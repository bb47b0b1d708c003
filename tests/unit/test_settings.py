"""Settings: all errors at once, in words; secrets from files, never in messages."""

from pathlib import Path

import pytest

from services.snapshotter.settings import Settings
from shared import settings
from shared.settings import SettingsError

GOOD = "postgresql://user:hidden@127.0.0.1/portfolio"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(f"{name.upper()}_FILE", raising=False)


def problems() -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings.load(Settings)
    return str(caught.value).splitlines()


def test_defaults_are_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", GOOD)
    loaded = settings.load(Settings)
    assert loaded.snapshot_enabled
    assert loaded.interval.total_seconds() == 300


def test_all_errors_are_said_at_once_and_name_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql://user:hidden@127.0.0.1/portfolio")
    monkeypatch.setenv("SNAPSHOT_INTERVAL_MINUTES", "soon")
    monkeypatch.setenv("SNAPSHOT_SHARDS", "0")
    said = problems()
    assert len(said) == 3
    assert any("DATABASE_URL must be a URL like postgresql://" in line for line in said)
    assert any("SNAPSHOT_INTERVAL_MINUTES" in line and "'soon'" in line for line in said)
    assert any("SNAPSHOT_SHARDS" in line and "greater than or equal to 1" in line for line in said)
    assert not any("hidden" in line for line in said)


def test_a_missing_setting_is_explained() -> None:
    assert problems() == [
        "DATABASE_URL is not set: PostgreSQL 16 or later, `postgresql://user:password@host:port/database`; "
        "of several hosts, commas between, the primary."
    ]


def test_a_value_comes_from_the_file_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "database_url"
    secret.write_text(GOOD + "\n")
    monkeypatch.setenv("DATABASE_URL_FILE", str(secret))
    assert settings.load(Settings).database_url.get_secret_value() == GOOD


def test_a_file_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "absent"))
    assert "DATABASE_URL_FILE cannot be read" in problems()[0]


def test_a_file_that_never_ends_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL_FILE", "/dev/zero")
    assert problems() == ["DATABASE_URL_FILE is longer than 65536 bytes: /dev/zero"]


@pytest.mark.parametrize("given", ["postgres://u:p@h/d", "postgresql+asyncpg://u:p@h/d"])
def test_other_spellings_of_the_scheme_are_understood(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("DATABASE_URL", given)
    assert settings.load(Settings).database_url.get_secret_value() == "postgresql://u:p@h/d"


@pytest.mark.parametrize(
    "given",
    [
        "postgresql://u:a,b@h/d",
        "postgresql:///d?host=/tmp",
        "postgresql://u:p@h1:5432,h2:5433/d",
        "postgresql://u:p@h/d?sslmode=prefer",
    ],
)
def test_whatever_postgresql_calls_a_url_is_one(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("DATABASE_URL", given)
    assert settings.load(Settings).database_url.get_secret_value() == given


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("DATABASE_URL", "postgresql://u:p@h:port/d"),
        ("DATABASE_URL", "postgresql://u:p@h:99999/d"),
        ("DATABASE_URL", "postgresql://"),
        ("NATS_URL", "nats://h:port"),
        ("NATS_URL", "http://h:4222"),
    ],
)
def test_a_url_that_leads_nowhere_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", GOOD)
    monkeypatch.setenv(name, given)
    assert problems()[0].startswith(f"{name} must be")


def test_a_secret_is_not_shown_when_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", GOOD)
    assert "hidden" not in repr(settings.load(Settings))


@pytest.mark.parametrize(
    "given",
    ["postgresql://user:hidden@h\u2100/d", "postgresql://user:hidden@[h/d", "postgresql://[user:hidden@h"],
)
def test_a_url_that_cannot_be_taken_apart_is_not_quoted(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("DATABASE_URL", given)
    monkeypatch.setenv("NATS_URL", given.replace("postgresql", "nats"))
    said = problems()
    assert sorted(line.partition(" must be ")[0] for line in said) == ["DATABASE_URL", "NATS_URL"]
    assert "hidden" not in "".join(said)


def test_retention_ends_where_it_has_been_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", GOOD)
    longest = {"SNAPSHOT": 730, "POSITION": 400, "ROLLUP": 3650}
    for what, days in longest.items():
        monkeypatch.setenv(f"{what}_RETENTION_DAYS", str(days))
    assert settings.load(Settings).upkeep.rollups_for.days == 3650
    for what, days in longest.items():
        monkeypatch.setenv(f"{what}_RETENTION_DAYS", str(days + 1))
    said = problems()
    assert len(said) == 3
    for what, days in longest.items():
        assert any(f"{what}_RETENTION_DAYS" in line and f"equal to {days}" in line for line in said)
