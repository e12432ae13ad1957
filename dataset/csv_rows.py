"""CSV files to rows, strictly: a line that could be read in two ways is an error, never a guess."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence

from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted

# A line in RFC 4180: cells without a quotation mark, or in quotation marks, each one inside doubled.
_CELL = r'(?:"[^"]*(?:""[^"]*)*"|[^",]*)'
_LINE = re.compile(rf"{_CELL}(?:,{_CELL})*\n?")
_QUOTES = "put the cell into quotation marks and double those inside it, or save the file again from a spreadsheet"


def read_csv(text: str, path: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """("file:line", fields) of each row that is not blank; the line is that on which the row begins.

    Args:
        text: of the file; its line ends are "\\n".
        path: of the file, for errors.
        columns: names of the columns of a file whose first line is a row; by default, the first line names them.

    Raises:
        UserError: a line with another number of cells than there are columns, a quotation mark inside a cell, a cell
            that is not closed, or a name that two columns have.
    """
    names = list(columns)
    for line, cells in _lines(text, path):
        if not "".join(cells).strip():
            continue
        where = f"{path}:{line}"
        if not names:
            names = cells
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{where}: two columns have the name {twice!r}", "give each column a name of its own")
            continue
        if len(cells) != len(names):
            lacking = f": {names[len(cells)]} is missing" if len(cells) < len(names) else ""
            told = f"{counted(len(cells), 'cell')} for {counted(len(names), 'column')} ({', '.join(names)})"
            raise UserError(
                f"{where}: {told}{lacking}",
                "put cells with commas into quotation marks, and write every column, as ,, where it is empty",
            )
        unnamed = next((cell for name, cell in zip(names, cells, strict=True) if not name and cell.strip()), None)
        if unnamed is not None:
            raise UserError(f"{where}: the cell {unnamed[:20]!r} stands in a column without a name",
                            "name the column in the first line")  # fmt: skip
        yield where, {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _lines(text: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line of each row, and its cells."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole book; the default ends at 128 KiB
    read: list[str] = []

    def lines() -> Iterator[str]:
        for line in text.split("\n"):
            read.append(line)
            yield line + "\n"

    reader = csv.reader(lines(), strict=True)
    begin = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            end = reader.line_num
            lines_told = f"{path}:{begin}" if end == begin else f"{path}:{begin} to line {end}"
            raise UserError(
                f"{lines_told}: a quotation mark inside a cell, or one that is not closed", _QUOTES
            ) from error
        if cells is None:
            return
        if any('"' in line for line in read) and not _LINE.fullmatch("\n".join(read)):
            raise UserError(f"{path}:{begin}: a quotation mark inside a cell", _QUOTES)
        yield begin, cells
        begin = reader.line_num + 1
        read.clear()
