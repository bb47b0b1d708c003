"""The person's terminal: steps with their time, and Ctrl-C for us alone."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def say(text: str = "") -> None:
    """Print a line; a terminal that has gone is no reason to fail."""
    with suppress(OSError, ValueError):
        print(text, flush=True)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Show that a step has begun, and how long it took."""
    live = sys.stdout.isatty()
    if live:
        print(f"  {name} …", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        if live:
            say()
        raise
    say(f"{chr(13) if live else ''}  {name:<40} {time.monotonic() - began:5.1f} s")


def progress(what: str, part: float) -> None:
    """Show how much is done, from 0 to 1: in place on a terminal, else only that it has been."""
    live = sys.stdout.isatty()
    if live or part >= 1:
        with suppress(OSError, ValueError):
            print(
                f"{chr(13) if live else ''}  {what:<40} {min(part, 1):5.0%}",
                end="" if live and part < 1 else "\n",
                flush=True,
            )


@contextmanager
def foreground() -> Iterator[None]:
    """Take Ctrl-C away from `make`, which would end with an error where we end well.

    Only when we are in the terminal's foreground: then our own process group becomes it until the end.
    """
    ours = _become_foreground()
    try:
        yield
    finally:
        if ours is not None:
            with suppress(OSError):
                os.tcsetpgrp(sys.stdin.fileno(), ours)


def _become_foreground() -> int | None:
    """Return the process group to give the terminal back to, or None when it was not taken."""
    try:
        before = os.getpgrp()
        if not sys.stdin.isatty() or os.tcgetpgrp(sys.stdin.fileno()) != before or before == os.getpid():
            return None
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else the next call would stop us
        os.setpgid(0, 0)
        os.tcsetpgrp(sys.stdin.fileno(), os.getpgrp())
    except (OSError, ValueError):
        return None
    return before
