"""`make bench` keeps working: every figure is measured and saved; a mini size is not asked to reach the goals."""

import json
import subprocess
import sys
from pathlib import Path

from local.settings import ROOT

RUN_SECONDS_MAX = 300  # about 100 on a machine that does nothing else
# Of each part: how many figures there are, how many beside the seed's way, how many beside a limit.
FIGURES = {
    "snapshots": (3, 2, 3),
    "storage": (5, 5, 0),
    "charts": (15, 14, 13),
    "rollups": (3, 0, 2),
    "gateway": (6, 6, 3),
    "overload": (8, 0, 5),
    "ticks": (7, 0, 5),
    "streams": (9, 0, 8),
}
SERIES = {"snapshots": {"ours", "limit", "seed"}, "storage": {"ours", "seed"}, "charts": {"ours", "seed"}}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "--size", "mini"]
    command += ["--folder", str(folder / "data"), "--results", str(folder / "results"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False
    )


def test_every_figure_is_measured_and_the_data_is_kept_for_the_next_run(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    saved = json.loads((tmp_path / "results" / "latest.json").read_text())
    assert saved["size"] == "mini"
    for part, expected in FIGURES.items():
        figures = saved["parts"][part]["figures"]
        assert all(figure["ours"] > 0 or figure.get("at_most") == 0 for figure in figures), part
        beside = [sum(way in figure for figure in figures) for way in ("seed_like", "limit")]
        assert (len(figures), *beside) == expected, part
        for figure in figures:
            assert figure["what"] in first.stdout
    for figure in saved["parts"]["ticks"]["figures"]:  # no machine is too slow for prices that are right
        assert figure["ours"] == 0 or figure.get("at_most") != 0, figure
    for part, names in SERIES.items():
        series = saved["parts"][part]["series"]
        assert set(series) == names
        assert all(len(points) >= 2 for points in series.values())
    assert (tmp_path / "results" / "latest.png").read_bytes().startswith(b"\x89PNG")
    assert "building the database" in first.stdout

    second = run(tmp_path, "--only", "snapshots")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "building the database" not in second.stdout
