"""`python -m services.admin COMMAND`: one line on stderr and exit code 1 when a command could not be done."""

import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from services.admin import arguments as command_line
from services.admin import commands, dead_letters
from services.admin.commands import CommandFailed
from services.admin.portfolio_file import FILE_BYTES_MAX, PortfolioFileError, Position, positions_of
from services.admin.settings import DatabaseSettings, DeadLetterSettings, TokenSettings
from services.admin.tokens import TokensComeFromElsewhere, minted_token
from shared import database as databases
from shared import logs, settings
from shared.clock import utc_now
from shared.database import Database, DatabaseUnavailable, SchemaMissing
from shared.settings import SettingsError

STATEMENT_TIMEOUT_SECONDS = 600.0


def main(argv: Sequence[str]) -> int:
    given = command_line.parser().parse_args(argv)
    try:
        print(_performed(given), flush=True)
    except SettingsError as error:
        return _failed("its settings are wrong", *str(error).splitlines(), code=2)
    except PortfolioFileError as error:
        return _failed(f"{_file_name(given)} is not imported, nothing was changed", *error.problems)
    except (CommandFailed, TokensComeFromElsewhere) as error:
        return _failed(str(error))
    except BrokenPipeError:  # whoever read the output has seen enough; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _performed(given: Namespace) -> str:
    """Do what was asked; return the text to print."""
    if given.command == "mint-token":
        lifetime = timedelta(hours=given.hours)
        return minted_token(settings.load(TokenSettings), given.subject, now=utc_now(), lifetime=lifetime)
    if given.command in dead_letters.COMMANDS:
        return asyncio.run(dead_letters.performed(settings.load(DeadLetterSettings), given))
    positions = _positions(_file_name(given))
    loaded = settings.load(DatabaseSettings)
    return asyncio.run(_performed_on_database(loaded.database_url.get_secret_value(), given, positions))


async def _performed_on_database(url: str, given: Namespace, positions: Sequence[Position]) -> str:
    try:
        async with databases.connect(
            url,
            application_name="admin",
            connections_max=1,
            statement_timeout_seconds=STATEMENT_TIMEOUT_SECONDS,
        ) as database:
            return await _command(database, given, positions)
    except DatabaseUnavailable as error:
        raise CommandFailed(f"the database cannot be used: {_one_line(error)}") from error
    except SchemaMissing as error:
        raise CommandFailed(f"the database has no schema or an older one: {_one_line(error)}") from error


async def _command(  # noqa: PLR0911  # one for each command
    database: Database, given: Namespace, positions: Sequence[Position]
) -> str:
    match given.command:
        case "create-user":
            return await commands.create_user(
                database, given.subject, cash=given.cash, positions=positions, if_missing=given.if_missing
            )
        case "set-cash":
            return await commands.set_cash(database, given.subject, given.amount)
        case "import-positions":
            return await commands.import_positions(database, given.subject, positions, replace=given.replace)
        case "show-user":
            return await commands.show_user(database, given.subject)
        case "list-users":
            return await commands.list_users(database, limit=given.limit)
        case "activate-user" | "deactivate-user":
            return await commands.set_active(database, given.subject, active=given.command == "activate-user")
        case "delete-user":
            return await commands.delete_user(database, given.subject, confirmed=given.yes)
        case other:
            raise AssertionError(f"{other} has a parser and no command")


def _file_name(given: Namespace) -> str | None:
    name: str | None = getattr(given, "file", None) or getattr(given, "positions", None)
    return name


def _positions(name: str | None) -> list[Position]:
    """Return the file's positions; none when no file was given."""
    if name is None:
        return []
    try:
        if name == "-":
            content = sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
        else:
            with Path(name).open("rb") as file:
                content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise CommandFailed(f"{name} cannot be read: {error.strerror}") from error
    return positions_of(content)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _failed(problem: str, *details: str, code: int = 1) -> int:
    lines = "".join(f"\n  {line}" for line in details)
    sys.stderr.write(f"admin: {problem}{':' if details else ''}{lines}\n")
    return code


if __name__ == "__main__":
    logs.configure("admin", "ERROR")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
