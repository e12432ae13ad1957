"""Files to records: each row of a .jsonl, .json, .csv or .parquet file as a mapping, with its place for errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dataset.csv_rows import read_csv
from dataset.decode import decode_text, read_bytes
from novelgpt.settings.errors import UserError

Record = dict[str, Any]

_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"\s*")
# Lists of mappings that belong to one row, whatever else it holds.
_LISTS_OF_ROWS = {
    "messages", "conversations", "conversation", "tools", "functions", "prompt", "completion", "chosen", "rejected",
    "history", "tool_calls", "objects", "images",
}  # fmt: skip
_FIELDS_OF_ROWS = _LISTS_OF_ROWS | {"instruction", "query", "response", "output", "title", "abstract", "text", "task"}
_FIELDS_OF_ROWS |= {"text_prompt", "prediction", "predict"}


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """("file:line" or "file row N", mapping) of each row of a .jsonl, .json, .csv or .parquet file.

    JSON may stand a row a line, a row over several lines, in one list, or in one list under a name
    ({"version": 1, "data": [...]}).

    Raises:
        UserError: missing or empty file, undecodable bytes, invalid JSON or CSV, a row that is no mapping.
    """
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    if suffix not in readers:
        raise UserError(f"{path}: no reader for {suffix or 'files without a suffix'}",
                        f"convert it to one of {', '.join(readers)}")  # fmt: skip
    for where, record in readers[suffix](path):
        if not isinstance(record, dict):
            raise UserError(f"{where}: the row is a {type(record).__name__}, not a mapping of fields",
                            'write rows like {"field": "value"}')  # fmt: skip
        yield where, record


def load_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        UserError: invalid JSON, half a character, or what Python cannot hold; names `where` and the line.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # may spell half of a character, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a \\ud… escape spells half of a character (a lone surrogate)",
                        "remove it, or write both halves") from error  # fmt: skip
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        raise _invalid(f"{where}{line}", error) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise UserError(f"{where}: JSON that cannot be read: {error}", "write rows of fields and texts") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    text = decode_text(read_bytes(path), str(path))
    place = _after_blanks(text, 0)
    first = text[place:].partition("\n")[0]
    if not _is_json(first) or _after_blanks(text, place + len(first)) == len(text):
        yield from _json_values(text, path)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", load_json(line, f"{path}:{number}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    text = decode_text(read_bytes(path), str(path))
    if not text.lstrip().startswith("["):
        # JSON lines under the name .json are common.
        yield from _json_lines(path)
        return
    for index, record in enumerate(load_json(text, str(path))):
        yield f"{path} row {index}", record


def _json_values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Values one after the other, each of which may go over several lines."""
    begin, place, line = 0, _after_blanks(text, 0), 1
    while place < len(text):
        line += text.count("\n", begin, place)
        begin = place
        try:
            value, end = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise _invalid(f"{path}:{error.lineno}", error) from error
        except (ValueError, RecursionError):
            end = len(text)
        value = load_json(text[place:end], f"{path}:{line}")
        first, place = place, _after_blanks(text, end)
        if place == len(text) and not text[:first].strip():
            yield from _unwrapped(value, f"{path}:{line}", path)
        else:
            yield f"{path}:{line}", value


def _unwrapped(value: Any, where: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file's only value: itself, the items of a list, or those of the list under one of its names."""
    rows = value if isinstance(value, list) else None
    if isinstance(value, dict) and not _FIELDS_OF_ROWS & value.keys():
        lists = {name: held for name, held in value.items() if isinstance(held, list) and _all_mappings(held)}
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


def _after_blanks(text: str, place: int) -> int:
    """Where what is no blank begins, from `place` on."""
    blanks = _BLANKS.match(text, place)
    assert blanks is not None
    return blanks.end()


def _all_mappings(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _invalid(where: str, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{where}: invalid JSON, column {error.colno}: {error.msg}",
                     "mend that line, or write the file with json.dumps")  # fmt: skip


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    yield from read_csv(decode_text(read_bytes(path), str(path)), str(path))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file() or not path.stat().st_size:
        read_bytes(path)  # raises, with the reason
    try:
        rows = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        index = 0
        for batch in rows:
            for record in batch.to_pylist():
                yield f"{path} row {index}", {name: _without_nulls(value) for name, value in record.items()}
                index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable parquet file: {error}", "write the file again") from error


def _without_nulls(value: Any) -> Any:
    """A value without the fields that it has only because the format gives all rows of a column the same ones."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value
