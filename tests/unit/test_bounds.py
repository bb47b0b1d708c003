"""docs/bounds.md says what the code says, and waits fit into those of their callers."""

import ast
import importlib
import re
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from annotated_types import Le

from services.api_gateway import app, connections, keys, refusals
from services.api_gateway import refreshes as gateway_refreshes
from services.api_gateway.settings import Settings as GatewaySettings
from services.price_feeder import calendar, feed, lease, market_data, outbox, refreshes, streams, transport
from services.price_feeder.__main__ import DATABASE_CONNECTIONS, LEASE_CONNECTIONS
from services.price_feeder.settings import Settings as FeederSettings
from services.snapshotter import requested, snapshots, upkeep
from shared import bus, database, health, lifecycle, requests
from tests.unit.test_configuration_files import COMPOSE, SERVICES, settings_of

ROOT = Path(__file__).parent.parent.parent
GATEWAY = GatewaySettings.model_fields
DOCUMENT = (ROOT / "docs" / "bounds.md").read_text()


class Row(NamedTuple):
    what: str
    bound: str
    set_in: str
    then: str


def rows() -> list[Row]:
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT.splitlines()
        if line.startswith("| ") and not line.startswith("| what |")
    ]
    assert all(len(row) == 4 for row in cells), cells
    return [Row(*row) for row in cells]


ROWS = rows()
CONSTANTS = [row for row in ROWS if ":" in row.set_in]
SETTINGS = [row for row in ROWS if re.fullmatch(r"`[A-Z_]+`", row.set_in)]


def number(bound: str) -> float:
    """Return the number that a bound is."""
    found = re.search(r"\d[\d,]*(\.\d+)?", bound.removeprefix("one "))
    assert found, f"no number in {bound!r}"
    return float(found[0].replace(",", ""))


def in_numbers(value: Any) -> set[float]:
    """Return a constant as numbers that a reader may be told, a width of time in hours and days as well."""
    if isinstance(value, timedelta):
        return {value / unit for unit in (timedelta(seconds=1), timedelta(hours=1), timedelta(days=1))}
    if isinstance(value, str):  # as PostgreSQL takes it
        return {float(value.removesuffix("ms"))}
    return {float(value)}


def value_of(where: str, name: str, part: str | None) -> Any:
    """Return a constant of a module, or of a file that is no module; or a part of it."""
    if where.endswith(".py"):
        return literals(where)[name]
    value = getattr(importlib.import_module(where), name)
    if part is None:
        return value
    return value[part] if isinstance(value, dict) else getattr(value, part)


def literals(file: str) -> dict[str, Any]:
    """Return the constants of a file by their names, without running it."""
    found: dict[str, Any] = {}
    for statement in ast.parse((ROOT / file).read_text()).body:
        if isinstance(statement, ast.Assign):
            target, value = statement.targets[0], statement.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, each in pairs:
                if isinstance(name, ast.Name) and isinstance(each, ast.Constant):
                    found[name.id] = each.value
    return found


def test_document_is_read() -> None:
    assert len(CONSTANTS) > 200
    assert len(SETTINGS) > 15
    for row in ROWS:
        assert all(row), row
        if row not in CONSTANTS and row not in SETTINGS:
            assert (ROOT / row.set_in.strip("`")).exists(), row


@pytest.mark.parametrize("row", CONSTANTS, ids=lambda row: row.set_in)
def test_constant_of_the_document_is_that_of_the_code(row: Row) -> None:
    found = re.fullmatch(r"`([a-z_./]+):([A-Za-z_]+)(?:\.([a-z_]+))?`", row.set_in)
    assert found, row
    assert number(row.bound) in in_numbers(value_of(*found.groups())), row


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.set_in)
def test_setting_of_the_document_has_that_default(row: Row) -> None:
    name = row.set_in.strip("`")
    defaults = {fields[name].default for service in SERVICES if name in (fields := settings_of(service))}
    assert defaults == {None if row.bound.startswith("unset: ") else number(row.bound)}


