"""What must hold before anything is started, each said in words when it does not."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local.readiness import StartFailed
from local.settings import SIMULATED_KEYS, LocalSettings, service_environment
from services.api_gateway.settings import Settings as GatewaySettings
from services.market_simulator.settings import Settings as SimulatorSettings
from services.price_feeder.settings import Settings as FeederSettings
from services.snapshotter.settings import Settings as SnapshotterSettings
from shared.settings import SettingsError, load

DISK_MB_MIN = 300


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; two systems on one folder would ruin it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")  # it holds secrets, whatever it is called
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StartFailed(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StartFailed(
                f"it runs already, on {folder} (a second one needs its own LOCAL_DATA_DIR and GATEWAY_PORT)"
            ) from error
        yield


def check_room(folder: Path) -> None:
    free_mb = shutil.disk_usage(folder).free // 1_000_000
    if free_mb < DISK_MB_MIN:
        raise StartFailed(f"the disk of {folder} has {free_mb} MB free, {DISK_MB_MIN} MB are needed")


def check_port(host: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            problem = f"port {port} of {host} cannot be used: {error.strerror}"
        else:
            problem = f"port {port} of {host} is taken: GATEWAY_PORT={port + 1} make run"
        raise StartFailed(problem) from error


def check_settings(settings: LocalSettings) -> None:
    """Read every service's settings as the service will, so that all that is wrong is said before anything starts."""
    if settings.alpaca_secret_key and settings.simulated:
        raise StartFailed(
            "ALPACA_SECRET_KEY is set and ALPACA_API_KEY is not: set both, or neither to simulate the market"
        )
    planned = {"DATABASE_URL": "postgresql://127.0.0.1/planned", "JWT_SECRET": "planned " * 8}
    planned |= SIMULATED_KEYS if settings.simulated else {}
    before = dict(os.environ)
    problems: list[str] = []
    try:
        environment = service_environment(planned)
        os.environ.clear()
        os.environ.update(environment)
        for model in (FeederSettings, SnapshotterSettings, GatewaySettings, SimulatorSettings):
            try:
                load(model)
            except SettingsError as error:
                problems += [line for line in str(error).splitlines() if line not in problems]
    finally:
        os.environ.clear()
        os.environ.update(before)
    if problems:
        raise StartFailed("settings are wrong:" + "".join(f"\n  {problem}" for problem in problems))
