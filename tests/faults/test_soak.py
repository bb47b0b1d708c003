"""What counts as flat, and who is spared to show it."""

from pathlib import Path

from tests.faults import mix, population, soak, system
from tests.faults.parts import Nats, Postgres, Service
from tests.faults.soak import MORE_MAX, Soak, compared

BOUNDS = {"memory_mb": (1.1, 8.0)}


def memory(*megabytes: float) -> list[dict[str, float]]:
    return [{"memory_mb": each} for each in megabytes]


def test_last_third_is_compared_with_the_first_after_the_warm_up() -> None:
    # Of 20 samples the first 4 are warm-up, the next 5 the first third, the last 5 the last one; 110 + 8 are allowed.
    warm_up, first, between = [10.0] * 4, [90, 100, 100, 100, 500], [200.0] * 6
    flat = memory(*warm_up, *first, *between, 118, 118, 118, 90, 700)
    assert compared("gateway", flat, BOUNDS) == ("gateway memory_mb 100 → 118", [])
    leaking = memory(*warm_up, *first, *between, 119, 119, 119, 90, 700)
    assert compared("gateway", leaking, BOUNDS)[1] == ["gateway: memory_mb grew from 100 to 119"]


def test_too_few_samples_prove_nothing() -> None:
    assert compared("gateway", memory(1, 2), BOUNDS)[1] == ["gateway: 2 samples are too few"]


def test_everything_that_must_be_flat_has_a_bound() -> None:
    assert set(MORE_MAX) == {"tasks", "threads", "files", "connections", "memory_mb"}


def nothing_runs() -> system.System:
    kinds = ("price_feeder", "snapshotter", "api_gateway")
    return system.System(
        folder=Path(),
        population=population.Population([]),
        postgres_servers=[Postgres("postgres")],
        nats_servers=[Nats("nats")],
        market=Service("market"),
        services={kind: [Service(f"{kind}-1"), Service(f"{kind}-2")] for kind in kinds},
        http=None,  # type: ignore[arg-type]  # nobody is asked
        gateway_ports={},
        jwt_secret="",
    )


def test_one_replica_of_each_kind_is_frozen_and_never_ended() -> None:
    still = nothing_runs()
    alive = soak.spared(still, seed=1)
    names = {service.name for service in alive}
    assert names == {"price_feeder-2", "snapshotter-2", "api_gateway-2"}
    assert names.isdisjoint(service.name for service in soak.spared(still, seed=2))
    drawn = mix.schedule(still, 1, acts=500, seconds=500.0, spared=alive)
    assert {act.what for act in drawn if act.part in names} == {"freeze"}
    assert {act.part for act in drawn if act.what == "kill"} == {
        *("price_feeder-1", "snapshotter-1", "api_gateway-1", "postgres", "nats")
    }


def test_process_that_was_to_live_and_did_not_is_found(tmp_path: Path) -> None:
    still = nothing_runs()
    alive = soak.spared(still, seed=1)
    for service in alive:
        service.folder = tmp_path
        service.log.write_text("it ended\n")
    watched = Soak(still, alive)
    watched._pids["snapshotter-2"] = [4711]
    assert "snapshotter-2 did not live through it: it ended" in watched.verdict()[1]
