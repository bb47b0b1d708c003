"""What comes before everything else in a service's `__main__`, and therefore imports next to nothing itself."""

import os
import signal


def end_when_asked() -> None:
    """Let a signal that comes while the rest is imported, which takes seconds, end the process with exit code 0.

    Nothing has begun by then, so nothing can be half done. At once: an exception would be raised in the middle of
    whatever is being imported, which may catch it. `lifecycle.run` takes the signals over.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
