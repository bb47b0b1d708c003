"""The AsyncAPI document: committed, true, valid by a parser of AsyncAPI and by its own schemas."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from shared import asyncapi, messages
from shared.asyncapi import EXAMPLES
from shared.messages import STREAMS, Message, price_subject, ticket_subject
from tests.contract import DOCUMENT, Overheard, message_on, validator

ROOT = Path(__file__).parent.parent.parent
COMMITTED = ROOT / "docs" / "asyncapi.yaml"
VALIDATOR = ROOT / "tests" / "asyncapi"
SUBJECTS = [value for name, value in vars(messages).items() if name.isupper() and isinstance(value, str)]


def test_committed_document_is_the_one_that_the_messages_make() -> None:
    assert COMMITTED.read_text() == asyncapi.text(), "run `make asyncapi`"


def parsed(text: str, folder: Path) -> dict[str, Any]:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    for name in ("package.json", "package-lock.json", "validate.mjs"):
        shutil.copy(VALIDATOR / name, folder)
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)
    said = []
    for document in (text, text.replace("action: send", "action: shout", 1)):
        command = ["node", "validate.mjs"]
        done = subprocess.run(command, cwd=folder, input=document, capture_output=True, text=True, check=True)
        said.append(json.loads(done.stdout))
    assert not said[1]["valid"], "the parser finds nothing wrong with what is wrong"
    result: dict[str, Any] = said[0]
    return result


def test_the_parser_of_asyncapi_takes_the_document(tmp_path: Path) -> None:
    said = parsed(COMMITTED.read_text(), tmp_path)
    assert said["valid"]
    # that there is a version 3.1 is no more than a hint
    assert [found["code"] for found in said["diagnostics"]] in ([], ["asyncapi-latest-version"])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_example_is_what_travels_and_fits_its_schema(example: Message) -> None:
    name = type(example).__name__
    travels = json.loads(example.model_dump_json())
    validator(name).validate(travels)
    assert DOCUMENT["components"]["messages"][name]["examples"][0]["payload"] == travels
    assert type(example).model_validate_json(example.model_dump_json()) == example


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("PriceTick", {"price": 715.5}),
        ("PriceTick", {"price": "-1"}),
        ("PriceTick", {"price": "1.00001"}),
        ("PriceTick", {"sequence": 0}),
        ("PriceTick", {"symbol": "A B"}),
        ("FeedStatus", {"state": "asleep"}),
        ("SnapshotTaken", {"total_value": "1.001"}),
        ("PricesRequested", {"symbols": []}),
    ],
)
def test_schema_refuses_what_the_model_refuses(name: str, change: dict[str, Any]) -> None:
    example = next(example for example in EXAMPLES if type(example).__name__ == name)
    wrong = json.loads(example.model_dump_json()) | change
    assert not validator(name).is_valid(wrong)
    if change != {"price": 715.5}:  # our own reader forgives a number
        with pytest.raises(ValidationError):
            type(example).model_validate(wrong)


def test_a_field_that_is_added_within_the_version_is_ignored() -> None:
    example = json.loads(EXAMPLES[0].model_dump_json())
    assert validator(type(EXAMPLES[0]).__name__).is_valid(example | {"added": 1})


def test_every_message_and_subject_of_the_code_is_in_the_document() -> None:
    said = {model.__name__ for model in vars(messages).values() if _is_message(model)}
    assert said <= set(DOCUMENT["components"]["schemas"])
    assert len(SUBJECTS) >= 10
    for subject in SUBJECTS:
        concrete = subject.replace(".>", ".equity.A").replace("*", "a")
        assert message_on(concrete), subject


def _is_message(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Message) and candidate is not Message


def test_every_field_says_what_it_means() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            assert "description" in described or "$ref" in described, f"{name}.{field}"
    assert "`stale`: No price was confirmed" in DOCUMENT["components"]["schemas"]["FeedState"]["description"]


def test_channels_say_what_their_stream_keeps() -> None:
    kept = {
        channel["address"]: channel["x-jetstream"]["stream"]
        for channel in DOCUMENT["channels"].values()
        if "x-jetstream" in channel
    }
    assert kept == {
        "prices.v1.{class}.{token}": "PRICES",
        "feed.v1.status": "FEED",
        "feed.v1.confirmed": "FEED",
        "timer.v1.snapshot": "TIMER",
        "portfolio.v1.snapshots_taken": "PORTFOLIO",
        "portfolio.v1.requested_snapshot_taken": "PORTFOLIO",
        "gateway.v1.tickets.{digest}": "TICKETS",
        "dead_letters.v1.{consumer}": "DEAD_LETTERS",
        "probes.v1.{service}": "PROBES",
    }
    assert set(kept.values()) == {stream.name for stream in STREAMS}
    assert DOCUMENT["channels"]["prices"]["x-jetstream"]["max_msgs_per_subject"] == 1200  # 5 min, 4 a second


def test_subjects_find_their_message() -> None:
    assert message_on(price_subject("BTC/USD")) == "PriceTick"
    assert message_on(ticket_subject("ab12")) == "StreamTicket"
    assert message_on("prices.v1.bond.A") is None
    assert message_on("prices.v1.equity.A.B") is None


def test_what_is_overheard_is_held_against_the_document() -> None:
    overheard = Overheard()
    overheard.hear(price_subject("BRK.B"), EXAMPLES[0].model_dump_json().encode())
    assert (overheard.counts, overheard.problems) == ({"PriceTick": 1}, [])
    overheard.hear(price_subject("BRK.B"), b'{"symbol":"BRK.B"}')
    overheard.hear("prices.v2.equity.A", b"{}")
    assert overheard.problems[-1] == "prices.v2.equity.A is not in the document"
    assert any("'price' is a required property" in problem for problem in overheard.problems)


def test_document_is_read_the_same_by_another_reader_of_yaml() -> None:
    assert yaml.safe_load(asyncapi.text()) == json.loads(json.dumps(asyncapi.document()))
