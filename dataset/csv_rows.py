"""Rows of a .csv file as RFC 4180 has them; a line that could be read in two ways is an error."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence

from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted

# A row in RFC 4180: cells without a quotation mark, or in quotation marks, each one inside doubled.
_CELL = r'(?:"[^"]*(?:""[^"]*)*"|[^",]*)'
_ROW = re.compile(rf"{_CELL}(?:,{_CELL})*\n?")
_QUOTES = "put the cell into quotation marks and double those inside it, or save the file again from a spreadsheet"


def read_csv(lines: Iterable[str], path: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """("file:line", fields) of each row that is not blank; the line is the row's first.

    Args:
        lines: of the file, without their ends.
        path: of the file, for errors.
        columns: names of the columns of a file whose first line is a row; by default, the first line names them.

    Raises:
        UserError: a line with another number of cells than there are columns, a quotation mark inside a cell, a cell
            that is not closed, or a name that two columns have.
    """
    names = list(columns)
    for where, cells in _read_cells(lines, path):
        if not names:
            names = cells
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{where}: two columns have the name {twice!r}", "give each column a name of its own")
            continue
        if len(cells) != len(names):
            lacking = f": {names[len(cells)]} is missing" if len(cells) < len(names) else ""
            found = f"{counted(len(cells), 'cell')} for {counted(len(names), 'column')} ({', '.join(names)})"
            raise UserError(
                f"{where}: {found}{lacking}",
                "put cells with commas into quotation marks, and write every column, as ,, where it is empty",
            )
        pairs = list(zip(names, cells, strict=True))
        unnamed = next((cell for name, cell in pairs if not name and cell.strip()), None)
        if unnamed is not None:
            raise UserError(f"{where}: the cell {unnamed[:20]!r} is in a column without a name",
                            "name the column in the first line")  # fmt: skip
        yield where, {name: cell for name, cell in pairs if name}


def _read_cells(lines: Iterable[str], path: str) -> Iterator[tuple[str, list[str]]]:
    """("file:line", cells) of each row that is not blank."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole book; the default ends at 128 KiB
    row: list[str] = []  # its lines

    def noted() -> Iterator[str]:
        for line in lines:
            row.append(line)
            yield line + "\n"

    reader = csv.reader(noted(), strict=True)
    while True:
        start = reader.line_num
        where = f"{path}:{start + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            until = "" if reader.line_num == start + 1 else f" to line {reader.line_num}"
            raise UserError(
                f"{where}{until}: a quotation mark inside a cell, or one that is not closed", _QUOTES
            ) from error
        if cells is None:
            return
        text = "\n".join(row)
        row.clear()
        if '"' in text and not _ROW.fullmatch(text):
            raise UserError(f"{where}: a quotation mark inside a cell", _QUOTES)
        if "".join(cells).strip():
            yield where, cells
