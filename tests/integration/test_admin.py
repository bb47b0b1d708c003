"""The administrator's commands as an operator runs them, on a real PostgreSQL."""

import asyncio
import io
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest

from services.admin.__main__ import main
from shared.clock import utc_now
from shared.database import Database
from tests import factories

ROOT = Path(__file__).parent.parent.parent
SECRET = "a-secret-of-the-tests-with-40-characters"
HEADER = "ticker,shares,cost_basis\n"


class Outcome(NamedTuple):
    code: int
    output: str
    errors: str


class Admin:
    """Runs commands in this process, as starting one for each would take most of the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    async def __call__(self, url: str, *argv: str, stdin: str = "") -> Outcome:
        self._monkeypatch.setenv("DATABASE_URL", url)
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        async with asyncio.timeout(30):
            code = await asyncio.to_thread(exit_code, argv)
        output, errors = self._capsys.readouterr()
        return Outcome(code, output, errors)


def exit_code(argv: Sequence[str]) -> int:
    code: object
    try:
        code = main(argv)
    except SystemExit as wrong_usage:
        code = wrong_usage.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Admin:
    return Admin(monkeypatch, capsys)


async def admin_process(script: str, **environment: str) -> Outcome:
    """Run a line of shell in which `admin` is the command."""
    process = await asyncio.create_subprocess_shell(
        f'set -o pipefail; admin() {{ {sys.executable} -m services.admin "$@"; }}; {script}',
        cwd=ROOT,
        env=os.environ | environment,
        executable="/bin/bash",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        output, errors = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, output.decode(), errors.decode())


async def positions_of(database: Database, subject: str) -> dict[str, tuple[Decimal, Decimal]]:
    rows = await database.fetch(
        "SELECT ticker, shares, cost_basis FROM positions JOIN users ON id = user_id WHERE subject = $1",
        subject,
    )
    return {row["ticker"]: (row["shares"], row["cost_basis"]) for row in rows}


async def test_user_is_created_once_with_cash(admin: Admin, database: Database, database_url: str) -> None:
    created = await admin(database_url, "create-user", "carol", "--cash", "5000.50")
    assert created == (0, "user carol created with 5000.50 cash and 0 positions\n", "")
    again = await admin(database_url, "create-user", "carol", "--cash", "1")
    assert again == (1, "", "admin: user carol exists already\n")
    assert await database.fetch_value("SELECT cash_balance FROM users") == Decimal("5000.50")


async def test_user_is_created_with_positions_and_left_alone_if_not_missing(
    admin: Admin, database: Database, database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "positions.csv"
    file.write_text(HEADER + "AAPL,100,15000.00\n")
    argv = ("create-user", "carol", "--cash", "10", "--positions", str(file), "--if-missing")
    assert (await admin(database_url, *argv)).output == "user carol created with 10.00 cash and 1 position\n"
    file.write_text(HEADER + "MSFT,1,1\n")
    assert await admin(database_url, *argv) == (0, "user carol exists already and was left as it is\n", "")
    assert await positions_of(database, "carol") == {"AAPL": (Decimal(100), Decimal(15000))}


async def test_user_is_not_created_when_a_position_is_wrong(
    admin: Admin, database: Database, database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "positions.csv"
    file.write_text(HEADER + "AAPL,-1,15000.00\n")
    outcome = await admin(database_url, "create-user", "carol", "--positions", str(file))
    assert outcome.code == 1
    assert outcome.errors == (
        f"admin: {file} is not imported, nothing was changed:\n"
        "  line 2: shares is '-1', must not be negative\n"
    )
    assert await database.fetch_value("SELECT count(*) FROM users") == 0


async def test_cash_is_set_to_the_cent(admin: Admin, database: Database, database_url: str) -> None:
    await factories.create_user(database, "carol", cash="5")
    outcome = await admin(database_url, "set-cash", "carol", "-1234567.89")
    assert outcome == (0, "user carol has -1234567.89 cash\n", "")
    assert await database.fetch_value("SELECT cash_balance FROM users") == Decimal("-1234567.89")


async def test_import_adds_and_overwrites_and_keeps_the_other_positions(
    admin: Admin, database: Database, database_url: str, tmp_path: Path
) -> None:
    held = {"AAPL": ("1", "10.00"), "MSFT": ("2", "20.00"), "IBM": ("3", "30.00")}
    await factories.create_user(database, "carol", positions=held)
    await factories.create_user(database, "dave", positions={"SPY": ("9", "90.00")})
    file = tmp_path / "positions.csv"
    file.write_text(HEADER + "AAPL,1,10.00\nMSFT,2.5,20.00\nBTC/USD,0.000000001,0.01\n")
    outcome = await admin(database_url, "import-positions", "carol", str(file))
    assert outcome.output == (
        "3 positions imported for user carol: 1 added, 1 changed, 1 unchanged, 0 removed\n"
    )
    assert await positions_of(database, "carol") == {
        "AAPL": (Decimal(1), Decimal("10.00")),
        "MSFT": (Decimal("2.5"), Decimal("20.00")),
        "IBM": (Decimal(3), Decimal("30.00")),
        "BTC/USD": (Decimal("0.000000001"), Decimal("0.01")),
    }
    assert await positions_of(database, "dave") == {"SPY": (Decimal(9), Decimal("90.00"))}


async def test_import_with_replace_leaves_what_the_file_has(
    admin: Admin, database: Database, database_url: str
) -> None:
    held = {"AAPL": ("1", "10.00"), "MSFT": ("2", "20.00")}
    await factories.create_user(database, "carol", positions=held)
    await factories.create_user(database, "dave", positions={"SPY": ("9", "90.00")})
    file = "\ufeffshares,cost_basis,ticker\r\n5,50.00, msft \r\n"
    outcome = await admin(database_url, "import-positions", "carol", "-", "--replace", stdin=file)
    assert outcome.output == (
        "1 position imported for user carol: 0 added, 1 changed, 0 unchanged, 1 removed\n"
    )
    assert await positions_of(database, "carol") == {"MSFT": (Decimal(5), Decimal("50.00"))}
    assert await positions_of(database, "dave") == {"SPY": (Decimal(9), Decimal("90.00"))}


async def test_bad_line_is_named_and_nothing_is_half_imported(
    admin: Admin, database: Database, database_url: str
) -> None:
    await factories.create_user(database, "carol", positions={"AAPL": ("1", "10.00")})
    file = HEADER + "MSFT,5,50\nAAPL,NaN,10\nAAPL,2,20\nMSFT,1,1\n"
    outcome = await admin(database_url, "import-positions", "carol", "-", "--replace", stdin=file)
    assert outcome == (
        1,
        "",
        "admin: - is not imported, nothing was changed:\n"
        "  line 3: shares is 'NaN', must be a plain number such as 1234.50\n"
        "  line 5: ticker MSFT is on line 2 already: make them one position\n",
    )
    assert await positions_of(database, "carol") == {"AAPL": (Decimal(1), Decimal("10.00"))}


async def test_largest_numbers_that_are_accepted_fit_the_table(
    admin: Admin, database: Database, database_url: str
) -> None:
    await factories.create_user(database, "carol")
    largest = ("99999999999.999999999", "999999999999999.99")
    file = HEADER + f"{'X' * 32},{largest[0]},{largest[1]}\n"
    outcome = await admin(database_url, "import-positions", "carol", "-", stdin=file)
    assert outcome.code == 0
    assert await positions_of(database, "carol") == {"X" * 32: (Decimal(largest[0]), Decimal(largest[1]))}
    assert (await admin(database_url, "set-cash", "carol", "-999999999999999.99")).code == 0
    assert (await admin(database_url, "show-user", "carol")).code == 0


async def test_ten_thousand_positions_are_imported_at_once(
    admin: Admin, database: Database, database_url: str
) -> None:
    await factories.create_user(database, "carol")
    file = HEADER + "".join(f"T{n},1.5,2.50\n" for n in range(10_000))
    outcome = await admin(database_url, "import-positions", "carol", "-", stdin=file)
    assert outcome.errors == ""
    assert await database.fetch_value("SELECT count(*) FROM positions") == 10_000


async def test_user_is_shown_with_what_is_known_of_the_positions(
    admin: Admin, database: Database, database_url: str
) -> None:
    held = {"AAPL": ("100", "15000.00"), "BTC/USD": ("0.25", "9000.00"), "OLD": ("0", "5.00")}
    user_id = await factories.create_user(database, "carol", cash="5000.50", positions=held)
    await factories.set_price(database, "AAPL", "175.0000")
    await factories.add_snapshot(database, user_id, datetime(2026, 1, 2, 14, 35, tzinfo=UTC), "1.00")
    outcome = await admin(database_url, "show-user", "carol")
    assert outcome.code == 0
    shown = [line.split() for line in outcome.output.splitlines()]
    assert ["subject", "carol"] in shown
    assert ["active", "yes"] in shown
    assert ["cash", "5000.50"] in shown
    assert "value      22500.50, 1 position without a price left out" in outcome.output.splitlines()
    assert "snapshots  1, the last for 2026-01-02T14:35:00Z" in outcome.output.splitlines()
    assert [line[:5] for line in shown if line[:1] == ["AAPL"]] == [
        ["AAPL", "100", "15000.00", "175.0000", "17500.00"]
    ]
    assert ["BTC/USD", "0.25", "9000.00", "-", "-", "-"] in shown
    assert ["OLD", "0", "5.00", "-", "-", "-"] in shown


async def test_value_from_simulated_prices_is_called_so(
    admin: Admin, database: Database, database_url: str
) -> None:
    await factories.create_user(database, "carol", positions={"AAPL": ("2", "1.00")})
    await factories.set_price(database, "AAPL", "10.0000", feed="simulated")
    outcome = await admin(database_url, "show-user", "carol")
    assert "value      20.00 (simulated prices)" in outcome.output.splitlines()


async def test_users_are_listed_by_subject_up_to_a_limit(
    admin: Admin, database: Database, database_url: str
) -> None:
    assert (await admin(database_url, "list-users")).output == "no users\n"
    await factories.create_user(database, "dave", cash="1", active=False)
    await factories.create_user(database, "carol", cash="2.50", positions={"AAPL": ("1", "1.00")})
    listed = (await admin(database_url, "list-users")).output.splitlines()
    assert [line.split() for line in listed] == [
        ["subject", "active", "cash", "positions"],
        ["carol", "yes", "2.50", "1"],
        ["dave", "no", "1.00", "0"],
    ]
    limited = (await admin(database_url, "list-users", "--limit", "1")).output.splitlines()
    assert limited[-1] == "more than 1 users: say --limit"
    assert len(limited) == 3


async def test_user_is_deactivated_and_activated_again(
    admin: Admin, database: Database, database_url: str
) -> None:
    await factories.create_user(database, "carol")
    assert await admin(database_url, "deactivate-user", "carol") == (0, "user carol is deactivated\n", "")
    assert await database.fetch_value("SELECT is_active FROM users") is False
    assert await admin(database_url, "activate-user", "carol") == (0, "user carol is active\n", "")
    assert await database.fetch_value("SELECT is_active FROM users") is True


async def test_deleted_user_leaves_nothing(admin: Admin, database: Database, database_url: str) -> None:
    for subject in ("carol", "dave"):
        user_id = await factories.create_user(database, subject, positions={"AAPL": ("1", "10.00")})
        for days in range(3):
            await factories.add_snapshot(database, user_id, utc_now() - timedelta(days=days), "1.00")
    await database.fetch(
        """
        INSERT INTO position_snapshots
            (timestamp, user_id, ticker, shares, cost_basis, current_value, price_per_share)
        SELECT timestamp, user_id, 'AAPL', 1, 10, 1, 1 FROM portfolio_snapshots
        """
    )
    for tier in ("30m", "1h", "3h", "1d"):
        await database.fetch(
            f"""
            INSERT INTO portfolio_rollups_{tier}
                (bucket, timestamp, user_id, total_value, cash_balance, investment_value)
            SELECT timestamp, timestamp, user_id, 1, 1, 0 FROM portfolio_snapshots
            """  # noqa: S608
        )
    unconfirmed = await admin(database_url, "delete-user", "carol")
    assert unconfirmed.code == 1
    assert "say --yes" in unconfirmed.errors
    assert await database.fetch_value("SELECT count(*) FROM users") == 2
    assert await admin(database_url, "delete-user", "carol", "--yes") == (0, "user carol deleted\n", "")
    for table, left in {
        "users": 1,
        "positions": 1,
        "portfolio_snapshots": 3,
        "position_snapshots": 3,
        "portfolio_rollups_30m": 3,
        "portfolio_rollups_1h": 3,
        "portfolio_rollups_3h": 3,
        "portfolio_rollups_1d": 3,
    }.items():
        assert await database.fetch_value(f"SELECT count(*) FROM {table}") == left, table  # noqa: S608


async def test_unknown_user_is_said_in_one_line(admin: Admin, database_url: str, tmp_path: Path) -> None:
    file = tmp_path / "positions.csv"
    file.write_text(HEADER + "AAPL,1,1\n")
    for argv in (
        ("set-cash", "nobody", "1"),
        ("import-positions", "nobody", str(file)),
        ("show-user", "nobody"),
        ("activate-user", "nobody"),
        ("deactivate-user", "nobody"),
        ("delete-user", "nobody", "--yes"),
    ):
        outcome = await admin(database_url, *argv)
        assert outcome == (1, "", "admin: there is no user nobody\n"), argv


async def test_database_that_is_away_is_said_in_one_line(
    admin: Admin,
) -> None:
    outcome = await admin("postgresql://someone:hidden@127.0.0.1:9/nothing", "list-users")
    assert outcome.code == 1
    assert outcome.errors.startswith("admin: the database cannot be used: ")
    assert outcome.errors.count("\n") == 1
    assert "hidden" not in outcome.errors


async def test_database_without_the_schema_is_said_in_one_line(
    admin: Admin, database: Database, database_url: str
) -> None:
    await database.fetch("DROP TABLE users CASCADE")
    outcome = await admin(database_url, "create-user", "carol")
    assert outcome.code == 1
    assert outcome.errors.startswith("admin: the database has no schema or an older one: ")
    assert "run `alembic upgrade head`" in outcome.errors
    assert outcome.errors.count("\n") == 1


async def test_file_that_is_not_there_is_said_in_one_line(
    admin: Admin, database_url: str, tmp_path: Path
) -> None:
    for name, reason in {"missing.csv": "No such file or directory", "": "Is a directory"}.items():
        path = str(tmp_path / name)
        outcome = await admin(database_url, "import-positions", "carol", path)
        assert outcome == (1, "", f"admin: {path} cannot be read: {reason}\n")


async def test_endless_input_is_refused(admin: Admin, database_url: str) -> None:
    outcome = await admin(database_url, "import-positions", "carol", "/dev/zero")
    assert outcome.code == 1
    assert "the file is larger than 2000000 bytes" in outcome.errors


async def test_wrong_usage_and_settings_end_with_two(admin: Admin, database_url: str) -> None:
    for argv in (
        (),
        ("bake-cake",),
        ("set-cash", "carol", "1,000.00"),
        ("set-cash", "carol", "1e3"),
        ("create-user", ""),
        ("create-user", "x" * 256),
        ("create-user", "line\nbreak"),
        ("mint-token", "carol", "--hours", "0"),
        ("list-users", "--limit", "-1"),
    ):
        outcome = await admin(database_url, *argv)
        assert (outcome.code, outcome.output) == (2, ""), argv
        assert outcome.errors.splitlines()[-1].startswith("admin"), argv
    outcome = await admin("mysql://somewhere", "list-users")
    assert outcome.code == 2
    assert "DATABASE_URL must be a URL like postgresql://" in outcome.errors


async def test_token_is_alone_on_standard_output_and_needs_no_database() -> None:
    outcome = await admin_process("admin mint-token carol", DATABASE_URL="", JWT_SECRET=SECRET)
    assert (outcome.code, outcome.errors) == (0, "")
    assert len(outcome.output.rstrip("\n").split(".")) == 3
    assert outcome.output.count("\n") == 1


async def test_token_is_refused_when_an_identity_provider_makes_them() -> None:
    outcome = await admin_process("admin mint-token carol", JWT_JWKS_URL="https://login.test/keys")
    assert outcome.code == 1
    assert outcome.errors.startswith("admin: JWT_JWKS_URL is set: ")
    assert outcome.errors.count("\n") == 1


async def test_portfolio_arrives_through_a_pipe(database: Database, database_url: str) -> None:
    outcome = await admin_process(
        "admin create-user carol && printf 'ticker,shares,cost_basis\\nSPY,1,2\\n' | admin import-positions carol -",
        DATABASE_URL=database_url,
    )
    assert (outcome.code, outcome.errors) == (0, "")
    assert await positions_of(database, "carol") == {"SPY": (Decimal(1), Decimal(2))}


async def test_reader_that_leaves_early_gets_no_traceback(database: Database, database_url: str) -> None:
    await factories.create_user(database, "carol")
    assert await admin_process("admin list-users | true", DATABASE_URL=database_url) == (1, "", "")
