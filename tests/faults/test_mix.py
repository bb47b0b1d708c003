"""A short mix of kills and freezes: all that was due is there, once and right. `make soak` runs it for longer."""

from pathlib import Path

from tests.faults import mix, population, system
from tests.faults.watchers import SSE, WEBSOCKET

SEED = 30
ACTS = 12
SECONDS = 20.0


async def test_kills_and_freezes_lose_nothing(tmp_path: Path) -> None:
    async with system.running(tmp_path, population.drawn(50, SEED)) as running:
        drawn = mix.schedule(running, SEED, acts=ACTS, seconds=SECONDS)
        assert {act.what for act in drawn} == {"kill", "freeze", "stop"}
        assert {"postgres", "nats"} <= {act.part for act in drawn}
        done, verdict = await mix.run(running, SEED, acts=ACTS, seconds=SECONDS, say=print)
    assert done.total() == ACTS
    assert verdict.is_good, verdict
    assert verdict.counts["snapshots"] == verdict.counts["of"]
    assert verdict.counts["orders"]
    assert verdict.counts["chart points"]
    streams = verdict.counts["streams"]
    assert isinstance(streams, dict)
    assert {SSE, WEBSOCKET, "portfolio", "change"} <= streams.keys()
