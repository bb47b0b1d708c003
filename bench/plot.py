"""How snapshot time, chart time and storage grow with users and years, the seed's way beside ours."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.sizes import Size

Series = list[tuple[float, float]]

_OURS, _SEED, _LIMIT = "#0b6e4f", "#c0392b", "#7f8c8d"
_PARTS = ("snapshots", "charts", "storage")
_STORAGE_USERS = (1_000, 100_000)
_GB = 1e9
_SLOT_SECONDS = 300


def drawn(parts: Mapping[str, Mapping[str, Series]], size: Size, file: Path) -> bool:
    """Draw the plot of the parts that were measured into a PNG file; tell whether there was one to draw."""
    panels = [part for part in _PARTS if parts.get(part)]
    if not panels:
        return False
    mpl.use("Agg")
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5 * len(panels), 4.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for part, panel in zip(panels, axes, strict=True):
            {"snapshots": _snapshots, "charts": _charts, "storage": _storage}[part](panel, parts[part], size)
            panel.grid(visible=True, which="major", color="#e3e3e3", linewidth=0.8)
            panel.set_axisbelow(True)
        figure.savefig(file, dpi=130)
    return True


def _snapshots(panel: Axes, series: Mapping[str, Series], size: Size) -> None:
    panel.set_title("One slot of all users", loc="left", fontweight="bold")
    _line(panel, series["seed"], _SEED, "the seed's way", dashed_from=size.looped_users, below=True)
    _line(panel, series["limit"], _LIMIT, "limit: ready rows", below=True)
    _line(panel, series["ours"], _OURS, "ours")
    panel.axhline(_SLOT_SECONDS, color="#b0b0b0", linewidth=1, linestyle=":")
    panel.text(
        0.02,
        _SLOT_SECONDS * 1.15,
        "the next slot is due",
        transform=panel.get_yaxis_transform(),
        color="#707070",
        fontsize=8.5,
    )
    _log(panel, "users, 10 positions each", _seconds)


def _charts(panel: Axes, series: Mapping[str, Series], _: Size) -> None:
    panel.set_title("The chart ALL, from the database", loc="left", fontweight="bold")
    milliseconds = {name: [(years, ms / 1000) for years, ms in points] for name, points in series.items()}
    _line(panel, milliseconds["seed"], _SEED, "the seed's way")
    _line(panel, milliseconds["ours"], _OURS, "ours")
    _log(panel, "years of five-minute history", _seconds)


def _storage(panel: Axes, series: Mapping[str, Series], _: Size) -> None:
    panel.set_title("Storage, 10 positions each", loc="left", fontweight="bold")
    for users in _STORAGE_USERS:
        for name, colour, label in (("seed", _SEED, "the seed's schema"), ("ours", _OURS, "ours")):
            points = [(years, users * size / _GB) for years, size in series[name]]
            _line(panel, points, colour, f"{label}, {users:,} users", marks=False, below=name == "ours")
    _log(panel, "years", _gigabytes)


def _line(
    panel: Axes,
    points: Series,
    colour: str,
    label: str,
    *,
    dashed_from: float | None = None,
    marks: bool = True,
    below: bool = False,
) -> None:
    """Draw a line with its name at its end; beyond `dashed_from` it is drawn as an estimate."""
    xs, ys = zip(*points, strict=True)
    estimated = dashed_from is not None
    panel.plot(
        xs,
        ys,
        color=colour,
        linewidth=2,
        linestyle="--" if estimated else "-",
        marker="o" if marks else "",
        markersize=4.5,
    )
    # Left above a point of a rising line, or right below it; a line that becomes flat has room where it does.
    named = len(points) // 3 if below and not marks else len(points) // 2
    panel.annotate(
        label + (" (scaled)" if estimated else ""),
        points[named],
        (7, -13) if below else (-7, 6),
        textcoords="offset points",
        ha="left" if below else "right",
        color=colour,
        fontsize=9,
    )


def _log(panel: Axes, what: str, value: FuncFormatter) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel(what)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    panel.yaxis.set_major_formatter(value)
    panel.minorticks_off()
    panel.margins(x=0.06, y=0.12)


_seconds = FuncFormatter(
    lambda s, _: f"{s * 1000:g} ms" if s < 1 else f"{s:g} s" if s < 100 else f"{s:,.0f} s"
)
_gigabytes = FuncFormatter(
    lambda gb, _: f"{gb * 1000:g} MB" if gb < 1 else f"{gb:g} GB" if gb < 1000 else f"{gb / 1000:g} TB"
)
