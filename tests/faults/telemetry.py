"""What a process tells those who look: the samples of its `/metrics`, and the lines of its log."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

COUNTER = "counter"


@dataclass(frozen=True)
class Selector:
    """Which samples are meant: those of a name, with these labels if any are named."""

    name: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    labels: tuple[tuple[str, str], ...]
    kind: str
    """Of the metric: `counter`, `gauge`."""
    value: float


@lru_cache(maxsize=256)
def selector(metric: str) -> Selector:
    """Return what is meant by a name and labels as Prometheus writes them: `requests_total{outcome="failed"}`."""
    (family,) = text_string_to_metric_families(f"{metric} 0")
    (sample,) = family.samples
    return Selector(sample.name, sample.labels)


def samples(text: str, metric: str) -> list[Sample]:
    """Return the samples of a metric in the text of `/metrics`, those with its labels if it names some."""
    wanted = selector(metric)
    stem = wanted.name.removesuffix("_total")
    found = []
    lines = (line for line in text.splitlines() if stem in line)  # to parse all takes ten times as long
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name == wanted.name and wanted.labels.items() <= sample.labels.items():
                labels = tuple(sorted(sample.labels.items()))
                found.append(Sample(labels, family.type, sample.value))
    return found


def log_size(log: Path) -> int:
    """Return how long a log is; 0 before there is one."""
    return log.stat().st_size if log.exists() else 0


def log_lines(log: Path, since: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log, whole ones, that were written after it was so long."""
    for line in _raw_lines(log, since):
        if line.startswith(b"{") and line.endswith(b"}\n"):
            yield json.loads(line)


def said(log: Path, event: str, since: int = 0) -> int:
    """Return how many lines of a log are about an event."""
    return sum(line["event"] == event for line in log_lines(log, since))


def traces(log: Path, since: int = 0) -> list[str]:
    """Return what a log tells of exceptions: as part of a line of ours, or as Python prints them by itself."""
    found = []
    for line in _raw_lines(log, since):
        is_ours = line.startswith(b"{") and line.endswith(b"}\n")
        if "exception" in json.loads(line) if is_ours else b"Traceback" in line:
            found.append(line.decode(errors="replace").strip())
    return found


def _raw_lines(log: Path, since: int) -> Iterator[bytes]:
    if not log.exists():
        return
    with log.open("rb") as file:
        file.seek(since)
        yield from file
