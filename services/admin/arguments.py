"""The command line: names, arguments and help of every command."""

import argparse
from decimal import Decimal

from services.admin.amounts import CASH, amount, shown

TOKEN_HOURS_DEFAULT = 24
TOKEN_HOURS_MAX = 24 * 366
SUBJECT_LENGTH_MAX = 255
LIMIT_DEFAULT = 1000
LIMIT_MAX = 1_000_000
NUMBER_MAX = 10**15

_CSV_HELP = (
    "columns ticker, shares and cost_basis (total paid, US dollars) in any order, named by the first line; "
    "`-` reads standard input"
)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="admin",
        description="Administer users, cash, positions, tokens and dead letters. Settings come from the environment: "
        "DATABASE_URL; for mint-token JWT_SECRET, JWT_ISSUER and JWT_AUDIENCE, the same as the gateway's; for dead "
        "letters NATS_URL.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    def user_command(name: str, text: str) -> argparse.ArgumentParser:
        added = command(name, text)
        added.add_argument("subject", metavar="SUBJECT", type=_subject, help="the `sub` of the user's tokens")
        return added

    create = user_command("create-user", "create a user, with cash and positions if given")
    create.add_argument(
        "--cash", metavar="AMOUNT", type=_cash, default=Decimal(0), help="US dollars, 0 if not given"
    )
    create.add_argument("--positions", metavar="FILE.csv", help=_CSV_HELP)
    create.add_argument("--if-missing", action="store_true", help="leave a user that exists as it is")

    cash = user_command("set-cash", "set a user's cash balance")
    cash.add_argument(
        "amount", metavar="AMOUNT", type=_cash, help="US dollars, such as 1234.50; may be negative"
    )

    positions = user_command(
        "import-positions", "add or overwrite a user's positions; all of a file or nothing"
    )
    positions.add_argument("file", metavar="FILE.csv", help=_CSV_HELP)
    positions.add_argument(
        "--replace", action="store_true", help="remove the positions that the file does not have"
    )

    user_command("show-user", "show a user, the positions and their value")
    users = command("list-users", "list users by subject")
    users.add_argument(
        "--limit", metavar="N", type=_limit, default=LIMIT_DEFAULT, help="users at most (%(default)s)"
    )
    user_command("deactivate-user", "refuse a user and take no more snapshots; the history stays")
    user_command("activate-user", "undo deactivate-user")
    delete = user_command("delete-user", "delete a user, the positions and the whole history, for good")
    delete.add_argument("--yes", action="store_true", help="needed, as nothing brings them back")

    token = user_command("mint-token", "print a bearer token for a user")
    token.add_argument(
        "--hours",
        metavar="N",
        type=_hours,
        default=TOKEN_HOURS_DEFAULT,
        help="how long it is valid (%(default)s)",
    )

    command("dead-letters", "list the messages of the bus that could not be handled")
    for name, text in (
        ("replay-dead-letter", "publish a dead letter's message again, as it was, and delete the letter"),
        ("discard-dead-letter", "delete a dead letter, for good"),
    ):
        command(name, text).add_argument(
            "id", metavar="ID|all", type=_letter, help="as dead-letters lists it, or `all`"
        )
    return root


def _letter(text: str) -> int | None:
    """Return the number of a letter; None for all."""
    return None if text == "all" else _whole_number(text, NUMBER_MAX)


def _subject(text: str) -> str:
    if not text or text != text.strip() or not text.isprintable() or len(text) > SUBJECT_LENGTH_MAX:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} must be 1 to {SUBJECT_LENGTH_MAX} printable characters, without spaces around them"
        )
    return text


def _cash(text: str) -> Decimal:
    try:
        return amount(text, CASH)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _limit(text: str) -> int:
    return _whole_number(text, LIMIT_MAX)


def _hours(text: str) -> int:
    return _whole_number(text, TOKEN_HOURS_MAX)


def _whole_number(text: str, largest: int) -> int:
    if (
        not text.isascii()
        or not text.isdecimal()
        or len(text) > len(str(largest))
        or not 1 <= int(text) <= largest
    ):
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a whole number from 1 to {largest}")
    return int(text)
