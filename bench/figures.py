"""A measured figure beside the seed's way and the limit, and its goal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Self


@dataclass(frozen=True)
class Figure:
    """What one thing costs, in `unit`, in up to three ways; less is better in every one.

    The goals, all optional: `at_most`, of ours itself; `times_min`, how many times the seed's way costs as much;
    `share_min`, the limit's cost as a share of ours; `limit_times_max`, how many times the limit ours may cost;
    `below_min`, by which share ours is below the seed's.
    """

    what: str
    unit: str
    ours: float
    seed_like: float | None = None
    limit: float | None = None
    at_most: float | None = None
    times_min: float | None = None
    share_min: float | None = None
    limit_times_max: float | None = None
    below_min: float | None = None

    @property
    def times(self) -> float | None:
        """How many times ours the seed's way costs; None as well when ours was too short for the clock of CPU time."""
        return None if self.seed_like is None or not self.ours else self.seed_like / self.ours

    @property
    def share(self) -> float | None:
        """The limit's cost as a share of ours; None as `times`."""
        return None if self.limit is None or not self.ours else self.limit / self.ours

    @property
    def goal(self) -> str:
        goals = []
        if self.at_most is not None:
            goals.append(f"≤ {_amount(self.at_most)} {self.unit}")
        if self.times_min is not None:
            goals.append(f"≥ {self.times_min:g}x")
        if self.below_min is not None:
            goals.append(f"{self.below_min:.0%} below")
        if self.share_min is not None:
            goals.append(f"≥ {self.share_min:g} of limit")
        if self.limit_times_max is not None:
            goals.append(f"≤ {self.limit_times_max:g}x limit")
        return ", ".join(goals)

    @property
    def reached(self) -> bool | None:
        """Whether every goal is reached; None when there is none."""
        if not self.goal:
            return None
        return (
            (self.at_most is None or self.ours <= self.at_most)
            and (self.times_min is None or (self.times or 0) >= self.times_min)
            and (self.share_min is None or (self.share or 0) >= self.share_min)
            and (self.limit_times_max is None or (self.share or 0) * self.limit_times_max >= 1)
            and (self.below_min is None or 1 - 1 / (self.times or 1) >= self.below_min)
        )

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """Return the figure that `as_json` wrote."""
        own = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in own})

    def as_json(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if value not in (None, "")}
        derived = {"times": self.times, "share": self.share, "goal": self.goal, "reached": self.reached}
        return own | {name: value for name, value in derived.items() if value not in (None, "")}


@dataclass(frozen=True)
class Measured:
    """What a part of the benchmark found: figures for the table, series for the plot."""

    figures: list[Figure]
    series: dict[str, list[tuple[float, float]]]


def middle(values: list[float]) -> float:
    return median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * share) - 1, 0)]


_HEADER = ("what", "unit", "ours", "seed", "x", "limit", "share", "goal", "")
_RIGHT = range(2, 7)


def table(figures: list[Figure]) -> str:
    """Return the figures as text of at most 110 columns."""
    rows = [_HEADER]
    rows += [
        (
            figure.what,
            figure.unit,
            _amount(figure.ours),
            _amount(figure.seed_like),
            "" if figure.times is None else _amount(figure.times),
            _amount(figure.limit),
            "" if figure.share is None else f"{figure.share:.2f}",
            figure.goal,
            {True: "ok", False: "MISSED", None: ""}[figure.reached],
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(figures: list[Figure]) -> str:
    """Return the table for docs/performance.md."""
    lines = [
        "| what | unit | ours | the seed's way | times | the limit | share | goal | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        times = "" if figure.times is None else _amount(figure.times)
        share = "" if figure.share is None else f"{figure.share:.2f}"
        verdict = {True: "reached", False: "**missed**", None: ""}[figure.reached]
        cells = [figure.what, figure.unit, _amount(figure.ours), _amount(figure.seed_like), times]
        cells += [_amount(figure.limit), share, figure.goal, verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _amount(value: float | None) -> str:
    """Write three significant digits, and whole numbers from a hundred on."""
    if value is None:
        return ""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"
