""".env.example, docker-compose.yml and the Dockerfile say what the code says."""

import importlib
import json
import re
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from local.demo import DEMO_USERS
from local.settings import LocalSettings
from services.admin.portfolio_file import positions_of
from shared.lifecycle import STOP_GRACE_SECONDS
from tests.servers import NATS_IMAGE, POSTGRES_IMAGE

ROOT = Path(__file__).parent.parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SECRETS_TO_SET = {"POSTGRES_PASSWORD", "NATS_PASSWORD", "JWT_SECRET"}
SERVICES = sorted(path.parent.name for path in ROOT.glob("services/*/settings.py"))
JOBS = {"migrate", "demo_portfolios"}
FOREIGN = {"postgres", "nats"}


def settings_of(service: str) -> dict[str, FieldInfo]:
    """Return the fields of every settings model of a service, by the name of their variable."""
    module = importlib.import_module(f"services.{service}.settings")
    models = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BaseSettings) and value.__module__ == module.__name__
    ]
    assert models, f"services.{service}.settings has no settings model"
    return {name.upper(): field for model in models for name, field in model.model_fields.items()}


def as_text(value: object) -> str:
    """Write a default as the environment would have it."""
    match value:
        case None | ():
            return ""
        case bool():
            return str(value).lower()
        case SecretStr():
            return value.get_secret_value()
        case float():
            return f"{value:g}"
    return str(value)


class Line(NamedTuple):
    value: str
    is_set: bool
    meaning: str


