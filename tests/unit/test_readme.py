"""The README says what is so: its commands exist, its settings are all settings, its answers fit the contract."""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import BaseModel

from services.api_gateway.responses import CurrentPortfolio, Performance, RefreshedPrices, TakenSnapshot
from tests.unit.test_configuration_files import as_text, settings_of

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
TABLE_SERVICES = ("price_feeder", "snapshotter", "api_gateway", "market_simulator")


def settings_table() -> str:
    """Return the README's settings table as the settings models would have it."""
    users: dict[str, list[str]] = {}
    rows: dict[str, tuple[str, str]] = {}
    for service in TABLE_SERVICES:
        for name, field in settings_of(service).items():
            users.setdefault(name, []).append(service)
            default = (
                "needed" if field.is_required() else f"`{text}`" if (text := as_text(field.default)) else ""
            )
            rows.setdefault(name, (default, str(field.description)))
    ports = ", ".join(str(settings_of(service)["HEALTH_PORT"].default) for service in TABLE_SERVICES[:3])
    rows["HEALTH_PORT"] = (ports, "Port of `/healthz`, `/readyz` and `/metrics`, by service.")
    lines = ["| setting | default | read by | meaning |", "|---|---|---|---|"]
    for name, (default, meaning) in rows.items():
        readers = "all" if len(users[name]) >= 3 else ", ".join(users[name])
        lines.append(f"| `{name}` | {default} | {readers} | {meaning} |")
    return "\n".join(lines)


def test_settings_table_is_that_of_the_settings_models() -> None:
    assert settings_table() in README


def test_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z]+)\b(?= |`|$)", README, flags=re.MULTILINE))
    assert {"run", "test", "check", "smoke", "token", "up", "down", "bench", "help"} <= used
    assert used <= targets | {"on"}
    for module in re.findall(r"python -m (services\.[a-z_]+)", README):
        assert (ROOT / module.replace(".", "/") / "__main__.py").exists()
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("current", CurrentPortfolio),
        ("performance", Performance),
        ("snapshot", TakenSnapshot),
        ("refresh", RefreshedPrices),
    ],
)
def test_answers_of_the_readme_fit_the_contract(name: str, model: type[BaseModel]) -> None:
    block = re.search(rf"<!-- answer: {name} -->\n```json\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    model.model_validate(json.loads(block[1], parse_float=Decimal), strict=False)


def test_log_events_that_the_readme_names_are_logged() -> None:
    section = README.split("## When something is wrong")[1].split("\n## ")[0]
    sources = "".join(
        path.read_text() for folder in ("services", "shared") for path in (ROOT / folder).rglob("*.py")
    )
    events = set(re.findall(r"`([a-z]+_[a-z_]+)`", section)) - {"data_available"}
    assert events
    for event in events:
        assert f'"{event}"' in sources, event
