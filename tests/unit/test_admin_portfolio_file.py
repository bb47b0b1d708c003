"""Positions from CSV: all of them, or every problem with its line."""

import csv
import io
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.admin.portfolio_file import (
    FILE_BYTES_MAX,
    POSITIONS_MAX,
    PortfolioFileError,
    Position,
    positions_of,
)

HEADER = "ticker,shares,cost_basis\n"


def problems_of(content: str | bytes) -> list[str]:
    with pytest.raises(PortfolioFileError) as refused:
        positions_of(content.encode() if isinstance(content, str) else content)
    return list(refused.value.problems)


AAPL = Position("AAPL", Decimal(100), Decimal(15000))
BRK_B = Position("BRK.B", Decimal("2.5"), Decimal("1000.25"))


@pytest.mark.parametrize(
    "content",
    [
        "ticker,shares,cost_basis\nAAPL,100,15000.00\nBRK.B,2.5,1000.25\n",
        "ticker,shares,cost_basis\nAAPL,100,15000.00\nBRK.B,2.5,1000.25",
        "\ufeffticker,shares,cost_basis\r\nAAPL,100,15000.00\r\nBRK.B,2.5,1000.25\r\n",
        "ticker,shares,cost_basis\rAAPL,100,15000.00\rBRK.B,2.5,1000.25\r",
        "cost_basis,ticker,shares\n15000.00,AAPL,100\n1000.25,BRK.B,2.5\n",
        " Ticker , SHARES,cost_basis \n aapl ,100 , 15000.00\nbrk.b,2.5,1000.25\n",
        '"ticker","shares","cost_basis"\n"AAPL","100","15000.00"\n"BRK.B","2.5","1000.25"\n',
        "\nticker,shares,cost_basis\n\nAAPL,100,15000.00\n,,\n  \nBRK.B,2.5,1000.25\n\n",
    ],
    ids=[
        "plain",
        "no-last-newline",
        "bom-crlf",
        "cr",
        "other-order",
        "spaces-and-case",
        "quoted",
        "blank-lines",
    ],
)
def test_positions_are_read_however_the_file_is_laid_out(content: str) -> None:
    assert positions_of(content.encode()) == [AAPL, BRK_B]


def test_every_bad_line_is_named_with_column_and_reason() -> None:
    content = (
        HEADER
        + "AAPL,ten,15000\n"  # 2
        + "MSFT,5,100.00\n"  # 3: good
        + ",5,1.005\n"  # 4: two problems
        + "IBM,1,234.50,100\n"  # 5
        + "SPY,3\n"  # 6
        + "BTC USD,1,1\n"  # 7
    )
    assert problems_of(content) == [
        "line 2: shares is 'ten', must be a plain number such as 1234.50",
        "line 4: ticker is empty",
        "line 4: cost_basis is '1.005', too fine: at most 2 decimals",
        "line 5: has 4 values, the header has 3 (a number must have no thousands separators)",
        "line 6: has 2 values, the header has 3",
        "line 7: ticker is 'BTC USD', must be 1 to 32 ASCII letters, digits and signs, without spaces",
    ]


def test_duplicate_ticker_is_named_with_both_lines() -> None:
    assert problems_of(HEADER + "AAPL,1,1\nMSFT,1,1\n aapl,2,2\n") == [
        "line 4: ticker AAPL is on line 2 already: make them one position"
    ]


def test_line_numbers_count_lines_of_the_file_not_records() -> None:
    assert problems_of('\n\nticker,shares,cost_basis\n"A\nB",1,1\n\nMSFT,x,1\n') == [
        "line 4: ticker is 'A\\nB', must be 1 to 32 ASCII letters, digits and signs, without spaces",
        "line 7: shares is 'x', must be a plain number such as 1234.50",
    ]


def test_letter_whose_upper_case_is_ascii_is_no_ticker() -> None:
    assert problems_of(HEADER + "ßpy,1,1\n") == [
        "line 2: ticker is '\\xdfpy', must be 1 to 32 ASCII letters, digits and signs, without spaces"
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        (HEADER, "the file has a header but no positions"),
        ("AAPL,100,15000\n", "line 1: there is no header: the first line must name"),
        ("ticker;shares;cost_basis\nAAPL;1;1\n", "line 1: columns must be separated by commas"),
        ("ticker\tshares\tcost_basis\n", "line 1: columns must be separated by commas"),
        ("ticker,shares\nAAPL,1\n", "line 1: column cost_basis is missing"),
        ("ticker,shares,cost_basis,note\n", "line 1: column 'note' is not known"),
        ("ticker,shares,cost_basis,shares\n", "line 1: column shares is there twice"),
        (HEADER + '"AAPL,1,1\nMSFT,1,1\n', "line 2: cannot be read as CSV (a quotation mark is not closed)"),
        (HEADER + "A" * 200_000 + ",1,1\n", "line 2: cannot be read as CSV"),
    ],
)
def test_file_that_is_no_portfolio_is_refused_in_words(content: str, problem: str) -> None:
    problems = problems_of(content)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_text_that_is_not_utf8_is_refused_with_its_line(encoding: str) -> None:
    content = (HEADER + "ÄAPL,1,1\n").encode(encoding)
    line = 1 if encoding == "utf-16" else 2
    assert problems_of(content) == [f"line {line}: not UTF-8 text: save the file as CSV in UTF-8"]


def test_size_and_number_of_positions_are_bounded() -> None:
    largest = HEADER + "".join(f"T{n},1,1\n" for n in range(POSITIONS_MAX))
    assert len(positions_of(largest.encode())) == POSITIONS_MAX
    assert problems_of(largest + "X,1,1\n") == ["line 10002: at most 10000 positions can be imported at once"]
    assert problems_of(b"x" * (FILE_BYTES_MAX + 1)) == ["the file is larger than 2000000 bytes"]


tickers = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789./-,\"'", min_size=1, max_size=32)
shares = st.decimals(min_value=0, max_value=Decimal("99999999999.999999999"), places=9)
costs = st.decimals(min_value=0, max_value=Decimal("999999999999999.99"), places=2)


@given(
    st.lists(
        st.builds(Position, tickers, shares, costs), min_size=1, max_size=20, unique_by=lambda p: p.ticker
    ),
    st.permutations(["ticker", "shares", "cost_basis"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_a_csv_writer_wrote_is_read_back_exactly(
    positions: list[Position], columns: list[str], line_end: str
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=line_end)
    writer.writerow(columns)
    for position in positions:
        cells = {"ticker": position.ticker}
        cells |= {"shares": f"{position.shares:f}", "cost_basis": f"{position.cost_basis:f}"}
        writer.writerow([cells[name] for name in columns])
    assert positions_of(text.getvalue().encode()) == positions


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_and_nothing_else(tail: bytes) -> None:
    positions: list[Position] = []
    problems: tuple[str, ...] = ()
    try:
        positions = positions_of(HEADER.encode() + tail)
    except PortfolioFileError as refused:
        problems = refused.problems
    assert bool(positions) != bool(problems)
