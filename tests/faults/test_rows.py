"""A row that fails is told, and spoils no other; one that this machine cannot play is not counted as passed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults.__main__ import play_rows
from tests.faults.mix import Life
from tests.faults.parts import frozen
from tests.faults.population import Population
from tests.faults.rows.row import Row, next_slots
from tests.faults.signs import POSTGRES_AWAY
from tests.faults.system import Options, System

SEED = 5


async def _breaks(system: System, _: Life) -> str:
    system.services["snapshotter"][0].freeze()
    raise LookupError("nobody expected this")


async def _goes_on(system: System, _: Life) -> str:
    assert not any(part.spell for part in system.parts), "something is left of the row before"
    return "all is well"


async def _postgres_away(system: System, _: Life) -> str:
    async with frozen(system.postgres):
        await next_slots(4)
    return "it was away"


@asynccontextmanager
async def _does_not_start(_: Path, __: Population, ___: Options) -> AsyncIterator[System]:
    raise OSError("no room")
    yield


async def test_rows_after_one_that_breaks_are_played_in_a_system_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Row(1, "breaks", "a bug", _breaks),
        Row(2, "goes on", "nothing", _goes_on),
        Row(3, "cannot be played", "nothing", _goes_on, needs=lambda: "it needs the moon"),
        Row(4, "does not start", "nothing", _goes_on, start=_does_not_start),
        Row(5, "is seen", "SIGSTOP", _postgres_away, signs=(POSTGRES_AWAY,)),
        Row(6, "is not seen", "nothing", _goes_on, signs=(POSTGRES_AWAY,)),
    ]
    outcomes = await play_rows(rows, tmp_path, SEED)
    said = capsys.readouterr().out
    assert outcomes == {"passed": 2, "failed": 3, "not run": 1}, said
    for each in (
        "LookupError: nobody expected this",
        "it needs the moon",
        "OSError: no room",
        "/readyz does not show postgres",
        "database_unavailable_total has not moved",
        "the log has no check_failed with an advice",
    ):
        assert each in said
