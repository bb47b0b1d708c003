"""Inject faults into a system of its own: `python -m tests.faults`, or `make faults` and `make soak`."""

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from tests.faults import mix, population, signs
from tests.faults.rows.row import Row
from tests.faults.rows.table import ROWS
from tests.faults.system import Options, System, running

USERS = 60
MIX_USERS = 200
ACTS_PER_MINUTE = 26
STRUCK_PER_MINUTE_MIN = 20
"""Kills and freezes; the other acts are stops."""
OUTCOMES = PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def play_rows(rows: Sequence[Row], folder: Path, seed: int) -> Counter[str]:
    """Play the rows; those with the usual system share one, up to a failure. Return how many had each OUTCOME."""
    outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
    async with AsyncExitStack() as stack:
        usual: System | None = None
        for number, row in enumerate(rows):
            lack = row.needs()
            if lack:
                say(f"{row.number:>3}  {row.name}\n       not run: {lack}")
                outcomes[NOT_RUN] += 1
                continue
            place = folder / f"row{row.number}-{number}"
            place.mkdir()
            people = population.drawn(USERS, seed)
            options = row.options(place)
            has_own = options != Options() or row.start is not running
            try:
                if has_own:
                    async with row.start(place, people, options) as system:
                        is_good = await _play(row, system, seed)
                else:
                    if usual is None:
                        usual = await stack.enter_async_context(running(place, people))
                    is_good = await _play(row, usual, seed)
            except (
                Exception
            ) as error:  # of the system, or of those who read: the other rows are played all the same
                say(f"{row.number:>3}  {row.name}\n       verdict:  FAILED: {_in_words(error)}")
                is_good = False
            if not is_good and not has_own:  # what this row left behind must not be the next one's
                usual = None
                await stack.aclose()
            outcomes[PASSED if is_good else FAILED] += 1
    return outcomes


async def _play(row: Row, system: System, seed: int) -> bool:
    """Play a row, and say in a line what was injected, seen, and found; tell whether all was well."""
    began = time.monotonic()
    async with mix.lively(system, seed) as life, signs.looking_out(system, row.signs) as lookout:
        try:
            try:
                seen, problem = await row.play(system, life), ""
            finally:
                await system.heal()
        except Exception as error:  # a row that breaks has failed, and those after it are played
            seen, problem = "not what must be seen", _in_words(error)
    verdict = await life.verdict(system)
    verdict.add("sign", lookout.missing(row.signs))
    is_good = not problem and verdict.is_good
    say(f"{row.number:>3}  {row.name}  ({time.monotonic() - began:.0f} s)")
    say(f"       injected: {row.injected}")
    say(f"       seen:     {seen}")
    if row.signs:
        say(f"       shown by: {'; '.join(map(str, row.signs))}")
    say(f"       verdict:  {'ok' if is_good else 'FAILED'}: {verdict}".replace("\n", "\n                 "))
    if problem:
        say(f"                 {problem}")
    return is_good


def _in_words(error: Exception) -> str:
    """Return what an assertion says; of any other error everything, for nobody expected it."""
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    return "".join(traceback.format_exception(error))


async def play_mix(folder: Path, seed: int, minutes: float, users: int, *, spares: bool) -> int:
    """Play a mix for so long; return 0 when nothing was lost, and enough was struck.

    If it `spares`, one replica of each kind lives through it, and must not have grown.
    """
    acts = round(ACTS_PER_MINUTE * minutes)
    say(f"seed {seed}: {acts} kills, freezes and stops in {minutes:g} min, {users} users, a slot a second")
    play = mix.run_soak if spares else mix.run
    async with running(folder, population.drawn(users, seed)) as system:
        done, verdict = await play(system, seed, acts=acts, seconds=minutes * 60, say=say)
    struck = done["kill"] + done["freeze"]
    if struck < STRUCK_PER_MINUTE_MIN * minutes:
        verdict.wrong.append(f"mix: {struck} kills and freezes, not {STRUCK_PER_MINUTE_MIN} a minute")
    acted = ", ".join(f"{count} times {what}" for what, count in sorted(done.items()))
    say(f"{acted}; {'ok' if verdict.is_good else 'FAILED'}: {verdict}")
    return 0 if verdict.is_good else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--fault", type=int, action="append", help="only this row of the table")
    parser.add_argument(
        "--minutes", type=float, help="a mix of kills and freezes for so long, instead of rows"
    )
    parser.add_argument(
        "--spare-none", action="store_true", help="in the mix; else one replica of each kind lives through it"
    )
    parser.add_argument("--users", type=int, default=MIX_USERS, help="of the mix")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    known = {row.number for row in ROWS}
    unknown = set(arguments.fault or ()) - known
    if unknown:
        parser.error(f"there is no fault {sorted(unknown)}, but {sorted(known)}")
    with tempfile.TemporaryDirectory(prefix="foliotick-faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if arguments.minutes:
            mixed = play_mix(
                folder,
                arguments.seed,
                arguments.minutes,
                arguments.users,
                spares=not arguments.spare_none,
            )
            return asyncio.run(mixed)
        rows = [row for row in ROWS if not arguments.fault or row.number in arguments.fault]
        outcomes = asyncio.run(play_rows(rows, folder, arguments.seed))
    say(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    is_lacking = arguments.fault and outcomes[NOT_RUN]  # what was asked for by name
    return 1 if outcomes[FAILED] or is_lacking else 0


if __name__ == "__main__":
    sys.exit(main())
