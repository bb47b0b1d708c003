"""Run a service that was broken on purpose: `python -m tests.faults.tampered ack_first services.snapshotter`.

Some break a promise, so that the checker can show that it notices. Others die, or fall asleep, at one very point where
a signal from outside would hardly ever hit: as soon as there is the file that TAMPERED_WHEN names. Who comes to that
point first takes the file away, so it befalls one of all replicas, once. What is in the file may say more.
"""

import asyncio
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.bus import Delivery, Outgoing

WHEN = "TAMPERED_WHEN"


# ---- broken promises -----------------------------------------------------------------------------


def no_dedup() -> None:
    """Let every replica's timer make a message of its own; what keeps snapshots apart must be dropped as well."""
    from services.snapshotter import timer

    due = timer.due

    def due_without_id(scheduled_at: datetime, shard: int, shards: int) -> Outgoing:
        outgoing = due(scheduled_at, shard, shards)
        return Outgoing(outgoing.subject, outgoing.message)

    timer.due = due_without_id


def lost_details() -> None:
    """Store snapshots of every seventh user without positions."""
    from services.snapshotter import queries

    for name in ("TAKE_SNAPSHOTS", "TAKE_MISSING_SNAPSHOTS"):
        statement = getattr(queries, name)
        changed = statement.replace(
            "WHERE current_value IS NOT NULL AND", "WHERE current_value IS NOT NULL AND user_id % 7 <> 3 AND"
        )
        assert changed != statement
        setattr(queries, name, changed)


def ack_first() -> None:
    """Acknowledge a shard, and take its snapshots a moment later."""
    from services.snapshotter import snapshots

    handle = snapshots.handle

    async def handle_late(worker: snapshots.Worker, delivery: Delivery) -> None:
        await delivery.acknowledge()
        await asyncio.sleep(0.4)
        await handle(worker, delivery)

    snapshots.handle = handle_late


def no_newer_wins() -> None:
    """Let whatever trade comes last be the last one."""
    from services.price_feeder import queries

    changed = queries.STORE_TRADES.replace(
        "EXCLUDED.traded_at > cached.traded_at", "EXCLUDED.traded_at <> cached.traded_at"
    ).replace("WHERE EXCLUDED.traded_at >= cached.traded_at", "WHERE TRUE")
    assert changed.count("TRUE") > queries.STORE_TRADES.count("TRUE")
    queries.STORE_TRADES = changed


# ---- deaths, and a sleep -------------------------------------------------------------------------


def die_before_acknowledging() -> None:
    """Die when a shard is committed and not acknowledged yet."""
    Delivery.acknowledge = _struck_before(Delivery.acknowledge, signal.SIGKILL)  # type: ignore[method-assign]


def die_before_publishing() -> None:
    """Die when prices are committed and their ticks not published yet, the symbol's in the file among them."""
    from services.price_feeder.outbox import Outbox

    def is_among(_: Outbox, symbols: Sequence[str]) -> bool:
        return _in_the_file() in symbols

    Outbox._publish_ticks = _struck_before(  # type: ignore[method-assign]
        Outbox._publish_ticks, signal.SIGKILL, when=is_among
    )


def sleep_before_storing() -> None:
    """Stop when a shard is to be stored and nothing was sent to PostgreSQL yet."""
    from services.snapshotter import queries

    queries.take_snapshots = _struck_before(queries.take_snapshots, signal.SIGSTOP)


def _struck_before(
    function: Any, number: signal.Signals, *, when: Callable[..., bool] = lambda *_, **__: True
) -> Any:
    async def struck(*args: Any, **options: Any) -> Any:
        if when(*args, **options) and _is_first():
            os.kill(os.getpid(), number)
        return await function(*args, **options)

    return struck


def _in_the_file() -> str | None:
    """Return what the file says; None without one."""
    try:
        return Path(os.environ[WHEN]).read_text()
    except FileNotFoundError:
        return None


def _is_first() -> bool:
    """Tell whether the file was there, and this process has taken it away."""
    try:
        Path(os.environ[WHEN]).unlink()
    except FileNotFoundError:
        return False
    return True


TAMPERINGS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        no_dedup,
        lost_details,
        ack_first,
        no_newer_wins,
        die_before_acknowledging,
        die_before_publishing,
        sleep_before_storing,
    )
}


def runner(service: str, *names: str) -> str:
    """Return what is to be run in place of a service's own module."""
    return f"tests.faults.tampered {','.join(names)} services.{service}"


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        TAMPERINGS[name]()
    runpy.run_module(sys.argv[2], run_name="__main__", alter_sys=True)
