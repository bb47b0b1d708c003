"""The JetStream streams: made when they are missing, brought up to date when they are ours."""

import base64
import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import nats.errors
from nats.aio.client import Client

from shared import logs
from shared.messages import Stream

API_TIMEOUT_SECONDS = 3.0
DUPLICATE_WINDOW = timedelta(minutes=2)

_NOT_FOUND = 10059
_NO_MESSAGE = 10037
_NO_SUCH_SEQUENCE = 10043
_NOT_DELETED = 10057
_NO_SUCH_SPACE = frozenset({10002, 10047})
_MESSAGE_ID = re.compile(rb"^Nats-Msg-Id: *([!-~]+)\r$", re.MULTILINE)

log = logs.get_logger()

# The server's configuration of a stream is passed through as it is: a field that the client library does not know
# would be lost in its own types, and an operator's change with it.
_Configuration = dict[str, Any]


class StreamUnfit(Exception):
    """A stream of the name that we need is there and is another one's."""


class ApiError(nats.errors.Error):
    """The server refused a request to its JetStream API."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(f"{error.get('description')} (code {error.get('code')}, {error.get('err_code')})")
        self.err_code = error.get("err_code")

    @property
    def says_that_nothing_is_there(self) -> bool:
        """Tell whether the message was not there (any more); a deletion that fails has one code for all its reasons."""
        if self.err_code == _NOT_DELETED:
            return "no message found" in str(self)
        return self.err_code in (_NO_MESSAGE, _NO_SUCH_SEQUENCE)


class Found(NamedTuple):
    """A stream as the server has it."""

    made_at: str
    configuration: _Configuration
    messages: int


class Stored(NamedTuple):
    """A message of a stream."""

    sequence: int
    payload: bytes
    message_id: str | None


async def find_stream(
    client: Client, stream: Stream, *, owned: bool, sized: bool = False, replicas: int = 1
) -> Found:
    """Find, make or bring up to date a stream; return it as it was found or made. Raises StreamUnfit.

    Subjects that are missing are added, and copies until there are `replicas`. One without a bound of its size gets
    that of `stream` if it is to be `sized`; a server that cannot grant it gives none. What else is kept is changed to
    what `stream` says when it is `owned`. Everything else stays as it is found: an operator may have changed it.
    """
    try:
        found = _found(await _api(client, f"STREAM.INFO.{stream.name}"))
    except ApiError as error:
        if error.err_code != _NOT_FOUND:
            raise
        return await _made(client, stream, replicas)
    if _must_be_made_anew(found.configuration, replicas):
        if owned:
            await _api(client, f"STREAM.DELETE.{stream.name}")
            return await _made(client, stream, replicas)
        replicas = 1  # who publishes it makes it anew
    changes = _changes(found.configuration, stream, owned=owned, sized=sized, replicas=replicas)
    if changes:
        await _sized(client, f"STREAM.UPDATE.{stream.name}", found.configuration | changes, stream)
        log.info("bus_stream_updated", stream=stream.name, changed=sorted(changes))
    return found


async def _made(client: Client, stream: Stream, replicas: int) -> Found:
    configuration = _configuration(stream, replicas)
    found = _found(await _sized(client, f"STREAM.CREATE.{stream.name}", configuration, stream))
    log.info("bus_stream_created", stream=stream.name, replicas=replicas)
    return found


def _must_be_made_anew(found: _Configuration, replicas: int) -> bool:
    """Tell whether a stream can have no copies: the server never changes how one is persisted.

    Only what can be published again is persisted so, and it is, as the stream is another one.
    """
    return bool(replicas > 1 and found.get("persist_mode") == "async")


async def _sized(
    client: Client, request: str, configuration: _Configuration, stream: Stream
) -> dict[str, Any]:
    """Make or update a stream, without a bound of its size where the server has no such space to set aside."""
    try:
        return await _api(client, request, configuration)
    except ApiError as error:
        if error.err_code not in _NO_SUCH_SPACE or stream.bytes_max is None:
            raise
    log.warning(
        "bus_stream_unbounded",
        advice="raise max_file_store of nats-server, else this stream may fill the disk",
        stream=stream.name,
        bytes_wanted=stream.bytes_max,
    )
    return await _api(client, request, configuration | {"max_bytes": -1, "discard": "old"})


async def read_from(client: Client, stream: Stream, sequence: int) -> Stored | None:
    """Return the first message whose number in the stream is at least `sequence`; None when there is none."""
    return await _read(client, stream, {"seq": sequence, "next_by_subj": ">"})


async def read(client: Client, stream: Stream, sequence: int) -> Stored | None:
    """Return the message of that number; None when it is not there (any more)."""
    return await _read(client, stream, {"seq": sequence})


async def read_last(client: Client, stream: Stream, subject: str) -> Stored | None:
    """Return the last message on `subject`; None when there is none."""
    return await _read(client, stream, {"last_by_subj": subject})


async def _read(client: Client, stream: Stream, which: dict[str, Any]) -> Stored | None:
    try:
        stored = (await _api(client, f"STREAM.MSG.GET.{stream.name}", which))["message"]
    except ApiError as error:
        if error.err_code == _NO_MESSAGE:
            return None
        raise
    message_id = _MESSAGE_ID.search(base64.b64decode(stored.get("hdrs", "")))
    return Stored(
        stored["seq"],
        base64.b64decode(stored.get("data", "")),
        message_id[1].decode() if message_id else None,
    )


async def delete(client: Client, stream: Stream, sequence: int) -> bool:
    """Delete a message by its number; tell whether it was there."""
    try:
        await _api(client, f"STREAM.MSG.DELETE.{stream.name}", {"seq": sequence})
    except ApiError as error:
        if error.says_that_nothing_is_there:
            return False
        raise
    return True


async def take_last(client: Client, stream: Stream, subject: str) -> bytes | None:
    """Delete the last message on `subject` and return it; None when there is none, or another one took it first."""
    stored = await read_last(client, stream, subject)
    if stored is None or not await delete(client, stream, stored.sequence):
        return None
    return stored.payload


def _found(answer: Mapping[str, Any]) -> Found:
    return Found(answer["created"], answer["config"], answer["state"]["messages"])


def _changes(
    found: _Configuration, stream: Stream, *, owned: bool, sized: bool, replicas: int
) -> _Configuration:
    changes: _Configuration = {}
    if found.get("num_replicas", 1) < replicas:
        changes["num_replicas"] = replicas
    subjects = found.get("subjects") or []
    missing = [subject for subject in stream.subjects if subject not in subjects]
    if missing:
        if not _are_ours(subjects, stream):
            raise StreamUnfit(f"stream {stream.name} exists without the subject {', '.join(missing)}")
        changes["subjects"] = [*subjects, *missing]
    if owned:
        limits = _limits(stream)
        changes |= {name: limit for name, limit in limits.items() if found.get(name) != limit}
    if sized and found.get("max_bytes", -1) <= 0:
        changes |= _size(stream)
    if "max_age" in changes and 0 < changes["max_age"] < found.get("duplicate_window", 0):
        changes["duplicate_window"] = changes["max_age"]
    return changes


def _are_ours(subjects: list[str], stream: Stream) -> bool:
    """Tell whether another version of this project may have made a stream with such subjects."""
    words = {subject.partition(".")[0] for subject in stream.subjects}
    return bool(subjects) and all(subject.partition(".")[0] in words for subject in subjects)


def _configuration(stream: Stream, replicas: int) -> _Configuration:
    return {
        "name": stream.name,
        "subjects": [*stream.subjects],
        "storage": "memory" if stream.in_memory else "file",
        "retention": "limits",
        "discard": "old",
        "num_replicas": replicas,
        "duplicate_window": _nanoseconds(min(DUPLICATE_WINDOW, stream.max_age or DUPLICATE_WINDOW)),
        "allow_direct": True,
        **({"persist_mode": "async"} if stream.recoverable and replicas == 1 else {}),
        **_limits(stream),
        **_size(stream),
    }


def _limits(stream: Stream) -> _Configuration:
    return {
        "max_msgs_per_subject": stream.messages_per_subject or -1,
        "max_msgs": stream.messages_max or -1,
        "max_age": _nanoseconds(stream.max_age) if stream.max_age else 0,
    }


def _size(stream: Stream) -> _Configuration:
    """Let what is full refuse more where the oldest may be a quiet subject's last value."""
    if stream.bytes_max is None:
        return {}
    return {"max_bytes": stream.bytes_max, "discard": "old" if stream.discards_oldest else "new"}


def _nanoseconds(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1) * 1000


async def _api(client: Client, request: str, body: _Configuration | None = None) -> dict[str, Any]:
    payload = b"" if body is None else json.dumps(body).encode()
    answer = await client.request(f"$JS.API.{request}", payload, timeout=API_TIMEOUT_SECONDS)
    said: dict[str, Any] = json.loads(answer.data)
    if "error" in said:
        raise ApiError(said["error"])
    return said
