"""docs/runbook.md names what there is (metrics, labels, log events, checks, settings), and leaves out no warning."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.price_feeder.signals import Signals
from shared.health import ADVICE
from tests.unit.test_configuration_files import SERVICES, settings_of

ROOT = Path(__file__).parent.parent.parent
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
EXPRESSIONS = re.findall(r"```promql\n(.*?)```", RUNBOOK, flags=re.DOTALL)
TEXT = re.sub(r"```.*?```", "", RUNBOOK, flags=re.DOTALL)
SOURCES = {
    path.relative_to(ROOT): path.read_text()
    for folder in ("services", "shared", "migrations")
    for path in (ROOT / folder).rglob("*.py")
}
OF_PROMETHEUS = {"up"}
WARNINGS = ("warning", "error", "exception", "critical")
FUNCTIONS = {
    *("sum", "count", "min", "max", "by", "on", "or", "and", "unless", "without", "time", "vector"),
    *("rate", "increase", "changes", "deriv", "min_over_time", "max_over_time", "histogram_quantile"),
}
SIMULATOR = "services/market_simulator"
OF_OTHERS = {"auth failed (", "not supported in non-clustered mode"}
"""What readiness says in the words of Alpaca, of a library or of a server."""


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """Return the names of all samples that the services may have."""
    for service in ("price_feeder", "snapshotter", "api_gateway", "market_simulator"):
        importlib.import_module(f"services.{service}.__main__")
    suffixes = {
        "counter": ("_total",),
        "gauge": ("",),
        "info": ("_info",),
        "histogram": ("_bucket", "_count", "_sum"),
        "summary": ("_count", "_sum"),
    }
    return {f"{family.name}{suffix}" for family in REGISTRY.collect() for suffix in suffixes[family.type]}


def test_every_metric_of_the_runbook_exists(metrics: set[str]) -> None:
    assert len(EXPRESSIONS) > 15
    for expression in EXPRESSIONS:
        without_texts = re.sub(r'\{[^}]*\}|\[[^\]]*\]|"[^"]*"|\b(by|on|without) \([^)]*\)', "", expression)
        named = set(re.findall(r"\b[a-z][a-z_]*\b", without_texts)) - FUNCTIONS - OF_PROMETHEUS
        assert named <= metrics, expression
    ours = "foliotick|price_feeder|gateway|bus|database|snapshot|history"
    in_words = set(re.findall(rf"`((?:{ours})_[a-z_]+)\b", TEXT))
    assert len(in_words) > 30
    logged = log_events("", level=r"\w+")
    assert in_words - metrics <= logged, in_words - metrics - logged


def test_labels_of_the_runbook_are_those_of_the_code() -> None:
    everything = "".join(SOURCES.values())
    pairs = [
        pair for expression in EXPRESSIONS for pair in re.findall(r'(\w+)[!=]?[=~]"([^"]*)"', expression)
    ]
    assert pairs
    for label, values in pairs:
        assert f'"{label}"' in everything, label
        for value in values.split("|"):
            assert f'"{value}"' in everything or (label == "status" and value.isdecimal()), value


def log_events(*parts: str, level: str = "warning|error|exception") -> set[str]:
    """Return what sources under these paths log; unless told otherwise, what they warn of."""
    said = rf"(?:log\.(?:{level})|self\._say|Episode)\(\s*\"([a-z_]+)\""
    return {
        event
        for path, source in SOURCES.items()
        for part in parts
        if str(path).startswith(part)
        for event in re.findall(said, source)
    }


def test_every_log_event_of_the_runbook_is_logged() -> None:
    services = (source for path, source in SOURCES.items() if not str(path).startswith(SIMULATOR))
    everything = "".join(services)
    sections = re.findall(r"Log: (.*?)(?:\*\*|\n\n|\n\||$)", TEXT, flags=re.DOTALL)
    events = {event for section in sections for event in re.findall(r"`([a-z]+_[a-z_]+)`", section)}
    events |= set(re.findall(r"\*\*Over\.\*\* `([a-z_]+)`", TEXT))
    assert len(events) > 20
    for event in events:
        assert f'"{event}"' in everything, event


def test_every_warning_is_in_the_runbook() -> None:
    product = (
        "services/price_feeder",
        "services/snapshotter",
        "services/api_gateway",
        "shared",
        "migrations",
    )
    events = log_events(*product)
    assert len(events) > 50
    assert {event for event in events if f"`{event}`" not in RUNBOOK} == set()


def test_every_check_is_in_the_runbook() -> None:
    for check in ADVICE:
        assert f"| `{check}` |" in RUNBOOK
    named = r"\"([a-z_]+)\"\]?(?::| =) (?:lambda: )?[A-Za-z_.]*[cC]heck"
    checks = {check for source in SOURCES.values() for check in re.findall(named, source)}
    assert len(checks) > 10
    for check in (*Signals().checks, *checks, "lease", "draining"):
        assert f'"{check}": "' in RUNBOOK or f"| `{check}` |" in RUNBOOK, check


def test_what_readiness_says_in_the_runbook_is_said_by_the_code() -> None:
    """All of it that stands in the code as it is; numbers, names and words of others do not."""
    everything = "".join(SOURCES.values())
    answers = re.findall(r'`"[a-z_]+": "([^"`]+)"`', TEXT)
    assert len(answers) > 25
    unknown = []
    for answer in answers:
        words = re.split(r"[:;,…] ?|[\w-]*\d\S*|\b(?:since|snapshotter|TIMER)\b", answer)
        unknown += [each.strip() for each in words if each.count(" ") > 1 and each.strip() not in everything]
    assert set(unknown) <= OF_OTHERS


def test_settings_and_sections_that_the_runbook_names_exist() -> None:
    known = {name for service in SERVICES for name in settings_of(service)} | {"HTTPS_PROXY"}
    named = set(re.findall(r"`([A-Z][A-Z_]+)(?:=\w+)?`", TEXT))
    assert named
    assert named <= known
    headings = re.findall(r"^#+ (.*)$", RUNBOOK, flags=re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings)
    links = set(re.findall(r"\]\(#([a-z-]+)\)", RUNBOOK))
    assert links <= anchors
    for file, anchor in re.findall(r"\]\(([a-z]+\.md)(?:#([a-z-]+))?\)", RUNBOOK):
        text = (ROOT / "docs" / file).read_text()
        assert not anchor or f"\n## {anchor.replace('-', ' ')}\n" in text.lower(), file


def test_every_section_says_what_is_seen_what_it_means_what_to_do_and_when_it_is_over() -> None:
    sections = re.split(r"^### ", RUNBOOK, flags=re.MULTILINE)[1:]
    assert len(sections) > 15
    for section in sections:
        body = section.split("\n## ")[0]
        for word in ("**Seen.**", "**Over.**"):
            assert word in body, section
        assert "**Means" in body, section
        assert re.search(r"\*\*Do\.|and do\*\*|and do\.\*\*", body), section


def test_every_warning_says_what_to_do() -> None:
    calls = [
        (path, node)
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) in {("log", level) for level in WARNINGS}
    ]
    assert len(calls) > 30
    mute = [
        f"{path}:{node.lineno}"
        for path, node in calls
        if not {None, "advice"} & {keyword.arg for keyword in node.keywords}
    ]
    assert not mute
