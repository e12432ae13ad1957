"""Files to records: each row of a .jsonl, .json, .csv or .parquet file as a mapping, with its place for errors. Memory
holds a few rows at a time, however large the file is."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from dataset.csv_rows import read_csv
from dataset.decode import read_bytes
from dataset.json_values import invalid_json, read_json_values, unreadable_json
from dataset.text_files import TextFile, open_text
from novelgpt.settings.errors import UserError

Record = dict[str, Any]


class RawRow(NamedTuple):
    """A row before it is parsed.

    Attributes:
        place: where it is in its file, as errors write it behind the file's name: ":17" or " row 3".
        text: JSON of the row: the line as it stands, or made from what another format holds.
        file: index of the file among those of its source.
    """

    place: str
    text: str
    file: int = 0


# May spell half of a character, which no tokenizer takes.
_HALF_CHARACTER = re.compile(r"\\u[dD]")
# A date, say, is no text: where a text is needed, what stands for it is refused as it is itself.
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=lambda value: {type(value).__name__: str(value)})
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """("file:line" or "file row N", mapping) of each row of a .jsonl, .json, .csv or .parquet file.

    JSON may hold one row per line, rows over several lines, one list of rows, or one list under a name
    ({"version": 1, "data": [...]}).

    Raises:
        UserError: missing or empty file, undecodable bytes, invalid JSON or CSV, a row that is not a mapping. What is
            wrong with the bytes is said before the first row comes.
    """
    suffix = _known_suffix(path)
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix == ".csv":
        yield from read_csv(open_text(path).lines(), str(path))
    else:
        for place, text, _ in _read_json(path):
            yield f"{path}{place}", load_record(text, f"{path}{place}")


def read_raw_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a file that `read_records` knows; where each is a line of JSON, none of them is parsed.

    Raises:
        UserError: what `read_records` raises, but for what is wrong with a row alone, which `load_record` raises.
    """
    if _known_suffix(path) in (".jsonl", ".json"):
        return _read_json(path)
    return (RawRow(where.removeprefix(str(path)), _as_json(record)) for where, record in read_records(path))


def load_record(text: str, where: str) -> Record:
    """The fields of a row of `read_raw_rows`.

    Raises:
        UserError: what `load_json` raises, or the row is not a mapping; names `where`, the row's file and place.
    """
    record = load_json(text, where)
    if not isinstance(record, dict):
        raise not_a_mapping(record, where)
    return record


def not_a_mapping(value: Any, where: str) -> UserError:
    """The error of a row that is another JSON value."""
    return UserError(
        f"{where}: the row is a {type(value).__name__}, not a mapping of fields", 'write rows like {"field": "value"}'
    )


def load_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        UserError: invalid JSON, half a character, or a value that Python cannot hold; names `where` and the line.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        raise invalid_json(f"{where}{line}", error.colno, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise unreadable_json(where, error) from error
    if _HALF_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: a \\ud… escape spells half of a character (a lone surrogate)",
                            "remove it, or write both halves") from error  # fmt: skip
    return value


def _as_json(record: Record) -> str:
    name = record.get("id")
    if not isinstance(name, (str, int, float, list, dict, type(None))):
        record = record | {"id": str(name)}
    return _ENCODER.encode(record)


def _known_suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"{path}: no reader for {suffix or 'files without a suffix'}",
                        f"convert it to one of {', '.join(_SUFFIXES)}")  # fmt: skip
    return suffix


def _read_json(path: Path) -> Iterator[RawRow]:
    text = open_text(path)
    if not _is_row_per_line(text):
        yield from itertools.starmap(RawRow, read_json_values(text))
        return
    for number, line in enumerate(text.lines(), start=1):
        if line and not line.isspace():
            yield RawRow(f":{number}", line)


def _is_row_per_line(text: TextFile) -> bool:
    """Whether the first line that is not blank is JSON and not all of the text, which is not held to find that out."""
    is_begun = is_ended = False
    for block in text.blocks():
        if not is_begun:
            block = block.lstrip()
            is_begun = bool(block)
        if not is_ended:
            _, line_end, block = block.partition("\n")
            is_ended = bool(line_end)
        if is_ended and block and not block.isspace():
            break
    else:
        return False
    try:
        json.loads(next(filter(str.strip, text.lines())))
    except (ValueError, RecursionError):
        return False
    return True


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file() or not path.stat().st_size:
        read_bytes(path)  # raises, with the reason
    try:
        # Mapped, as private memory would hold the compressed values of a whole group of rows.
        batches = pyarrow.parquet.ParquetFile(path, memory_map=True).iter_batches(batch_size=1024)
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
