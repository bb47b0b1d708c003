"""What is known of a replica from where both servers were. Moments are seconds, positions bytes of the log."""

import math

from services.api_gateway.queries import PrimaryPosition, ReplicaPosition
from services.api_gateway.replica import MOMENTS_MAX, Progress
from shared.database import SCHEMA_REVISION


def primary(written: int, *, cluster: int = 7, timeline: int = 1) -> PrimaryPosition:
    return PrimaryPosition(cluster, timeline, written)


def replica(
    replayed: int,
    *,
    is_replica: bool = True,
    cluster: int = 7,
    timeline: int = 1,
    revision: str | None = SCHEMA_REVISION,
) -> ReplicaPosition:
    return ReplicaPosition(is_replica, cluster, timeline, replayed, revision)


def known(*moments: tuple[float, int]) -> Progress:
    progress = Progress()
    for at, written in moments:
        progress.primary_was(at, primary(written))
    return progress


def test_nothing_is_known_before_both_were_asked() -> None:
    progress = Progress()
    assert progress.replica_is(replica(100)) == "the primary has not been reached yet"
    assert progress.lag_seconds(5.0) == math.inf
    progress.primary_was(10.0, primary(200))
    assert progress.replica_is(replica(100)) is None
    assert progress.lag_seconds(10.0) == math.inf  # it is behind, and not known how far
    assert not progress.shows(0.0)


def test_lag_is_the_age_of_the_newest_moment_that_was_replayed() -> None:
    progress = known((10.0, 100), (11.0, 200), (12.0, 300))
    assert progress.replica_is(replica(250)) is None
    assert progress.lag_seconds(12.5) == 1.5
    assert progress.shows(11.0)
    assert not progress.shows(11.1)
    assert progress.replayed_min == 200


def test_lag_grows_while_nobody_can_be_asked() -> None:
    progress = known((10.0, 100))
    progress.replica_is(replica(100))
    assert progress.lag_seconds(10.0) == 0
    assert progress.lag_seconds(70.0) == 60


def test_idle_primary_is_no_lag() -> None:
    progress = known((10.0, 100), (11.0, 100), (12.0, 100))
    progress.replica_is(replica(100))
    assert progress.lag_seconds(12.25) == 0.25


def test_replica_that_went_back_is_believed() -> None:
    progress = known((10.0, 100), (11.0, 200))
    progress.replica_is(replica(200))
    progress.replica_is(replica(150))  # begun anew from its last checkpoint
    assert progress.lag_seconds(11.0) == math.inf


def test_promoted_server_is_no_replica_however_far_it_is() -> None:
    progress = known((10.0, 100))
    assert "promoted" in str(progress.replica_is(replica(10_000, is_replica=False)))
    assert progress.lag_seconds(10.0) == math.inf


def test_positions_of_two_timelines_or_clusters_are_not_compared() -> None:
    progress = known((10.0, 100))
    assert "timeline 2" in str(progress.replica_is(replica(10_000, timeline=2)))
    assert "another cluster" in str(progress.replica_is(replica(10_000, cluster=8)))
    assert progress.lag_seconds(10.0) == math.inf


def test_after_a_failover_nothing_of_the_old_primary_counts() -> None:
    progress = known((10.0, 100))
    progress.replica_is(replica(100))
    progress.primary_was(11.0, primary(150, timeline=2))
    assert progress.lag_seconds(11.0) == math.inf
    assert "timeline 1" in str(progress.replica_is(replica(10_000)))
    assert progress.replica_is(replica(150, timeline=2)) is None
    assert progress.lag_seconds(11.0) == 0


def test_replica_without_our_schema_is_not_used() -> None:
    progress = known((10.0, 100))
    assert "schema is 0001" in str(progress.replica_is(replica(100, revision="0001")))
    assert "schema is empty" in str(progress.replica_is(replica(100, revision=None)))
    assert progress.replica_is(replica(100, revision="9999")) is None


def test_moments_are_bounded_and_lag_is_never_understated() -> None:
    progress = known(*((float(at), at * 10) for at in range(1, 11)))
    progress.replica_is(replica(50))
    for at in range(11, 11 + 2 * MOMENTS_MAX):
        progress.primary_was(float(at), primary(at * 10))
    assert len(progress._moments) == MOMENTS_MAX
    progress.replica_is(replica(50))
    assert progress.lag_seconds(1_000.0) == 995
    progress.replica_is(replica(60))  # the moment 6 was given up
    assert progress.lag_seconds(1_000.0) == 995
    progress.replica_is(replica(12_100))
    assert progress.lag_seconds(1_210.0) == 0
