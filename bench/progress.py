"""What the person at the terminal sees meanwhile."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def say(text: str) -> None:
    print(text, flush=True)


def progress(what: str, items: Iterable[T], *, total: int, unit: str) -> Iterator[T]:
    """Yield the items behind a progress bar; where there is no terminal, a line says what is done."""
    if not sys.stderr.isatty():
        say(f"  {what}")
    yield from tqdm(items, desc=f"  {what}", total=total, unit=f" {unit}", disable=None, dynamic_ncols=True)
