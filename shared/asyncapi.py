"""The AsyncAPI document of the bus, made from the messages: `python -m shared.asyncapi`, or `make asyncapi`."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from shared.messages import (
    FEED_STATUS,
    PRICES_CONFIRMED,
    PRICES_REQUESTED,
    REFRESH_REQUESTED,
    REQUESTED_SNAPSHOT_TAKEN,
    SNAPSHOT_DUE,
    SNAPSHOT_REQUESTED,
    SNAPSHOTS_TAKEN,
    STREAMS,
    AssetClass,
    CurrentPrice,
    DeadLetter,
    FeedState,
    FeedStatus,
    Message,
    PricesConfirmed,
    PricesRefreshed,
    PricesReply,
    PricesRequested,
    PriceTick,
    Probe,
    RefreshRequested,
    SnapshotDue,
    SnapshotRequested,
    SnapshotsTaken,
    SnapshotTaken,
    Stream,
    StreamTicket,
    symbol_token,
)

_Node = dict[str, Any]
_SLOT = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
_TRADED = datetime(2026, 3, 2, 14, 59, 57, 310000, tzinfo=UTC)
_RECEIVED = datetime(2026, 3, 2, 14, 59, 57, 412000, tzinfo=UTC)

DESCRIPTION = """\
Everything that the services of Foliotick say to each other, and to yours, over NATS.

**Payloads** are JSON. Decimals travel as text, times as RFC 3339 in UTC. A reader ignores fields that it does not know:
new ones are added within a version. A breaking change is a new version (`prices.v2.…`), served beside this one.

**Last values and replay.** The streams keep what `x-jetstream` says. A consumer of `PRICES` with the delivery policy
`last_per_subject` gets the last tick of every symbol at once and then each new one; one with `by_start_time` or
`by_start_sequence` gets what it missed first. A subscription without JetStream hears new messages only.

**Once, twice, never.** A tick is published after its price is committed: who hears it finds it in the table. The same
message may come again after a failure, and one that nobody kept may be missed. So ignore a tick whose `sequence` is
not greater than the one you have of that symbol; if it is greater by more than one, you have missed some, which
matters only to those who need each of them.

