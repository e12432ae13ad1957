"""Files to records: each row of a .jsonl, .json, .csv or .parquet file as a mapping, with its place for errors."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from dataset.decode import decode_text, read_bytes
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted

Record = dict[str, Any]


class RawRow(NamedTuple):
    """A row before it is parsed.

    Attributes:
        place: where it is in its file, as errors write it behind the file's name: ":17" or " row 3".
        text: JSON of the row: the line as it stands, or made from what another format holds.
    """

    place: str
    text: str


_DECODER = json.JSONDecoder()
_NOT_BLANK = re.compile(r"\S")
# May spell half of a character, which no tokenizer takes.
_HALF_CHARACTER = re.compile(r"\\u[dD]")
# Lists of mappings that belong to one row, whatever else it holds.
_LISTS_OF_ROWS = {
    "messages", "conversations", "conversation", "tools", "functions", "prompt", "completion", "chosen", "rejected",
    "history", "tool_calls", "objects", "images",
}  # fmt: skip
_FIELDS_OF_ROWS = _LISTS_OF_ROWS | {"instruction", "query", "response", "output", "title", "abstract", "text", "task"}
_FIELDS_OF_ROWS |= {"text_prompt", "prediction", "predict"}
# A row in RFC 4180: cells without a quotation mark, or in quotation marks, each one inside doubled.
_CELL = r'(?:"[^"]*(?:""[^"]*)*"|[^",]*)'
_ROW = re.compile(rf"{_CELL}(?:,{_CELL})*\n?")
_QUOTES = "put the cell into quotation marks and double those inside it, or save the file again from a spreadsheet"
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """("file:line" or "file row N", mapping) of each row of a .jsonl, .json, .csv or .parquet file.

    JSON may hold one row per line, rows over several lines, one list of rows, or one list under a name
    ({"version": 1, "data": [...]}).

    Raises:
        UserError: missing or empty file, undecodable bytes, invalid JSON or CSV, a row that is not a mapping.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"{path}: no reader for {suffix or 'files without a suffix'}",
                        f"convert it to one of {', '.join(_SUFFIXES)}")  # fmt: skip
    rows: Iterator[tuple[str, Any]]
    if suffix == ".parquet":
        rows = _read_parquet(path)
    elif suffix == ".csv":
        rows = read_csv(decode_text(read_bytes(path), str(path)), str(path))
    else:
        text = decode_text(read_bytes(path), str(path))
        lines = text.split("\n")
        first = next(line for line in lines if line.strip())
        try:
            json.loads(first)
            row_per_line = first.strip() != text.strip()
        except (ValueError, RecursionError):
            row_per_line = False
        places = ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip())
        rows = ((place, load_json(line, place)) for place, line in places) if row_per_line else _json_values(text, path)
    for where, record in rows:
        if not isinstance(record, dict):
            raise UserError(f"{where}: the row is a {type(record).__name__}, not a mapping of fields",
                            'write rows like {"field": "value"}')  # fmt: skip
        yield where, record


def read_raw_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a file that `read_records` knows, not parsed where each is a line; a few of them in memory at once.

    Raises:
        UserError: missing or empty file, undecodable bytes, invalid CSV, or invalid JSON of rows over several lines.
    """
    for where, record in read_records(path):
        yield RawRow(where.removeprefix(str(path)), json.dumps(record, ensure_ascii=False, default=str))


def load_record(text: str, where: str) -> Record:
    """The fields of a row of `read_raw_rows`.

    Raises:
        UserError: what `load_json` raises, or the row is not a mapping; names `where`, the row's file and place.
    """
    record = load_json(text, where)
    if not isinstance(record, dict):
        raise UserError(f"{where}: the row is a {type(record).__name__}, not a mapping of fields",
                        'write rows like {"field": "value"}')  # fmt: skip
    return record


def load_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        UserError: invalid JSON, half a character, or a value that Python cannot hold; names `where` and the line.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) and error.lineno > 1 else ""
        raise _invalid_json(error, f"{where}{line}") from error
    if _HALF_CHARACTER.search(text):
        _refuse_half_characters(value, where)
    return value


def _invalid_json(error: ValueError | RecursionError, where: str) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{where}: invalid JSON, column {error.colno}: {error.msg}",
                         "correct that line, or write the file with json.dumps")  # fmt: skip
    # A number of thousands of digits; lists in lists in lists.
    return UserError(f"{where}: JSON that cannot be read: {error}", "write rows of fields and texts")


def _refuse_half_characters(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a \\ud… escape spells half of a character (a lone surrogate)",
                        "remove it, or write both halves") from error  # fmt: skip


def _json_values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of JSON values one after the other, each of which may span several lines."""
    end, line, is_only_value = 0, 1, True
    found = _NOT_BLANK.search(text)
    while found is not None:
        line += text.count("\n", end, found.start())
        where = f"{path}:{line}"
        try:
            value, stop = _DECODER.raw_decode(text, found.start())
        except (ValueError, RecursionError) as error:
            place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else where
            raise _invalid_json(error, place) from error
        if _HALF_CHARACTER.search(text, found.start(), stop):
            _refuse_half_characters(value, where)
        line += text.count("\n", found.start(), stop)
        end, found = stop, _NOT_BLANK.search(text, stop)
        if is_only_value and found is None:
            yield from _unwrap(value, where, path)
        else:
            yield where, value
        is_only_value = False


def _unwrap(value: Any, where: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file's only value: itself, the items of a list, or those of the list under one of its names."""
    rows = value if isinstance(value, list) else None
    if isinstance(value, dict) and not _FIELDS_OF_ROWS & value.keys():
        lists = {
            name: held
            for name, held in value.items()
            if isinstance(held, list) and held and all(isinstance(row, dict) for row in held)
        }
        if len(lists) > 1:
            raise UserError(
                f"{path}: several lists of rows in one file: {', '.join(lists)}",
                "put each into a file of its own, and name those to train on and to evaluate on",
            )
        rows = next(iter(lists.values()), None)
    if rows is None:
        yield where, value
        return
    for index, row in enumerate(rows):
        yield f"{path} row {index}", row


def read_csv(text: str, path: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """("file:line", fields) of each row that is not blank; the line is the row's first.

    Args:
        text: of the file; its line ends are "\\n".
        path: of the file, for errors.
        columns: names of the columns of a file whose first line is a row; by default, the first line names them.

    Raises:
        UserError: a line with another number of cells than there are columns, a quotation mark inside a cell, a cell
            that is not closed, or a name that two columns have.
    """
    names = list(columns)
    for where, cells in _read_cells(text, path):
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


def _read_cells(text: str, path: str) -> Iterator[tuple[str, list[str]]]:
    """("file:line", cells) of each row that is not blank."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole book; the default ends at 128 KiB
    lines = text.split("\n")
    reader = csv.reader((line + "\n" for line in lines), strict=True)
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
        row = "\n".join(lines[start : reader.line_num])
        if '"' in row and not _ROW.fullmatch(row):
            raise UserError(f"{where}: a quotation mark inside a cell", _QUOTES)
        if "".join(cells).strip():
            yield where, cells


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file() or not path.stat().st_size:
        read_bytes(path)  # raises, with the reason
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for number, record in enumerate(record for batch in batches for record in batch.to_pylist()):
            yield f"{path} row {number}", {name: without_nulls(value) for name, value in record.items()}
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {error}", "write the file again") from error


def without_nulls(value: Any) -> Any:
    """A value without the nested fields that it has only because the format gives all rows of a column the same."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value
