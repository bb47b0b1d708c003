"""Wrong clocks: libfaketime gives a process a clock of its own, which can be set while it runs.

The steady clocks that waits and leases go by stay as they are. nats-server asks the kernel itself, and keeps its own.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


def missing() -> str | None:
    """Say that this machine has no libfaketime; None when it has."""
    return None if LIBRARIES else "libfaketime is missing: apt-get install libfaketime"


@dataclass
class Clock:
    """The clock of a process, so far ahead of the true one."""

    file: Path
    ahead: timedelta = timedelta(0)

    def set_ahead(self, ahead: timedelta) -> None:
        """Set it, at once and also for a process that runs."""
        self.ahead = ahead
        self.file.parent.mkdir(exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(f"{ahead.total_seconds():+.6f}\n")
        unfinished.rename(self.file)

    @property
    def environment(self) -> dict[str, str]:
        """Return what gives a process this clock."""
        return {
            "LD_PRELOAD": str(LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
