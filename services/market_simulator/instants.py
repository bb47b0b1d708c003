"""Instants as nanoseconds since the Unix epoch, from and to RFC 3339 as Alpaca writes it."""

import re
from datetime import UTC, date, datetime, timedelta, tzinfo

SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS
DAY_NS = 24 * 60 * MINUTE_NS

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?([Zz]|[+-]\d\d:\d\d)")


def ns_of(at: datetime) -> int:
    """Return an aware instant as nanoseconds; raises TypeError for a naive one."""
    since = at - _EPOCH
    return (since.days * 86_400 + since.seconds) * SECOND_NS + since.microseconds * 1000


def datetime_of(at_ns: int) -> datetime:
    """Return the instant in UTC, cut to microseconds."""
    return _EPOCH + _MICROSECOND * (at_ns // 1000)


def local_midnight_ns(day: date, zone: tzinfo) -> int:
    """Return the instant at which a day begins in a zone."""
    return ns_of(datetime(day.year, day.month, day.day, tzinfo=zone))


def rfc3339(at_ns: int) -> str:
    """Write an instant in UTC, without the zeros at the end of its fraction, as Alpaca does."""
    return _with_fraction(at_ns, _EPOCH + timedelta(seconds=at_ns // SECOND_NS)) + "Z"


def rfc3339_in(at_ns: int, zone: tzinfo) -> str:
    """Write an instant in a zone, with its offset: `2025-06-24T14:15:22-04:00`."""
    local = (_EPOCH + timedelta(seconds=at_ns // SECOND_NS)).astimezone(zone)
    offset = local.strftime("%z")
    return f"{_with_fraction(at_ns, local)}{offset[:3]}:{offset[3:]}"


def _with_fraction(at_ns: int, whole_second: datetime) -> str:
    fraction = at_ns % SECOND_NS
    text = whole_second.replace(tzinfo=None).isoformat()
    return f"{text}.{fraction:09d}".rstrip("0") if fraction else text


def ns_of_text(text: str) -> int:
    """Read an RFC 3339 instant to the nanosecond; raises ValueError for anything else."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an RFC 3339 instant")
    whole, fraction, offset = match.groups()
    at = datetime.fromisoformat(whole.upper() + offset.upper())
    return ns_of(at) + int((fraction or "0").ljust(9, "0"))
