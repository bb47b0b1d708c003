"""The OpenAPI document: committed, true, and valid by its own schemas."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from services.api_gateway import openapi

COMMITTED = Path(__file__).parent.parent.parent / "docs" / "openapi.json"
DOCUMENT = json.loads(COMMITTED.read_text())


def test_committed_document_is_the_one_that_the_models_make() -> None:
    assert COMMITTED.read_text() == openapi.text(), "run `make openapi`"


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            yield path, operation


def examples() -> Iterator[Any]:
    for path, operation in operations():
        for status, response in operation["responses"].items():
            for content in response.get("content", {}).values():
                values = [content["example"]] if "example" in content else []
                values += [example["value"] for example in content.get("examples", {}).values()]
                for value in values:
                    yield pytest.param(content["schema"], value, id=f"{path} {status}")


@pytest.mark.parametrize(("schema", "example"), list(examples()))
def test_example_fits_its_schema(schema: dict[str, Any], example: Any) -> None:
    whole = {"components": DOCUMENT["components"], **schema}
    jsonschema.Draft202012Validator(whole).validate(example)


def test_the_specifications_example_is_shown() -> None:
    responses = DOCUMENT["paths"]["/api/portfolio/current"]["get"]["responses"]
    example = responses["200"]["content"]["application/json"]["example"]
    position = example["positions"][0]
    assert (example["total_value"], example["investment_value"], example["cash_balance"]) == (
        125000.50,
        120000.00,
        5000.50,
    )
    assert (position["current_value"], position["unrealized_gain_loss_percent"]) == (17500.00, 16.67)


@pytest.mark.parametrize(("path", "good"), [("snapshots", "201"), ("refresh-prices", "200")])
def test_every_status_of_what_is_asked_for_by_hand_is_documented(path: str, good: str) -> None:
    responses = DOCUMENT["paths"][f"/api/portfolio/{path}"]["post"]["responses"]
    bad = ["400", "401", "403", "404", "405", "413", "417", "429", "500", "503"]
    assert list(responses) == [good, *bad]
    assert all("application/problem+json" in responses[status]["content"] for status in bad)
    assert all("Retry-After" in responses[status]["headers"] for status in ("429", "503"))


@pytest.mark.parametrize(
    ("path", "good"), [("/api/portfolio/current", ["200"]), ("/api/portfolio/performance", ["200", "304"])]
)
def test_every_status_is_documented(path: str, good: list[str]) -> None:
    responses = DOCUMENT["paths"][path]["get"]["responses"]
    bad = ["400", "401", "403", "404", "405", "413", "417", "429", "500", "503"]
    assert list(responses) == good + bad
    assert all("application/problem+json" in responses[status]["content"] for status in bad)
    assert all("Retry-After" in responses[status]["headers"] for status in ("429", "503"))


def test_chart_that_is_known_has_its_tag_and_no_content() -> None:
    responses = DOCUMENT["paths"]["/api/portfolio/performance"]["get"]["responses"]
    assert "content" not in responses["304"]
    assert {"ETag", "Cache-Control"} <= set(responses["200"]["headers"]) & set(responses["304"]["headers"])


def test_range_that_is_over_fits_the_schema_with_its_end_and_without_a_value() -> None:
    answer: dict[str, Any] = {
        "timeframe": "1D",
        "until": "2024-01-01T10:00:00Z",
        "data_points": [],
        "start_value": None,
        "current_value": None,
        "profit_loss": None,
        "profit_loss_percent": None,
        "data_available": False,
        "simulated": False,
    }
    schema = {"components": DOCUMENT["components"], "$ref": "#/components/schemas/Performance"}
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(answer)
    assert not validator.is_valid(answer | {"until": None})


def test_timeframes_are_listed() -> None:
    parameter, until = DOCUMENT["paths"]["/api/portfolio/performance"]["get"]["parameters"]
    assert (until["name"], until["schema"]["format"]) == ("until", "date-time")
    assert parameter["schema"]["enum"] == ["1D", "1W", "1M", "3M", "YTD", "ALL"]
    assert parameter["schema"]["default"] == "1D"
