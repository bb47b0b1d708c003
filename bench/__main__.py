"""`python -m bench`: measure, print one table, save it as JSON and as a plot."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench import charts, gateway, overload, rollups, snapshots, storage, streams, ticks
from bench.figures import Figure, Measured, markdown, table
from bench.plot import drawn
from bench.progress import say
from bench.server import Databases
from bench.sizes import SIZES, Size
from local.servers import ServerFailed, nats_server, postgres
from local.settings import ROOT
from shared import logs
from shared.clock import utc_now

PARTS: dict[str, Callable[[Databases, Size, str], Awaitable[Measured]]] = {
    "snapshots": lambda server, size, _: snapshots.measure(server, size),
    "storage": lambda server, size, _: storage.measure(server, size),
    "charts": lambda server, size, _: charts.measure(server, size),
    "rollups": lambda server, size, _: rollups.measure(server, size),
    "gateway": gateway.measure,
    "overload": overload.measure,
    "ticks": ticks.measure,
    "streams": streams.measure,
}
_SHARE_SECONDS = 0.5
_QUIET_SHARE = 0.9


async def measure(server: Databases, size: Size, nats_url: str, parts: list[str]) -> dict[str, Measured]:
    """Measure the parts one after the other."""
    found = {}
    for part in parts:
        share = core_share()
        busy = f" (the machine is busy: a process gets {share:.0%} of a core)" if share < _QUIET_SHARE else ""
        say(f"{part} …{busy}")
        began = time.monotonic()
        found[part] = await PARTS[part](server, size, nats_url)
        say(table(found[part].figures))
        say(f"{part}: {time.monotonic() - began:.0f} s\n")
    return found


def core_share() -> float:
    """Return how much of a core a process gets now: with less, milliseconds are longer, CPU time and ratios are not."""
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < _SHARE_SECONDS:
        pass
    return (time.process_time() - used) / (time.perf_counter() - began)


def main() -> int:
    arguments = _arguments()
    try:
        return run(arguments)
    except ServerFailed as error:  # another run has the data, or there is no room
        sys.stderr.write(f"bench: {error}\n")
        return 2


def run(arguments: argparse.Namespace) -> int:
    size = SIZES[arguments.size]
    parts = arguments.only or list(PARTS)
    logs.configure("bench", "ERROR")
    folder = arguments.folder / size.name
    began = time.monotonic()
    with (
        postgres(folder / "postgres", settings=size.server_settings) as database,
        nats_server(folder / "nats") as nats,
    ):
        server = Databases(database.url)
        found = asyncio.run(measure(server, size, nats.url, parts))
        stored_gb = asyncio.run(server.size_bytes()) / 1e9
    figures = [figure for part in found.values() for figure in part.figures]
    say(table(figures))
    say(
        f"\nsize {size.name}, {time.monotonic() - began:.0f} s, {stored_gb:.1f} GB kept in {arguments.folder}"
    )
    saved = _saved(arguments.results, size, found)
    if arguments.publish:
        _publish(saved, arguments.results)
    missed = [figure.what.strip() for figure in figures if figure.reached is False]
    if missed and size.judged:
        say("missed: " + "; ".join(missed))
        return 1
    return 0


def _saved(folder: Path, size: Size, found: dict[str, Measured]) -> dict[str, Measured]:
    """Write `latest.json` and `latest.png`; return what is in them: parts that were not measured stay as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "latest.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    parts = before["parts"] if before.get("size") == size.name else {}
    for name, part in found.items():
        parts[name] = {
            "measured_at": utc_now().isoformat(timespec="seconds"),
            "figures": [figure.as_json() for figure in part.figures],
            "series": part.series,
        }
    parts = {name: parts[name] for name in PARTS if name in parts}
    file.write_text(json.dumps({"size": size.name, "parts": parts}, indent=1, ensure_ascii=False) + "\n")
    measured = {
        name: Measured([Figure.from_json(figure) for figure in part["figures"]], part["series"])
        for name, part in parts.items()
    }
    is_drawn = drawn({name: part.series for name, part in measured.items()}, size, folder / "latest.png")
    say(f"saved {file}{' and latest.png' if is_drawn else ''}")
    return measured


def _publish(saved: dict[str, Measured], results: Path) -> None:
    """Put the table and the plot into docs."""
    figures = [figure for part in saved.values() for figure in part.figures]
    page = ROOT / "docs" / "performance.md"
    before, _, rest = page.read_text().partition("<!-- figures -->\n")
    _, _, after = rest.partition("<!-- end of figures -->")
    page.write_text(f"{before}<!-- figures -->\n{markdown(figures)}\n<!-- end of figures -->{after}")
    (ROOT / "docs" / "performance.png").write_bytes((results / "latest.png").read_bytes())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; may be repeated")
    parser.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="a smaller size, goals not judged"
    )
    parser.add_argument("--size", choices=SIZES, help="how much data; full judges the goals")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".foliotick" / "bench", help="where the data is kept"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="where figures and plot are saved"
    )
    parser.add_argument("--publish", action="store_true", help="put table and plot into docs/")
    parser.set_defaults(size="full")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
