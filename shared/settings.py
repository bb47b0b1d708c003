"""Settings from the environment: the ones all services have, and the loader.

Every setting `NAME` can also be given as `NAME_FILE`, the path of a file that holds the value (a mounted secret).
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

JWT_SECRET_BYTES_MIN = 32
FILE_BYTES_MAX = 65_536
"""Of a file that holds a value; a device that never ends is none."""


class SettingsError(Exception):
    """One or more settings are wrong; the text names each variable and says what is wrong with it."""


def parts_of_url(url: str) -> SplitResult:
    """Take a URL apart; of what is none all parts are empty: the library's refusal would quote it, password and all."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _checked_servers(value: SecretStr) -> SecretStr:
    for url in value.get_secret_value().split(","):
        parts = parts_of_url(url.strip())
        if parts.scheme not in ("nats", "tls") or not parts.hostname or not _has_port(parts):
            raise ValueError("must be URLs like nats://user:password@host:4222, with commas between")
    return value


def _checked_database(value: SecretStr) -> SecretStr:
    parts = parts_of_url(value.get_secret_value())
    hosts = parts.netloc.rpartition("@")[2].split(",")  # several hosts are one URL
    ports_are_right = all(_has_port(urlsplit(f"//{host}")) for host in hosts)
    if parts.scheme != "postgresql" or not (parts.netloc or "host=" in parts.query) or not ports_are_right:
        raise ValueError("must be a URL like postgresql://user:password@host:5432/database")
    return value


def _has_port(parts: SplitResult) -> bool:
    """Tell whether the port is a number that a port can be, or left out."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _plain_postgres_url(value: SecretStr) -> SecretStr:
    return SecretStr(re.sub(r"^postgres(ql)?(\+asyncpg)?://", "postgresql://", value.get_secret_value()))


def _long_enough(secret: SecretStr) -> SecretStr:
    if len(secret.get_secret_value().encode()) < JWT_SECRET_BYTES_MIN:
        raise ValueError(f"at least {JWT_SECRET_BYTES_MIN} bytes long (`openssl rand -hex 32` makes one)")
    return secret


def _known_timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError("an IANA time zone, such as America/New_York") from error
    return name


DatabaseUrl = Annotated[SecretStr, AfterValidator(_plain_postgres_url), AfterValidator(_checked_database)]
NatsUrl = Annotated[SecretStr, AfterValidator(_checked_servers)]
JwtSecret = Annotated[SecretStr, AfterValidator(_long_enough)]
Timezone = Annotated[str, AfterValidator(_known_timezone)]
Port = Annotated[int, Field(ge=0, le=65535)]


class LogSettings(BaseSettings):
    """What every process has. `NAME_FILE` is honoured for each field."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="The least severe log line that is written."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _NamedFileSource(settings_cls)


class BusSettings(LogSettings):
    """What everybody on the bus has."""

    nats_url: NatsUrl = Field(
        default=SecretStr("nats://127.0.0.1:4222"),
        description="NATS with JetStream, `nats://user:password@host:port`; several with commas between.",
    )
    nats_stream_replicas: Literal[1, 3, 5] = Field(
        default=1,
        description="How many servers of a NATS cluster keep each stream: 1, 3 or 5; the same for all services.",
    )

    @field_validator("nats_stream_replicas", mode="before")
    @classmethod
    def _number(cls, given: object) -> object:
        return int(given) if isinstance(given, str) and given.isdecimal() else given


class ServiceSettings(BusSettings):
    """What every service has: its database, its bus, its health port."""

    database_url: DatabaseUrl = Field(
        description="PostgreSQL 16 or later, `postgresql://user:password@host:port/database`; "
        "of several hosts, commas between, the primary."
    )
    health_host: str = Field(default="0.0.0.0", description="Address that the health port listens on.")  # noqa: S104


S = TypeVar("S", bound=BaseSettings)


def load(settings_type: type[S]) -> S:
    """Read the settings from the environment; raise SettingsError that lists everything wrong with them."""
    try:
        return settings_type()
    except ValidationError as error:
        lines = [_explanation(settings_type, problem) for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from None


def _explanation(settings_type: type[BaseSettings], problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if not name:
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        field = settings_type.model_fields[name]
        return f"{name.upper()} is not set: {field.description}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message.removeprefix("Input should be ").removeprefix("a ")
    given = problem["input"]
    shown = "" if isinstance(given, SecretStr) or _is_secret(settings_type, name) else f" (it is {given!r})"
    return f"{name.upper()} must be {message.removeprefix('must be ')}{shown}"


def _is_secret(settings_type: type[BaseSettings], name: str) -> bool:
    field = settings_type.model_fields.get(name)
    return field is None or "SecretStr" in str(field.annotation)


class _NamedFileSource(PydanticBaseSettingsSource):
    """Reads a field's value from the file that `<NAME>_FILE` names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{field_name.upper()}_FILE")
        if not path:
            return None, field_name, False
        try:
            with Path(path).open("rb") as file:
                content = file.read(FILE_BYTES_MAX + 1)
            text = content.decode()
        except (OSError, ValueError) as error:
            raise SettingsError(f"{field_name.upper()}_FILE cannot be read: {error}") from error
        if len(content) > FILE_BYTES_MAX:
            raise SettingsError(f"{field_name.upper()}_FILE is longer than {FILE_BYTES_MAX} bytes: {path}")
        return text.strip(), field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: value for name, value in values.items() if value is not None}