def test_no_bound_is_named_twice() -> None:
    named = [row.set_in for row in (*CONSTANTS, *SETTINGS)]
    assert sorted(set(named)) == sorted(named)


RANGES = {
    *(
        "services.admin.amounts:_SHOWN_LENGTH_MAX",
        "services.price_feeder.transport:_PROBLEM_LENGTH_MAX",
    ),  # of texts
    *("services.admin.arguments:LIMIT_MAX", "services.admin.arguments:NUMBER_MAX"),  # of what may be given
    *("services.admin.arguments:SUBJECT_LENGTH_MAX", "services.api_gateway.auth:SUBJECT_LENGTH_MAX"),
    *("services.snapshotter.settings:MINUTES_MAX", "services.snapshotter.settings:SNAPSHOT_DAYS_MAX"),
    *("services.snapshotter.settings:POSITION_DAYS_MAX", "services.snapshotter.settings:ROLLUP_DAYS_MAX"),
    *("shared.messages:INTEGER_MAX", "shared.messages:BIGINT_MAX"),
    "services.price_feeder.trades:_INSTANT_LENGTH_MAX",
    "shared.market_hours:_CLOSED_DAYS_MAX",
    "shared.messages:PRICES_BYTES_MAX",  # of the stream, which has a row
}
"""Constants that bound what a value may be; those of queues, waits and the like are in the document."""


def test_every_constant_that_is_named_as_a_bound_is_in_the_document() -> None:
    named = {row.set_in.strip("`") for row in CONSTANTS}
    bounds = {
        f"{module.__name__}:{name}"
        for module in modules()
        for name, value in vars(module).items()
        if name.endswith("_MAX") and isinstance(value, int | float | timedelta) and is_made_in(module, name)
    }
    assert len(bounds) > 100
    assert bounds - named == RANGES


def modules() -> list[ModuleType]:
    """Return all modules of the services and of what they share."""
    files = [path for folder in ("services", "shared") for path in (ROOT / folder).rglob("*.py")]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    return [
        importlib.import_module(name.removesuffix(".__init__"))
        for name in names
        if not name.startswith("services.market_simulator")  # which is no part of the product
    ]


def is_made_in(module: ModuleType, name: str) -> bool:
    """Tell whether the module makes the constant, and does not import it."""
    assert module.__file__
    return re.search(rf"^(\w+, )*{name}\b.* = ", Path(module.__file__).read_text(), re.MULTILINE) is not None


# ---- waits inside waits --------------------------------------------------------------------------


def test_what_a_feeder_does_after_a_signal_fits_into_the_grace() -> None:
    """Also when everything stands still, and each step takes all that it may."""
    answers = requests.DRAIN_SECONDS_MAX + requests.STOP_SECONDS_MAX
    term = max(feed.STOP_SECONDS_MAX + outbox.LAST_STATUS_SECONDS_MAX, answers) + lease.RELEASE_SECONDS_MAX
    closing = health.STOP_SECONDS_MAX + bus.CLOSE_SECONDS_MAX + 2 * database.CLOSE_SECONDS_MAX
    assert term + closing < lifecycle.STOP_GRACE_SECONDS


def test_what_a_snapshotter_does_after_a_signal_fits_into_the_grace() -> None:
    answers = requests.DRAIN_SECONDS_MAX + requests.STOP_SECONDS_MAX
    work = max(bus.FETCH_WAIT_SECONDS + snapshots.STOP_SECONDS_MAX, upkeep.STOP_SECONDS_MAX, answers)
    closing = health.STOP_SECONDS_MAX + bus.CLOSE_SECONDS_MAX + database.CLOSE_SECONDS_MAX
    assert work + closing < lifecycle.STOP_GRACE_SECONDS


def test_what_a_gateway_does_after_a_signal_fits_into_the_grace() -> None:
    """However long it drains, requests under way have a second, and all that it stands on is closed."""
    assert connections.LAST_ANSWER_SECONDS <= 1 / 2
    drain = next(each.le for each in GATEWAY["gateway_drain_seconds"].metadata if isinstance(each, Le))
    assert float(str(drain)) + 1 + app.CLOSE_SECONDS <= lifecycle.STOP_GRACE_SECONDS
    closing = health.STOP_SECONDS_MAX + bus.CLOSE_SECONDS_MAX + 2 * database.CLOSE_SECONDS_MAX
    assert closing <= app.CLOSE_SECONDS


