"""What is said on the bus, held against docs/asyncapi.yaml."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import nats
import yaml
from nats.aio.msg import Msg

from tests.waiting import settled

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent.parent / "docs" / "asyncapi.yaml").read_text()
)


def validator(name: str) -> jsonschema.Draft202012Validator:
    """Return what checks payloads of a schema of the document."""
    whole = {"components": DOCUMENT["components"], "$ref": f"#/components/schemas/{name}"}
    return jsonschema.Draft202012Validator(whole)


def message_on(subject: str) -> str | None:
    """Return which message the document has on a subject; None for a subject that it does not know."""
    for channel in DOCUMENT["channels"].values():
        if channel["address"] is None:
            continue
        pattern = re.escape(channel["address"])
        for name, parameter in channel.get("parameters", {}).items():
            values = "|".join(parameter.get("enum", ["[^.]+"]))
            pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?:{values})")
        if re.fullmatch(pattern, subject):
            (message,) = channel["messages"]
            return str(message)
    return None


@dataclass
class Overheard:
    """How often each message was heard, and what was wrong with them."""

    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def hear(self, subject: str, payload: bytes) -> None:
        name = message_on(subject)
        if name is None:
            self.problems.append(f"{subject} is not in the document")
            return
        self.counts[name] = self.counts.get(name, 0) + 1
        try:
            said = json.loads(payload)
        except ValueError:
            self.problems.append(f"{subject}: no JSON")
            return
        for error in validator(name).iter_errors(said):
            self.problems.append(f"{subject}: {error.json_path}: {error.message}")


@asynccontextmanager
async def overhearing(nats_url: str) -> AsyncIterator[Overheard]:
    """Hear everything that the project says on the bus; at the end all of it must have been as documented."""
    overheard = Overheard()

    async def hear(message: Msg) -> None:
        overheard.hear(message.subject, message.data)

    client = await nats.connect(nats_url)
    try:
        for word in sorted({(address or "").partition(".")[0] for address in _addresses()} - {""}):
            await client.subscribe(f"{word}.>", cb=hear)
        await settled(client)
        yield overheard
        await client.drain()
    finally:
        await client.close()
    assert not overheard.problems, overheard.problems[:10]


def _addresses() -> list[str | None]:
    return [channel["address"] for channel in DOCUMENT["channels"].values()]
