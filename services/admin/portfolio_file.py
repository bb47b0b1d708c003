"""Positions from a CSV file: all of them, or every problem with its line. Pure: bytes in, positions out."""

import csv
import io
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

from services.admin.amounts import COST_BASIS, SHARES, amount, shown

FILE_BYTES_MAX = 2_000_000
POSITIONS_MAX = 10_000
COLUMNS = ("ticker", "shares", "cost_basis")
_TICKER = re.compile(r"[!-~]{1,32}", re.ASCII)


class Position(NamedTuple):
    ticker: str
    shares: Decimal
    cost_basis: Decimal


class PortfolioFileError(Exception):
    """The file cannot be imported; `problems` has one line for a person for each thing wrong with it."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _Record(NamedTuple):
    line: int
    values: list[str]


def positions_of(content: bytes) -> list[Position]:
    """Return the positions in the order of the file; raises PortfolioFileError with every problem there is.

    The columns `ticker`, `shares` and `cost_basis` (total paid, US dollars) come in any order, named by the
    first line. A byte order mark, CRLF line ends, spaces around values and blank lines are tolerated.
    """
    if len(content) > FILE_BYTES_MAX:
        raise PortfolioFileError(f"the file is larger than {FILE_BYTES_MAX} bytes")
    problems: list[str] = []
    records = _records(_text(content), problems)
    header = next(records, None)
    if header is None:
        raise PortfolioFileError(*problems or ["the file is empty"])
    columns = _columns(header)

    positions: list[Position] = []
    line_of: dict[str, int] = {}
    for count, record in enumerate(records, start=1):
        if count > POSITIONS_MAX:
            problems.append(f"line {record.line}: at most {POSITIONS_MAX} positions can be imported at once")
            break
        position = _position(record, columns, problems)
        if position is None:
            continue
        if position.ticker in line_of:
            first = line_of[position.ticker]
            problems.append(
                f"line {record.line}: ticker {position.ticker} is on line {first} already: make them one position"
            )
            continue
        line_of[position.ticker] = record.line
        positions.append(position)
    if problems:
        raise PortfolioFileError(*problems)
    if not positions:
        raise PortfolioFileError("the file has a header but no positions")
    return positions


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PortfolioFileError(f"line {line}: not UTF-8 text: save the file as CSV in UTF-8") from None


def _records(text: str, problems: list[str]) -> Iterator[_Record]:
    """Yield the records that are not blank, each with the line it starts on; text that is no CSV is a problem."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for values in reader:
            if any(value.strip() for value in values):
                yield _Record(line, values)
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "a quotation mark is not closed" if "end of data" in str(error) else str(error)
        problems.append(
            f"line {line}: cannot be read as CSV ({reason}); the lines after it were not looked at"
        )


def _columns(header: _Record) -> dict[str, int]:
    """Return where each column is."""
    names = [value.strip().lower() for value in header.values]
    where = f"line {header.line}"
    needed = f"the first line must name the columns {', '.join(COLUMNS)}"
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise PortfolioFileError(f"{where}: columns must be separated by commas ({needed})")
    missing = [name for name in COLUMNS if name not in names]
    if len(missing) == len(COLUMNS):
        raise PortfolioFileError(f"{where}: there is no header: {needed}")
    problems = [f"{where}: column {name} is missing: {needed}" for name in missing]
    problems += [f"{where}: column {shown(n)} is not known: {needed}" for n in names if n not in COLUMNS]
    problems += [f"{where}: column {name} is there twice" for name in COLUMNS if names.count(name) > 1]
    if problems:
        raise PortfolioFileError(*problems)
    return {name: names.index(name) for name in COLUMNS}


def _position(record: _Record, columns: dict[str, int], problems: list[str]) -> Position | None:
    """Return the record's position, or None after adding its problems."""
    where = f"line {record.line}"
    if len(record.values) != len(columns):
        hint = " (a number must have no thousands separators)" if len(record.values) > len(columns) else ""
        problems.append(f"{where}: has {len(record.values)} values, the header has {len(columns)}{hint}")
        return None
    found = len(problems)
    ticker = record.values[columns["ticker"]].strip()
    if not _TICKER.fullmatch(ticker):
        reason = (
            f"is {shown(ticker)}, must be 1 to 32 ASCII letters, digits and signs, without spaces"
            if ticker
            else "is empty"
        )
        problems.append(f"{where}: ticker {reason}")
    numbers: dict[str, Decimal] = {}
    for name, column in (("shares", SHARES), ("cost_basis", COST_BASIS)):
        try:
            numbers[name] = amount(record.values[columns[name]], column)
        except ValueError as error:
            problems.append(f"{where}: {name} {error}")
    if len(problems) > found:
        return None
    return Position(ticker.upper(), numbers["shares"], numbers["cost_basis"])