**Requests** are answered on the reply subject of the request. A refusal is an empty message with the headers of NATS's
service convention: `Nats-Service-Error-Code` (a number as in HTTP), `Nats-Service-Error` (text) and, where trying again
may help, `Retry-After` (seconds). When nobody answers, NATS itself says 503 in the status line of the headers.
"""

EXAMPLES: tuple[Message, ...] = (
    PriceTick(
        symbol="BRK.B",
        price=Decimal("715.5000"),
        traded_at=_TRADED,
        received_at=_RECEIVED,
        feed="iex",
        sequence=1042,
    ),
    FeedStatus(
        state=FeedState.LIVE, since=_SLOT, detail="3 symbols are streamed, 2 polled", streamed=3, polled=2
    ),
    PricesConfirmed(confirmed_at=_SLOT, symbols=("AAPL", "BRK.B", "BTC/USD")),
    PricesRequested(symbols=("BRK.B", "NOPE")),
    PricesReply(
        prices=(
            CurrentPrice(
                symbol="BRK.B",
                price=Decimal("715.5000"),
                traded_at=_TRADED,
                received_at=_RECEIVED,
                feed="iex",
                sequence=1042,
                confirmed_at=_SLOT,
            ),
        ),
        unknown=("NOPE",),
    ),
    RefreshRequested(user_id=7, requested_at=_SLOT),
    PricesRefreshed(refreshed_at=_SLOT + timedelta(seconds=1), symbols=3, confirmed=2, changed=1, rejected=1),
    SnapshotDue(scheduled_at=_SLOT, shard=0, shards=2),
    SnapshotsTaken(scheduled_at=_SLOT, shard=0, shards=2, portfolios=1200, positions=9800, unpriced=3),
    SnapshotRequested(user_id=7, requested_at=_SLOT),
    SnapshotTaken(
        user_id=7,
        timestamp=_SLOT,
        total_value=Decimal("22500.50"),
        cash_balance=Decimal("5000.50"),
        investment_value=Decimal("17500.00"),
        unpriced_positions=0,
        simulated=False,
    ),
    DeadLetter(
        subject=SNAPSHOT_DUE,
        payload="eyJzY2hlZHVsZWRfYXQiOiAieWVzdGVyZGF5In0=",
        size=29,
        reason="malformed: Input should be a valid datetime or date",
        deliveries=1,
        published_at=_SLOT,
        put_aside_at=_SLOT + timedelta(seconds=1),
        put_aside_by="snapshotter",
    ),
    Probe(probed_at=_SLOT, filler="-" * 16),
    StreamTicket(
        subject="demo",
        ticket_expires_at=_SLOT + timedelta(seconds=30),
        token_expires_at=_SLOT + timedelta(hours=1),
    ),
)


@dataclass(frozen=True)
class Channel:
    """A subject, what is said on it and how it is delivered."""

    name: str
    subject: str
    message: type[Message]
    title: str
    delivery: str
    sends: str | None = None
    """The service that publishes it."""
    receives: str | None = None
    """The service that hears it and acts; many others may listen."""
    queue: str | None = None
    reply: type[Message] | None = None
    message_id: str | None = None
    parameters: Mapping[str, _Node] | None = None
    internal: bool = False


CHANNELS = (
    Channel(
        "prices",
        "prices.v1.{class}.{token}",
        PriceTick,
        "Price ticks, a subject for each symbol",
        "Kept: the newest ticks of every symbol, at least as many as the replay window of PRICE_REPLAY_MINUTES can "
        "hold, however old. At most four a second and symbol: of faster changes the newest. In the order of their "
        "sequence, at least once.",
        sends="price_feeder",
        message_id="<token>.<sequence>.<received_at in seconds>",
        parameters={
            "class": {
                "description": "A symbol with a slash is `crypto`, all others are `equity`.",
                "enum": [*AssetClass],
            },
            "token": {
                "description": "The symbol, every byte outside `A-Z a-z 0-9 -` as `_` and its hex code in capitals.",
                "examples": [symbol_token(symbol) for symbol in ("AAPL", "BRK.B", "BTC/USD")],
            },
        },
    ),
    Channel(
        "feed_status",
        FEED_STATUS,
        FeedStatus,
        "The state of the price feed",
        "Kept: the last one. Published when the state changes, at least once.",
        sends="price_feeder",
    ),
    Channel(
        "prices_confirmed",
        PRICES_CONFIRMED,
        PricesConfirmed,
        "Prices that are still the last",
        "Kept: the last one. Published after every polling round; one that is missed is made good by the next.",
        sends="price_feeder",
    ),
    Channel(
        "prices_requested",
        PRICES_REQUESTED,
        PricesRequested,
        "What do these symbols cost?",
        "Not kept. Any price feeder answers, also one on standby. Refused with 400 (malformed) and 503 (the price "
        "cache cannot be read, or too many requests at once).",
        receives="price_feeder",
        queue="price_feeder",
        reply=PricesReply,
    ),
    Channel(
        "refresh_requested",
        REFRESH_REQUESTED,
        RefreshRequested,
        "Ask the market for a user's prices now",
        "Not kept. The price feeder that holds the lease answers. Refused with 400, 404 (no such user), 429 (the "
        "user's last request is too young) and 503 (prices cannot be asked for).",
        receives="price_feeder",
        reply=PricesRefreshed,
    ),
    Channel(
        "snapshot_due",
        SNAPSHOT_DUE,
        SnapshotDue,
        "A slot is due",
        "Kept for two days. Deduplicated within two minutes, so that many timers make one message; given to one "
        "snapshotter at a time and again until it is acknowledged after the commit; the second time does nothing. "
        "An operator may publish one by hand.",
        sends="snapshotter",
        receives="snapshotter",
        message_id="<slot>/<shard>/<shards>",
    ),
    Channel(
        "snapshots_taken",
        SNAPSHOTS_TAKEN,
        SnapshotsTaken,
        "A slot's snapshots are committed",
        "Kept for seven days. At least once, after the commit.",
        sends="snapshotter",
        message_id="<slot>/<shard>/<shards>",
    ),
    Channel(
        "snapshot_requested",
        SNAPSHOT_REQUESTED,
        SnapshotRequested,
        "Take a user's snapshot now",
        "Not kept. One snapshotter answers, after the commit. Refused with 400, 403 (a deactivated user), 404 (no such "
        "user), 429 (the user's last request is too young) and 503.",
        receives="snapshotter",
        queue="snapshotter",
        reply=SnapshotTaken,
    ),
    Channel(
        "requested_snapshot_taken",
        REQUESTED_SNAPSHOT_TAKEN,
        SnapshotTaken,
        "A requested snapshot is committed",
        "Kept for seven days. At least once, after the commit.",
        sends="snapshotter",
    ),
    Channel(
        "stream_tickets",
        "gateway.v1.tickets.{digest}",
        StreamTicket,
        "Tickets to the portfolio stream",
        "Kept in memory for a minute, deleted by the gateway that takes it. For the gateways alone.",
        sends="api_gateway",
        parameters={"digest": {"description": "A digest of the ticket, which itself is on no bus."}},
        internal=True,
    ),
    Channel(
        "dead_letters",
        "dead_letters.v1.{consumer}",
        DeadLetter,
        "Messages that could not be handled",
        "Kept for 30 days, the newest 1,000, at most 32 MB. Published once for a message, before the message itself is "
        "given up: at once when it is malformed, else after five deliveries that nobody answered. For an operator: "
        "`admin dead-letters` lists them, `admin replay-dead-letter` publishes one again.",
        sends="snapshotter",
        message_id="<stream>/<its number there>/<when it was published>",
        parameters={"consumer": {"description": "Whose consumer put it aside.", "examples": ["snapshotter"]}},
    ),
    Channel(
        "probes",
        "probes.v1.{service}",
        Probe,
        "Whether JetStream stores",
        "Kept: the last one of each service. Published every 30 seconds, and each second while something is not "
        "acknowledged. Only the acknowledgement matters.",
        parameters={"service": {"description": "The name under which a service connects."}},
        internal=True,
    ),
)


def document() -> _Node:
    """Return the document as plain data."""
    schemas = _schemas()
    replies = [channel for channel in CHANNELS if channel.reply]
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Foliotick's bus", "version": "1.0.0", "description": DESCRIPTION},
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "NATS with JetStream; address, user and password are in NATS_URL.",
                "security": [{"$ref": "#/components/securitySchemes/password"}],
            }
        },
        "channels": {channel.name: _channel(channel) for channel in CHANNELS}
        | {f"{channel.name}_reply": _reply_channel(channel) for channel in replies},
        "operations": {
            name: operation for channel in CHANNELS for name, operation in _operations(channel).items()
        },
        "components": {
            "securitySchemes": {"password": {"type": "userPassword"}},
            "messages": {
                **{model.__name__: _message(model) for model in _models()},
                "Refusal": {
                    "title": "Refusal",
                    "summary": "A request was refused.",
                    "description": "The payload is empty.",
                    "headers": {"$ref": "#/components/schemas/RefusalHeaders"},
                },
            },
            "schemas": schemas | {"RefusalHeaders": _REFUSAL_HEADERS},
        },
    }


def text() -> str:
    """Return the document as YAML."""
    return "# Made by `make asyncapi` from shared/messages.py.\n" + yaml.dump(
        document(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    )


# ---- channels and operations ---------------------------------------------------------------------


def _channel(channel: Channel) -> _Node:
    description = f"{_text(channel.message)}\n\n{textwrap.fill(channel.delivery, 110)}"
    node: _Node = {
        "address": channel.subject,
        "title": channel.title,
        "description": description,
        "messages": {channel.message.__name__: {"$ref": f"#/components/messages/{channel.message.__name__}"}},
    }
    if channel.parameters:
        node["parameters"] = dict(channel.parameters)
    stream = _stream_of(channel.subject)
    if stream:
        node["x-jetstream"] = _kept(stream)
    if channel.message_id:
        node["x-nats-msg-id"] = channel.message_id
    if channel.internal:
        node["x-internal"] = True
    return node


def _reply_channel(channel: Channel) -> _Node:
    assert channel.reply is not None
    return {
        "address": None,
        "title": f"Answers to {channel.subject}",
        "description": "The reply subject that the request carries: an inbox of who asks.",
        "messages": {
            channel.reply.__name__: {"$ref": f"#/components/messages/{channel.reply.__name__}"},
            "Refusal": {"$ref": "#/components/messages/Refusal"},
        },
    }


def _operations(channel: Channel) -> dict[str, _Node]:
    operations = {}
    if channel.sends:
        operations[f"{channel.sends}_sends_{channel.name}"] = _operation(channel, "send", channel.sends)
    if channel.receives:
        operation = _operation(channel, "receive", channel.receives)
        if channel.queue:
            operation["bindings"] = {"nats": {"queue": channel.queue, "bindingVersion": "0.1.0"}}
        if channel.reply:
            reply = f"#/channels/{channel.name}_reply"
            operation["reply"] = {
                "channel": {"$ref": reply},
                "messages": [
                    {"$ref": f"{reply}/messages/{channel.reply.__name__}"},
                    {"$ref": f"{reply}/messages/Refusal"},
                ],
            }
        operations[f"{channel.receives}_receives_{channel.name}"] = operation
    return operations


def _operation(channel: Channel, action: str, service: str) -> _Node:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel.name}"},
        "summary": f"{channel.title} ({service})",
        "messages": [{"$ref": f"#/channels/{channel.name}/messages/{channel.message.__name__}"}],
    }


def _stream_of(address: str) -> Stream | None:
    for stream in STREAMS:
        for subject in stream.subjects:
            if fnmatchcase(address, subject.replace(">", "*")):
                return stream
    return None


def _kept(stream: Stream) -> _Node:
    kept: _Node = {"stream": stream.name, "storage": "memory" if stream.in_memory else "file"}
    if stream.recoverable:
        kept["persist_mode"] = "async"
    if stream.messages_per_subject:
        kept["max_msgs_per_subject"] = stream.messages_per_subject
    if stream.messages_max:
        kept["max_msgs"] = stream.messages_max
    if stream.max_age:
        kept["max_age_seconds"] = int(stream.max_age.total_seconds())
    if stream.bytes_max:
        kept["max_bytes"] = stream.bytes_max
        kept["discard"] = "old" if stream.discards_oldest else "new"
    return kept


# ---- messages and schemas ------------------------------------------------------------------------


_REFUSAL_HEADERS: _Node = {
    "type": "object",
    "required": ["Nats-Service-Error-Code", "Nats-Service-Error"],
    "properties": {
        "Nats-Service-Error-Code": {
            "type": "string",
            "pattern": r"^\d{3}$",
            "description": "As in HTTP: 400 malformed, 403 and 404 about the user, 413 the answer would be too long, "
            "429 too soon, 500 unexpected, 503 not now.",
            "examples": ["429"],
        },
        "Nats-Service-Error": {
            "type": "string",
            "description": "Why, for a person.",
            "examples": ["too soon"],
        },
        "Retry-After": {
            "type": "string",
            "pattern": r"^\d+$",
            "description": "Seconds after which trying again may help.",
            "examples": ["17"],
        },
    },
}


class _Schemas(GenerateJsonSchema):
    """Says of decimals how many digits their text has."""

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        sign = "" if schema.get("gt") == 0 else "-?"
        return {
            "type": "string",
            "format": "decimal",
            "pattern": rf"^{sign}\d+(\.\d{{1,{schema['decimal_places']}}})?$",
        }


def _models() -> list[type[Message]]:
    models = {channel.message: None for channel in CHANNELS}
    models |= {channel.reply: None for channel in CHANNELS if channel.reply}
    return list(models)


def _schemas() -> dict[str, _Node]:
    _, definitions = models_json_schema(
        [(model, "serialization") for model in _models()],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    schemas: dict[str, _Node] = definitions["$defs"]
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            field.pop("title", None)  # says the name again
    for example in EXAMPLES:
        schemas[type(example).__name__]["examples"] = [example.model_dump(mode="json")]
    schemas[FeedState.__name__]["description"] = _meanings(FeedState)
    return schemas


def _message(model: type[Message]) -> _Node:
    example = next(example for example in EXAMPLES if type(example) is model)
    return {
        "name": model.__name__,
        "title": model.__name__,
        "summary": _text(model).splitlines()[0],
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{model.__name__}"},
        "examples": [{"name": "example", "payload": example.model_dump(mode="json")}],
    }


def _text(model: type[Message]) -> str:
    assert model.__doc__
    return inspect.cleandoc(model.__doc__)


def _meanings(states: type[FeedState]) -> str:
    """Return the texts that stand below the values in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(states))).body
    assert isinstance(definition, ast.ClassDef)
    lines = []
    for value, meaning in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(value, ast.Assign) and isinstance(meaning, ast.Expr):
            lines.append(f"`{ast.literal_eval(value.value)}`: {ast.literal_eval(meaning.value)}")
    return "\n".join(lines)


class _Dumper(yaml.SafeDumper):
    """Writes long texts as blocks, and everything in full."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_multi_representer(str, _represent_text)

if __name__ == "__main__":
    sys.stdout.write(text())
