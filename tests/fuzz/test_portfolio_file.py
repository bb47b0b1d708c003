"""Imported files and typed amounts: all of a file or nothing, exactly as written, and a refusal says where."""

import asyncio
import csv
import io
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.admin.__main__ import main
from services.admin.amounts import CASH, COST_BASIS, SHARES, Column, amount
from services.admin.portfolio_file import FILE_BYTES_MAX, PortfolioFileError, Position, positions_of
from shared.database import Database
from tests.factories import create_user
from tests.fuzz.strategies import TEXTS
from tests.fuzz.trying import examples, try_each

_AMOUNTS = "0 00 +1 -1 1. .5 . + 1e2 1E400 NaN inf -inf 1_000 1,5 1'000 (5) 0x10 ١٢ ½ ² $1 1/2 --1 \u22121"
AMOUNTS = st.one_of(
    st.sampled_from(_AMOUNTS.split()),
    st.decimals().map(str),
    st.integers(0, 10**40).map(str),
    st.integers(15, 20).map(lambda digits: "9" * digits),
    st.integers(0, 30).map(lambda places: "0." + "0" * places + "1"),
    st.just("9" * 100_000),
    TEXTS,
)
TICKERS = st.one_of(
    st.sampled_from(["AAPL", "aapl", "BRK.B", "BTC/USD", "=cmd()", '"', ",", "A B", ""]), TEXTS
)
RIGHT_ROWS = st.dictionaries(
    st.from_regex(r"[A-Z0-9./-]{1,32}", fullmatch=True),
    st.tuples(
        st.decimals(0, Decimal("99999999999.999999999"), places=9),
        st.decimals(0, Decimal("999999999999999.99"), places=2),
    ),
    min_size=1,
    max_size=8,
)


def table(rows: list[list[str]], line_end: str = "\n") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=line_end).writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Return a file that has something of a portfolio."""
    header = draw(st.sampled_from([["ticker", "shares", "cost_basis"], ["Shares ", "TICKER", " cost_basis"]]))
    rows = draw(st.lists(st.tuples(TICKERS, AMOUNTS, AMOUNTS).map(list), max_size=8))
    if draw(st.booleans()):
        rows.append(draw(st.lists(TEXTS, max_size=6)))
    content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + table(
        [header, *rows], draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    )
    place = draw(st.integers(0, len(content)))
    noise = draw(st.sampled_from([b"", b"", b"\x00", b'"', b"\xff", b"\r", b"\n", b",", b"\xe2\x80\xa8"]))
    return content[:place] + noise + content[place:]


def read(content: bytes) -> tuple[list[Position], tuple[str, ...]]:
    try:
        return positions_of(content), ()
    except PortfolioFileError as error:
        return [], error.problems


@examples(150)
@given(st.one_of(contents(), st.binary(max_size=300)))
def test_any_file_is_read_within_the_tables_bounds_or_refused_with_its_lines(content: bytes) -> None:
    lines = len(re.split(rb"\r\n|\r|\n", content))
    positions, problems = read(content)
    assert bool(positions) != bool(problems)
    for problem in problems:
        assert problem.isprintable(), problem
        numbers = [int(number) for number in re.findall(r"\bline ([0-9]+)\b", problem)]
        assert numbers or problem in ("the file is empty", "the file has a header but no positions")
        assert all(1 <= number <= lines for number in numbers), (problem, lines)
    assert len({position.ticker for position in positions}) == len(positions)
    for ticker, shares, cost_basis in positions:
        assert re.fullmatch(r"[!-~]{1,32}", ticker)
        assert 0 <= shares < 10**11
        assert 0 <= cost_basis < 10**15
        assert shares == round(shares, 9)
        assert cost_basis == round(cost_basis, 2)


@examples(200)
@given(AMOUNTS, st.sampled_from([SHARES, COST_BASIS, CASH]))
def test_an_amount_is_exactly_what_was_typed_or_refused(text: str, column: Column) -> None:
    try:
        value = amount(text, column)
    except ValueError as error:
        said = str(error)
        assert said.isprintable(), said
        assert len(said) < 300, said
        return
    assert value == Decimal(text.strip())
    assert abs(value) < 10**column.whole_digits_max
    assert value == round(value, column.places_max)
    assert column.negative or value >= 0


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("\n" * 1_900_000, "the file has a header but no positions"),
        ("A,1,1\n" * 100_000, "line 3: ticker A is on line 2 already: make them one position"),
        ("x\n" * 100_000, "line 2: has 1 values, the header has 3"),
        (f'"{"A" * 131_073}",1,1\n', "line 2: cannot be read as CSV (field larger than field limit"),
        ("A,1,1\n" * (FILE_BYTES_MAX // 6), f"the file is larger than {FILE_BYTES_MAX} bytes"),
    ],
)
def test_a_large_file_is_refused_at_once(body: str, problem: str) -> None:
    with pytest.raises(PortfolioFileError) as refused:
        positions_of(f"ticker,shares,cost_basis\n{body}".encode())
    assert refused.value.problems[0].startswith(problem)
    assert len(refused.value.problems) <= 10_001


async def test_all_of_a_file_is_stored_or_nothing(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    user_id = await create_user(database, positions={"KEPT": ("1", "2")})
    path = tmp_path / "positions.csv"

    async def stored() -> dict[str, tuple[Decimal, Decimal]]:
        rows = await database.fetch(
            "SELECT ticker, shares, cost_basis FROM positions WHERE user_id = $1", user_id
        )
        return {row["ticker"]: (row["shares"], row["cost_basis"]) for row in rows}

    async def check(
        right: dict[str, tuple[Decimal, Decimal]], wrong: list[str] | None, line_end: str
    ) -> None:
        before = await stored()
        rows = [[ticker, f"{shares:f}", f"{cost:f}"] for ticker, (shares, cost) in right.items()]
        path.write_bytes(
            table([["ticker", "shares", "cost_basis"], *rows, *([wrong] if wrong else [])], line_end)
        )
        code = await asyncio.to_thread(main, ["import-positions", "demo", str(path), "--replace"])
        assert code == (1 if wrong else 0)
        assert await stored() == (before if wrong else right)

    wrong_rows = st.sampled_from(
        [
            ["A", "1"],
            ["A", "1e5", "1"],
            ["", "1", "1"],
            ["A", "1", "-1"],
            ["A", "9" * 12, "1"],
            ["A", "NaN", "1"],
        ]
    )
    await try_each(
        check, RIGHT_ROWS, st.one_of(st.none(), wrong_rows), st.sampled_from(["\n", "\r\n"]), count=15
    )
