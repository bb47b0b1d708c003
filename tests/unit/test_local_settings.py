"""What `make run` decides for the services."""

import pytest
from pydantic import SecretStr

from local.settings import LocalSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_page_signs_in_by_itself_where_prices_are_made_up_and_nobody_else_is_let_in(host: str) -> None:
    assert LocalSettings(gateway_host=host, alpaca_api_key=None).page_signs_in


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "my-machine", "localhost.example.com"])  # noqa: S104
def test_page_does_not_sign_in_by_itself_where_the_network_is_let_in(host: str) -> None:
    assert not LocalSettings(gateway_host=host, alpaca_api_key=None).page_signs_in


def test_page_does_not_sign_in_by_itself_with_real_prices() -> None:
    assert not LocalSettings(gateway_host="127.0.0.1", alpaca_api_key=SecretStr("key")).page_signs_in
