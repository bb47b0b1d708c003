"""The price feeder's settings."""

import pytest

from services.price_feeder.settings import Settings
from shared import settings
from shared.settings import SettingsError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(f"{name.upper()}_FILE", raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@localhost/db")
    monkeypatch.setenv("ALPACA_API_KEY", "key")
    monkeypatch.setenv("ALPACA_SECRET_KEY", "the-secret")
    return monkeypatch


def problems() -> str:
    with pytest.raises(SettingsError) as caught:
        settings.load(Settings)
    return str(caught.value)


def test_defaults_are_the_documented_ones() -> None:
    loaded = settings.load(Settings)
    assert loaded.alpaca_data_url == "https://data.alpaca.markets"
    assert loaded.alpaca_feed == "iex"
    assert loaded.price_update_interval_seconds == 10
    assert loaded.alpaca_requests_per_minute == 200
    assert loaded.health_port == 8082


@pytest.mark.parametrize("empty", [True, False])
def test_missing_keys_are_named_in_words(environment: pytest.MonkeyPatch, empty: bool) -> None:
    for name in ("ALPACA_API_KEY", "ALPACA_SECRET_KEY"):
        environment.setenv(name, "") if empty else environment.delenv(name)
    assert "ALPACA_API_KEY and ALPACA_SECRET_KEY are not set" in problems()
    assert "PRICE_UPDATE_ENABLED=false" in problems()
    environment.setenv("ALPACA_API_KEY", "key")
    assert "ALPACA_SECRET_KEY is not set" in problems()


def test_keys_are_not_needed_while_updates_are_disabled(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("ALPACA_API_KEY")
    environment.delenv("ALPACA_SECRET_KEY")
    environment.setenv("PRICE_UPDATE_ENABLED", "false")
    assert settings.load(Settings).price_update_enabled is False


def test_a_broken_key_is_refused_and_not_shown(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALPACA_SECRET_KEY", "the-secret\nwith a second line")
    assert "ALPACA_SECRET_KEY must be plain letters and digits" in problems()
    assert "the-secret" not in problems()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8090/", "http://127.0.0.1:8090"),
        ("https://data.alpaca.markets/v2", "https://data.alpaca.markets"),
        ("https://data.sandbox.alpaca.markets/v2/", "https://data.sandbox.alpaca.markets"),
        ("http://proxy/alpaca/", "http://proxy/alpaca"),
        ("http://[::1]:8090", "http://[::1]:8090"),
    ],
)
def test_market_data_url_is_taken_as_people_paste_it(
    environment: pytest.MonkeyPatch, given: str, url: str
) -> None:
    environment.setenv("ALPACA_DATA_URL", given)
    assert settings.load(Settings).alpaca_data_url == url


@pytest.mark.parametrize(
    "given",
    ["data.alpaca.markets", "ftp://data", "http://", "http://h:99999", "http://h/?a=1", "http://[::1"],
)
def test_wrong_market_data_url_is_refused(environment: pytest.MonkeyPatch, given: str) -> None:
    environment.setenv("ALPACA_DATA_URL", given)
    assert "ALPACA_DATA_URL must be a web address" in problems()


def test_trading_host_is_not_taken_for_the_market_data_host(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALPACA_DATA_URL", "https://paper-api.alpaca.markets")
    assert "the trading host belongs in ALPACA_BASE_URL" in problems()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PRICE_UPDATE_INTERVAL_SECONDS", "0"),
        ("PRICE_UPDATE_INTERVAL_SECONDS", "nan"),
        ("ALPACA_REQUESTS_PER_MINUTE", "0"),
        ("ALPACA_FEED", "nasdaq"),
        ("PRICE_UPDATE_ENABLED", "perhaps"),
    ],
)
def test_wrong_value_is_refused_by_name(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    assert f"{name} must be" in problems()


def test_replay_of_more_than_an_hour_does_not_fit_into_the_stream(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("PRICE_REPLAY_MINUTES", "60")
    assert settings.load(Settings).replay.total_seconds() == 3600
    environment.setenv("PRICE_REPLAY_MINUTES", "61")
    assert "PRICE_REPLAY_MINUTES" in problems()
