"""`python -m local run | token SUBJECT | smoke | admin … | load-demo`: the commands behind the Makefile."""

import argparse
import asyncio
import subprocess
import sys
from collections.abc import Sequence

from local import load, smoke
from local.readiness import StartFailed
from local.servers import kept_secret
from local.settings import LocalSettings, read_dotenv, service_environment
from local.system import Running, run, running_system, token
from local.terminal import foreground, progress, say
from services.snapshotter.settings import Settings as SnapshotterSettings
from shared import logs, settings
from shared.clock import utc_now
from shared.settings import SettingsError

SCREEN = """
Foliotick is running. {prices}

  page    {url}
  API     {url}/api/portfolio/current   (described at {url}/api/openapi.json)
  token   {token}
          of the user demo; `make token USER=alice` prints another's
  try it  curl -H 'Authorization: Bearer {token}' {url}/api/portfolio/current
          curl -H 'Authorization: Bearer {token}' '{url}/api/portfolio/performance?timeframe=1M'
  check   make smoke

  database  {database_url}
  bus       {nats_url}
  health    {health}
  logs      {logs}

Ctrl-C stops everything; what is stored stays for the next run.
"""


def main() -> int:
    read_dotenv()
    arguments = _arguments()
    try:
        loaded = settings.load(LocalSettings)
    except SettingsError as error:
        return _failed(str(error), code=2)
    logs.configure("local", "ERROR")
    match arguments.command:
        case "token":
            return _print_token(loaded, arguments.subject)
        case "smoke":
            return _smoke(loaded, arguments)
        case "admin":
            return _administer(loaded, arguments.arguments)
        case "load-demo":
            return _load(loaded, arguments.users, arguments.days)
    return _run(loaded)


def _run(loaded: LocalSettings) -> int:
    say("starting Foliotick")
    try:
        with foreground():
            asyncio.run(run(loaded, lambda running, demo_token: _show(loaded, running, demo_token)))
    except StartFailed as error:
        return _failed(str(error))
    say("stopped")
    return 0


def _show(loaded: LocalSettings, running: Running, demo_token: str) -> None:
    prices = (
        "Prices are simulated: no ALPACA_API_KEY is set." if running.simulated else "Prices come from Alpaca."
    )
    health = "\n            ".join(f"{name:<17} {url}" for name, url in running.health_urls.items())
    say(
        SCREEN.format(
            prices=prices,
            url=running.url,
            token=demo_token,
            database_url=running.database_url,
            nats_url=running.nats_url,
            health=health,
            logs=loaded.folder / "logs",
        )
    )


def _print_token(loaded: LocalSettings, subject: str) -> int:
    if not (loaded.folder / "jwt_secret").exists():
        return _failed("there is no local system yet: `make run` makes one")
    say(token(loaded.folder, subject))
    return 0


def _smoke(loaded: LocalSettings, arguments: argparse.Namespace) -> int:
    if arguments.url:
        if not arguments.token:
            return _failed("TOKEN=… is needed with URL=…: a bearer token of a user of that system")
        url = arguments.url if "://" in arguments.url else f"http://{arguments.url}"
        return asyncio.run(smoke.run(url, arguments.token, {}))
    running = running_system(loaded.folder)
    if running is None:
        return _failed("no local system is running: `make run`, or give URL=… TOKEN=…")
    bearer = arguments.token or token(loaded.folder, "demo")
    return asyncio.run(smoke.run(running.url, bearer, running.health_urls, simulated=running.simulated))


def _administer(loaded: LocalSettings, arguments: Sequence[str]) -> int:
    """Run an administrator's command on the local system."""
    running = running_system(loaded.folder)
    if running is None:
        return _failed("no local system is running: `make run` starts it")
    own = {
        "DATABASE_URL": running.database_url,
        "NATS_URL": running.nats_url,
        "JWT_SECRET": kept_secret(loaded.folder / "jwt_secret"),
    }
    command = [sys.executable, "-m", "services.admin", *arguments]
    return subprocess.run(command, env=service_environment(own), check=False).returncode


def _load(loaded: LocalSettings, users: int, days: int) -> int:
    """Fill the local system with users and their history; no users: delete those that were made so."""
    running = running_system(loaded.folder)
    if running is None:
        return _failed("no local system is running: `make run` starts it")
    if not users:
        say(f"deleted {asyncio.run(load.unload(running.database_url, progress))} users")
        return 0
    policy = SnapshotterSettings.model_validate({"database_url": running.database_url}).upkeep
    try:
        filled = asyncio.run(
            load.load(
                running.database_url,
                policy,
                utc_now(),
                users=users,
                days=days,
                disk=loaded.folder,
                progress=progress,
            )
        )
    except load.LoadRefused as error:
        return _failed(str(error))
    last = f"{load.SUBJECT_PREFIX}{users:06}"
    say(
        f"{users:,} users have {filled.snapshots:,} snapshots from {filled.begins_at:%Y-%m-%d} on; "
        f"`make token USER={last}` prints a token"
    )
    return 0


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= load.COUNT_MAX:
        raise argparse.ArgumentTypeError(f"must be from 0 to {load.COUNT_MAX:,}")
    return value


def _failed(problem: str, *, code: int = 1) -> int:
    sys.stderr.write(f"foliotick: {problem}\n")
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run the whole system until Ctrl-C")
    minting = commands.add_parser("token", help="print a bearer token for a user of the local system")
    minting.add_argument("subject")
    asking = commands.add_parser("smoke", help="ask a running system what may be wrong with it")
    asking.add_argument("--url", help="of the gateway, http://host:port; default: the local system's")
    asking.add_argument("--token", help="a bearer token of a user of that system")
    administering = commands.add_parser("admin", help="run a command of services.admin on the local system")
    administering.add_argument("arguments", nargs=argparse.REMAINDER)
    loading = commands.add_parser("load-demo", help="fill the local system with users and their history")
    loading.add_argument(
        "--users", type=_count, default=100, help="how many (100); 0 deletes those made before"
    )
    loading.add_argument("--days", type=_count, default=90, help="of history (90)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
