"""How much data is built and how often each thing is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    name: str
    judged: bool
    """Whether the goals hold for this size; a smaller one shows only that everything works."""
    runs: int
    users: int
    many_users: int
    populations: tuple[int, ...]
    """Numbers of users whose snapshots are timed, for the plot; `users` and `many_users` are among them."""
    looped_users: int
    """Users that the seed-like loop is timed with; its time grows in proportion to them."""
    chart_users: int
    chart_days: int
    years: tuple[float, ...]
    """Lengths of single users' histories; the last is the longest."""
    sampled_users: int
    storage_users: int
    storage_slots: int
    requests: int
    """HTTP requests in one run of a cheap answer; an expensive one gets a part of them."""
    uncached_requests: int
    tick_seconds: float
    """How long the feeder has each load."""
    stream_clients: int
    stream_seconds: float
    """How long that many clients watch."""
    overload_seconds: float
    """How long ten times too many clients ask."""
    server_settings: dict[str, str]


# What a durable server of 4 to 8 GB has; fsync, synchronous_commit and full_page_writes are said, for whoever doubts.
_DURABLE = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "random_page_cost": "1.1",
    "jit": "off",  # the services switch it off for themselves: no way is to pay for it
}
_LARGE = _DURABLE | {
    "shared_buffers": "2GB",
    "effective_cache_size": "6GB",
    "maintenance_work_mem": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
}

FULL = Size(
    name="full",
    judged=True,
    runs=5,
    users=10_000,
    many_users=100_000,
    populations=(100, 1_000, 10_000, 100_000),
    looped_users=500,
    chart_users=1_000,
    chart_days=90,
    years=(0.1, 0.3, 1.0, 3.0, 10.0),
    sampled_users=25,
    storage_users=500,
    storage_slots=576,
    requests=8_000,
    uncached_requests=2_000,
    tick_seconds=60,
    stream_clients=1_000,
    stream_seconds=600,
    overload_seconds=60,
    server_settings=_LARGE,
)
QUICK = Size(
    name="quick",
    judged=False,
    runs=3,
    users=1_000,
    many_users=10_000,
    populations=(100, 1_000, 10_000),
    looped_users=100,
    chart_users=20,
    chart_days=90,
    years=(0.1, 1.0),
    sampled_users=10,
    storage_users=100,
    storage_slots=144,
    requests=2_000,
    uncached_requests=300,
    tick_seconds=10,
    stream_clients=1_000,
    stream_seconds=20,
    overload_seconds=15,
    server_settings=_DURABLE,
)
MINI = Size(
    name="mini",
    judged=False,
    runs=1,
    users=100,
    many_users=200,
    populations=(100, 200),
    looped_users=10,
    chart_users=3,
    chart_days=3,
    years=(0.02, 0.04),
    sampled_users=2,
    storage_users=100,
    storage_slots=12,
    requests=512,  # CPU is counted in hundredths of a second: the cheapest answers must take a few of them
    uncached_requests=64,
    tick_seconds=2,
    stream_clients=100,
    stream_seconds=2,
    overload_seconds=2,
    server_settings=_DURABLE | {"fsync": "off", "synchronous_commit": "off"},  # for tests, which only run it
)
SIZES = {size.name: size for size in (FULL, QUICK, MINI)}
