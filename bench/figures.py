"""A measured figure beside its goal."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    what: str
    measured: str
    goal: str
    reached: bool


def table(figures: list[Figure]) -> str:
    rows = [("what", "measured", "goal", "")]
    rows += [(f.what, f.measured, f.goal, "reached" if f.reached else "MISSED") for f in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n" + "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