def test_a_statement_fits_into_a_request_of_the_gateway() -> None:
    """With its wait for a connection, and its second try."""
    request = GATEWAY["request_timeout_seconds"].default
    assert request > database.CONNECT_TIMEOUT_SECONDS + database.STATEMENT_TIMEOUT_SECONDS
    assert request > keys.FETCH_TIMEOUT_SECONDS
    assert request > refusals.HOLD_SECONDS_MAX


def test_grace_of_a_service_fits_into_that_of_its_container() -> None:
    for service in ("price_feeder", "snapshotter", "api_gateway", "market_simulator"):
        seconds = int(COMPOSE["services"][service]["stop_grace_period"].removesuffix("s"))
        assert lifecycle.STOP_GRACE_SECONDS < lifecycle.END_SECONDS_MAX < seconds


def test_a_request_to_alpaca_fits_into_a_round_and_a_round_into_the_interval() -> None:
    assert transport.CONNECT_SECONDS_MAX < market_data.REQUEST_SECONDS_MAX < feed.ANSWERS_SECONDS_MAX
    assert FeederSettings.model_fields["price_update_interval_seconds"].default > feed.ANSWERS_SECONDS_MAX
    assert calendar.REQUEST_SECONDS_MAX < calendar.ANSWER_SECONDS_MAX < calendar.RETRY_SECONDS


def test_who_answers_a_gateway_does_not_outlast_it() -> None:
    waits = GATEWAY["request_timeout_seconds"].default * gateway_refreshes.BUS_SHARE
    assert waits > refreshes.ANSWER_SECONDS_MAX
    first = waits * gateway_refreshes.FIRST_SHARE
    assert first > requested.TURN_SECONDS_MAX
    assert waits - first > requested.ANSWER_SECONDS_MAX


def test_a_refresh_fits_into_its_answer() -> None:
    """Its turn and the market, and milliseconds for what is read and stored."""
    assert refreshes.PAUSE_SECONDS_MAX + refreshes.MARKET_SECONDS_MAX < refreshes.ANSWER_SECONDS_MAX


def test_holder_of_the_lease_has_ended_before_another_begins() -> None:
    assert lease.LASTS.total_seconds() > lease.HELD_SECONDS_MAX + lease.NOBODY_SECONDS
    assert 2 * lease.RENEW_EVERY_SECONDS + database.STATEMENT_TIMEOUT_SECONDS < lease.HELD_SECONDS_MAX


def test_a_check_fits_into_the_health_check_of_the_container() -> None:
    assert database.CHECK_TIMEOUT_SECONDS < health.CHECK_TIMEOUT_SECONDS
    for service in ("price_feeder", "snapshotter", "api_gateway"):
        seconds = int(COMPOSE["services"][service]["healthcheck"]["timeout"].removesuffix("s"))
        assert seconds > health.CHECK_TIMEOUT_SECONDS


def test_a_stream_that_stands_still_is_given_up_before_its_handshake_is() -> None:
    silence = streams.WEBSOCKET["ping_interval"], streams.WEBSOCKET["ping_timeout"]
    assert sum(float(seconds or 0) for seconds in silence) <= streams.HANDSHAKE_SECONDS_MAX


def test_connections_of_two_of_each_service_fit_into_a_server_of_the_usual_size() -> None:
    feeder = DATABASE_CONNECTIONS + LEASE_CONNECTIONS
    snapshotter = snapshots.AT_ONCE_MAX + requested.AT_ONCE_MAX + 2
    gateway = settings_of("api_gateway")["GATEWAY_DATABASE_CONNECTIONS"].default + 1  # and one that listens
    assert 2 * (feeder + snapshotter + gateway) < 100 - 3  # those that PostgreSQL keeps for its owner
