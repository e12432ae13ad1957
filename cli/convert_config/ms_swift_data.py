"""Datasets of ms-swift: `path#rows`, and rows as its preprocessors read them (dataset/loader.py of 4.6.0)."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from cli.convert_config.conversion import Conversion
from cli.convert_config.rows import MOST_ROWS, RowFile
from dataset.readers import messages_of
from dataset.records import Record

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def dataset_files(conversion: Conversion, key: str) -> list[RowFile]:
    """The files that a key names, with the number of rows that is asked for.

    Raises:
        UserError: a name of a hub, or a file of an unknown kind.
    """
    value = conversion.value(key) or []
    sources = []
    for name in [value] if isinstance(value, str) else value:
        text, most = str(name), None
        if not conversion.path(text).exists() and "#" in text:
            text, _, number = text.rpartition("#")
            if not re.fullmatch("[0-9]{1,9}", number) or not 0 < int(number) <= MOST_ROWS:
                raise conversion.refuse(key, f"{number!r} is no number of rows", "write path#1000")
            most = int(number)
        path = conversion.path(text)
        if not path.exists():
            remedy = "download it (modelscope download --dataset NAME --local_dir FOLDER), and name its file"
            raise conversion.refuse(key, f"{text} is no file here, and nothing is fetched from a hub", remedy)
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not files or files[0].suffix.lower() not in SUFFIXES:
            raise conversion.refuse(key, f"{path} holds no {', '.join(SUFFIXES)}", "name a file of rows")
        if most is not None and len(files) > 1:
            raise conversion.refuse(key, "so many rows of several files", "join them into one file")
        column = "text" if conversion.pipeline == "pretrain" else None
        for file in files:
            read = partial(_read, conversion=conversion, names=_columns(conversion), column=column)
            sources.append(RowFile(_name(key, file), file, read, drawn=most, text_column=column))
        if most is not None:
            conversion.note(key, "differs", f"{most} rows of {text} are drawn, others than ms-swift draws")
    return sources


def _name(key: str, file: Path) -> str:
    return file.stem if key == "dataset" else f"{key}_{file.stem}"


def _columns(conversion: Conversion) -> dict[str, str]:
    value = conversion.value("columns") or {}
    try:
        columns = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise conversion.refuse("columns", f"no mapping in JSON: {error}", "correct it") from error
    if not isinstance(columns, dict):
        raise conversion.refuse("columns", "no mapping of names", 'write {"text1": "query"}')
    return {str(old): str(new) for old, new in columns.items()}


def _read(record: Record, conversion: Conversion, names: dict[str, str], column: str | None) -> Record | None:
    """A row under the names that ms-swift gives its fields; its shapes are among those that are read here."""
    row: dict[str, Any] = {names.get(name, name): value for name, value in record.items()}
    if column is not None:
        return _text(row)
    system = conversion.value("system")
    scale = str(conversion.value("loss_scale"))
    if not system and not scale.startswith("last_round"):
        return row
    messages: list[dict[str, Any]] = [dict(message) for message in messages_of(row, str(conversion.file))]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if scale.startswith("last_round"):
        last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=0)
        for message in messages[:last]:
            if message["role"] == "assistant":
                message["loss"] = False
    kept = {"messages": [{name: value for name, value in one.items() if name != "trained"} for one in messages]}
    return kept | {name: row[name] for name in ("tools",) if row.get(name)}


def _text(row: dict[str, Any]) -> Record | None:
    """The text of a row for `swift pt`: an answer without a question, or a field that is the answer."""
    messages = row.get("messages")
    if isinstance(messages, list):
        parts = [str(message.get("content") or "") for message in messages if isinstance(message, dict)]
        return {"text": "".join(parts)} if any(parts) else None
    text = next((row[name] for name in ("response", "text", "content", "output") if row.get(name)), None)
    return {"text": str(text)} if text else None
