"""docs/faults.md lists every row, as it is, and how it is seen."""

from pathlib import Path

from tests.faults.rows.table import ROWS

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"


def test_every_row_is_in_the_document_with_what_must_be_seen() -> None:
    table = DOCUMENT.read_text().partition("| # | fault | injected | must be seen | by an operator |\n")[2]
    lines = table.partition("\n\n")[0].splitlines()[1:]
    told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert [cells[:3] for cells in told] == [(str(row.number), row.name, row.injected) for row in ROWS]
    assert all(cells[3] for cells in told), "a row that shows nothing"
    assert [cells[4] for cells in told] == [
        "; ".join(map(str, row.signs)) or "nothing: it is no fault" for row in ROWS
    ]


def test_faults_of_the_design_are_all_played() -> None:
    assert {row.number for row in ROWS} == set(range(1, 25))
