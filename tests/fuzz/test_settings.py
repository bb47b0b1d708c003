"""The environment: whatever it says, settings are loaded, or refused in words that name the variable and no secret."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from services.admin.settings import DatabaseSettings, TokenSettings
from services.api_gateway.settings import Settings as GatewaySettings
from services.market_simulator.settings import Settings as SimulatorSettings
from services.price_feeder.settings import Settings as FeederSettings
from services.snapshotter.settings import Settings as SnapshotterSettings
from shared import settings
from shared.settings import SettingsError
from tests.fuzz.trying import examples

SERVICES: tuple[type[BaseSettings], ...] = (
    GatewaySettings,
    FeederSettings,
    SnapshotterSettings,
    SimulatorSettings,
    DatabaseSettings,
    TokenSettings,
)
SECRET = "hunter2hunter2hunter2hunter2hunter2"
"""In every value of a secret setting; it must never be shown. Long enough to be a JWT secret."""
RIGHT = {
    "DATABASE_URL": f"postgresql://user:{SECRET}@127.0.0.1/portfolio",
    "JWT_SECRET": SECRET,
    "ALPACA_API_KEY": SECRET,
    "ALPACA_SECRET_KEY": SECRET,
}

TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30)
"""What a variable of the environment can hold."""
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["1e400", "-1", "0", "0.0", "1_000", "١٢", "0x10", " 5 ", "1e-400", "9" * 5000, "true"]),
)
URLS = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(
        ["postgresql", "postgres", "postgresql+asyncpg", "nats", "tls", "http", "https", "ws", "wss", "", "é"]
    ),
    st.sampled_from(
        ["", "@", "[", "[::1]", "[::1", "h", "h:99999", "h:-1", "h:x", "h1,h2", "℀", "h\u2100", "%zz"]
    ),
    st.sampled_from(["", ":", ":5432", ":0", ":٣", "/d", "/?host=/tmp", "?host=a,b", "#f", "/v2/", "/%00"]),
    TEXTS,
)
VALUES = st.one_of(
    TEXTS, NUMBERS, URLS, st.sampled_from(["true", "FALSE", "null", "[]", "{}", ",", "*", "é"])
)


@contextmanager
def environment(names: frozenset[str], given: Mapping[str, str]) -> Iterator[None]:
    """Have these variables and none else of the names; restored in the end."""
    before = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") in names}
    for name in before:
        del os.environ[name]
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)
        os.environ.update(before)


def names_of(service: type[BaseSettings]) -> frozenset[str]:
    return frozenset(name.upper() for name in service.model_fields)


def is_secret(service: type[BaseSettings], name: str) -> bool:
    return SecretStr.__name__ in str(service.model_fields[name.lower()].annotation)


def with_secret(value: str, place: int) -> str:
    """Return the value with the secret somewhere in it."""
    place = min(place, len(value))
    return value[:place] + SECRET + value[place:]


def refusal(service: type[BaseSettings], given: Mapping[str, str]) -> str | None:
    """Return why the settings are refused; None when they are loaded, and all that is made of them can be had."""
    with environment(names_of(service), given):
        try:
            loaded = settings.load(service)
        except SettingsError as error:
            return str(error)
    made = [getattr(loaded, name) for name, member in vars(service).items() if isinstance(member, property)]
    assert SECRET not in repr((loaded, made))
    return None


def check(service: type[BaseSettings], given: Mapping[str, str]) -> None:
    said = refusal(service, given)
    if said is not None:
        assert SECRET not in said
        assert all(any(name in line for name in names_of(service)) for line in said.splitlines()), said


@st.composite
def environments(draw: st.DrawFn) -> tuple[type[BaseSettings], dict[str, str]]:
    service = draw(st.sampled_from(SERVICES))
    names = sorted(names_of(service))
    given = {name: value for name, value in RIGHT.items() if name in names}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        value = draw(VALUES)
        given[name] = with_secret(value, draw(st.integers(0, 60))) if is_secret(service, name) else value
    return service, given


@examples(200)
@given(environments())
def test_any_environment_is_taken_or_refused_in_words(
    chosen: tuple[type[BaseSettings], dict[str, str]],
) -> None:
    check(*chosen)


@examples(100)
@given(
    service=st.sampled_from(SERVICES),
    content=st.one_of(VALUES.map(str.encode), st.binary(max_size=60)),
    is_there=st.sampled_from([True, True, True, False]),
    data=st.data(),
)
def test_any_file_is_taken_or_refused_in_words(
    service: type[BaseSettings], content: bytes, is_there: bool, data: st.DataObject
) -> None:
    names = sorted(names_of(service))
    name = data.draw(st.sampled_from(names))
    given = {right: value for right, value in RIGHT.items() if right in names and right != name}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "value")
        if is_there:
            path.write_bytes(content + SECRET.encode() if is_secret(service, name) else content)
        check(service, given | {f"{name}_FILE": str(path)})


def test_the_check_sees_a_secret_that_is_shown() -> None:
    class Careless(SnapshotterSettings):
        @property
        def told(self) -> str:
            return self.database_url.get_secret_value()

    with pytest.raises(AssertionError):
        check(Careless, RIGHT)