def example() -> dict[str, Line]:
    """Return what .env.example says of each variable."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    found: dict[str, Line] = {}
    for above, line in zip(["", *lines], lines, strict=False):
        match = re.fullmatch(r"(#?)([A-Z_]+)=(.*)", line)
        if match:
            assert match[2] not in found, f"{match[2]} is there twice"
            meaning = above.removeprefix("# ") if above.startswith("# ") and "----" not in above else ""
            found[match[2]] = Line(match[3], not match[1], meaning)
    return found


EXAMPLE = example()
COMPOSE_VARIABLES = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))


@pytest.mark.parametrize("service", SERVICES)
def test_every_setting_is_in_the_example_with_its_default(service: str) -> None:
    for name, field in settings_of(service).items():
        assert name in EXAMPLE, f"{name} of {service} is missing in .env.example"
        if name == "HEALTH_PORT":
            assert f"{service} {field.default}" in EXAMPLE[name].meaning
        elif name == "DATABASE_URL":
            assert field.is_required()
        else:
            assert EXAMPLE[name].value == as_text(field.default), f"default of {name}"


def test_settings_of_the_local_system_are_in_the_example() -> None:
    assert {name.upper() for name in LocalSettings.model_fields} <= set(EXAMPLE)
    assert EXAMPLE["LOCAL_DATA_DIR"].value == str(LocalSettings.model_fields["local_data_dir"].default)


def test_example_names_nothing_that_nobody_reads() -> None:
    read = {name for service in SERVICES for name in settings_of(service)}
    read |= {name.upper() for name in LocalSettings.model_fields}
    assert set(EXAMPLE) == read | COMPOSE_VARIABLES


def test_example_says_what_each_setting_means_in_one_line() -> None:
    assert [name for name, line in EXAMPLE.items() if len(line.meaning) < 10] == []


def test_example_sets_nothing_but_secrets_and_those_are_empty() -> None:
    assert {name for name, line in EXAMPLE.items() if line.is_set} == SECRETS_TO_SET
    assert {EXAMPLE[name].value for name in SECRETS_TO_SET} == {""}


@pytest.mark.parametrize("service", SERVICES)
def test_compose_gives_each_service_its_settings_and_nothing_else(service: str) -> None:
    assert set(COMPOSE["services"][service]["environment"]) == set(settings_of(service))


def test_compose_has_every_service() -> None:
    assert set(COMPOSE["services"]) == {*SERVICES, *JOBS, *FOREIGN}


def test_compose_uses_the_ports_that_are_documented() -> None:
    for service in ("api_gateway", "price_feeder", "snapshotter"):
        given = COMPOSE["services"][service]["environment"]["HEALTH_PORT"]
        assert given == settings_of(service)["HEALTH_PORT"].default
    simulator = COMPOSE["services"]["market_simulator"]["environment"]
    assert simulator["SIMULATOR_PORT"] == settings_of("market_simulator")["SIMULATOR_PORT"].default
    gateway = COMPOSE["services"]["api_gateway"]
    assert gateway["environment"]["GATEWAY_PORT"] == 8000
    assert gateway["ports"] == ["${GATEWAY_PUBLISH_ADDRESS:-127.0.0.1}:${GATEWAY_PORT:-8000}:8000"]


def test_compose_has_no_password_of_its_own() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in ("POSTGRES_PASSWORD", "NATS_PASSWORD"):
        uses = re.findall(rf"\$\{{{name}(.)", text)
        assert uses
        assert set(uses) == {":"}, f"{name} must be required wherever it is used"
    assert not re.search(r"(?i)(password|secret)\S*:-", text)


def test_only_the_gateway_is_published() -> None:
    published = [name for name, service in COMPOSE["services"].items() if "ports" in service]
    assert published == ["api_gateway"]


@pytest.mark.parametrize("service", sorted({*SERVICES, *JOBS}))
def test_our_containers_cannot_write_or_gain_rights(service: str) -> None:
    container = COMPOSE["services"][service]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in container
    assert "privileged" not in container


@pytest.mark.parametrize("service", sorted(COMPOSE["services"]))
def test_every_container_has_bounded_memory_and_logs(service: str) -> None:
    container = COMPOSE["services"][service]
    assert re.fullmatch(r"\d+[mg]", container["mem_limit"])
    assert set(container["logging"]["options"]) == {"max-size", "max-file"}


@pytest.mark.parametrize("service", ["api_gateway", "price_feeder", "snapshotter", "market_simulator"])
def test_services_may_end_by_themselves_and_are_started_again(service: str) -> None:
    container = COMPOSE["services"][service]
    grace_seconds = int(container["stop_grace_period"].removesuffix("s"))
    assert grace_seconds > STOP_GRACE_SECONDS
    assert container["restart"] == "unless-stopped"
    assert "healthcheck" in container


def test_image_runs_as_nobody_in_particular() -> None:
    users = re.findall(r"^USER (.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert users == ["10001:10001"]


def test_image_has_the_chart_library_from_its_own_stage_alone() -> None:
    assert "**/node_modules" in (ROOT / ".dockerignore").read_text().splitlines()
    assert "COPY --from=page /page/node_modules services/api_gateway/page/node_modules" in (
        (ROOT / "Dockerfile").read_text()
    )


def test_lock_file_of_the_page_names_no_host() -> None:
    locked = json.loads((ROOT / "services/api_gateway/page/package-lock.json").read_text())["packages"]
    libraries = {name: package for name, package in locked.items() if name}
    assert "node_modules/lightweight-charts" in libraries
    for name, package in libraries.items():
        assert "resolved" not in package, name
        assert package["integrity"].startswith("sha512-"), name


def test_tests_run_on_the_servers_that_compose_runs() -> None:
    assert COMPOSE["services"]["postgres"]["image"] == POSTGRES_IMAGE
    assert COMPOSE["services"]["nats"]["image"] == NATS_IMAGE


def test_demo_of_compose_has_the_portfolios_of_the_local_demo() -> None:
    script = COMPOSE["services"]["demo_portfolios"]["command"][-1]
    assert dict(re.findall(r"^add (\w+) (\S+)$", script, flags=re.MULTILINE)) == {
        user.subject: user.cash for user in DEMO_USERS
    }
    for user in DEMO_USERS:
        content = (ROOT / "ops" / "demo" / f"{user.subject}.csv").read_bytes()
        assert [tuple(position) for position in positions_of(content)] == [
            (ticker, Decimal(shares), Decimal(cost)) for ticker, shares, cost in user.positions
        ]


def test_new_env_fills_the_secrets_at_random_and_keeps_the_rest() -> None:
    first, second = (
        subprocess.run([ROOT / "ops" / "new-env"], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    made = re.findall(r"^([A-Z_]+)=([0-9a-f]{48})$", first, flags=re.MULTILINE)
    assert {name for name, _ in made} == SECRETS_TO_SET
    assert len({value for _, value in made}) == len(SECRETS_TO_SET)
    assert not {value for _, value in made} & set(re.findall(r"[0-9a-f]{48}", second))
    assert re.sub(r"=[0-9a-f]{48}$", "=", first, flags=re.MULTILINE) == (ROOT / ".env.example").read_text()
