"""Files of rows as another tool reads them: used unchanged if this toolkit reads the same, otherwise rewritten."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.convert_config.conversion import Conversion
from dataset.readers import SourceRow, read_conversation
from dataset.records import Record, read_records
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted

SEED = 42
# Shares that mean a number of rows from 1 on.
_OR_ROWS = ("val_size", "test_split_size")
# One row, of any number of rows.
ONE_ROW = 1e-6


@dataclass
class RowFile:
    """A file of rows, as the tool reads it.

    Attributes:
        name: of the dataset.
        file: with the rows.
        read: a row as ours ("messages", "tools", or the text); None for one that the tool leaves out. Raises
            ValueError for one that it cannot read.
        first: number of rows taken, including those left out; None for all.
        sampled: number of rows sampled at random before that; None for all in order.
        text_column: field of the text, in pretraining.
    """

    name: str
    file: Path
    read: Callable[[Record], Record | None]
    first: int | None = None
    sampled: int | None = None
    text_column: str | None = None


def convert_file(conversion: Conversion, source: RowFile) -> str:
    """Return the path of our file with the rows of a source; what must be written is added to `conversion.written`.

    Raises:
        UserError: rows must be written, and no folder is named for them; or a row cannot be read.
    """
    path = str(source.file)
    if source.file.suffix.lower() == ".txt" and source.text_column:
        conversion.rows[path] = 1
        return path
    rows, reason = _read_rows(conversion, source)
    count = len(rows)
    if rows and source.sampled is not None and source.sampled != count:
        # All rows again and again where they are too few.
        repeats, rest = divmod(source.sampled, count)
        rows = rows * repeats + random.Random(SEED).sample(rows, rest)
    rows = rows[: source.first]
    if len(rows) != count:
        reason = reason or f"{len(rows)} of its {counted(count, 'row')} are taken"
    kept = [row for row in rows if row is not None]
    if not kept:
        raise UserError(f"{source.file}: {conversion.peer.tool} reads no row of it", "check its columns and tags")
    if reason:
        path = str(_write_rows(conversion, source, kept, reason))
        text = f"rows of {source.file} are in {path}, as {conversion.peer.tool} reads them: {reason}"
        if len(kept) < len(rows):
            text += f"; {counted(len(rows) - len(kept), 'row')} left out"
        conversion.note(source.name, "differs", text)
    conversion.rows[path] = len(kept)
    return path


def _read_rows(conversion: Conversion, source: RowFile) -> tuple[list[Record | None], str]:
    """The rows, None for those left out, and why the file cannot be used unchanged; "" where it can."""
    rows: list[Record | None] = []
    reason = ""
    for where, record in read_records(source.file):
        try:
            row = source.read(record)
        except ValueError as error:
            raise UserError(f"{where}: {error}", "correct the row") from error
        rows.append(row)
        if row is None:
            reason = reason or f"{where} is left out by {conversion.peer.tool}"
        elif not reason:
            if source.text_column is not None:
                alike = record.get(source.text_column) == row[source.text_column]
            else:
                expected = _as_read_here(row, where)  # raises UserError for a row that cannot be trained on here
                try:
                    alike = _as_read_here(record, where) == expected
                except UserError:
                    alike = False
            reason = "" if alike else f"{where} is read differently here than by {conversion.peer.tool}"
    return rows, reason


def _write_rows(conversion: Conversion, source: RowFile, rows: Sequence[Record], reason: str) -> Path:
    if conversion.output_data is None:
        raise UserError(
            f"{conversion.file}: rows of {source.name} must be rewritten: {reason}",
            "name a folder for them: --output_data FOLDER",
        )
    path = conversion.output_data / f"{source.name.replace('/', '_')}.jsonl"
    if path.exists() or path in conversion.written:
        raise UserError(f"{path} already exists", "name another --output_data")
    conversion.written[path] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _as_read_here(record: Record, where: str) -> Any:
    conversation = read_conversation(SourceRow("", record, where))
    return conversation["messages"], conversation.get("tools")


def hold_out(conversion: Conversion, valid: Sequence[str], files_key: str, share_key: str) -> None:
    """Set the evaluation rows of a tool that may have none; here some are always held out.

    Args:
        conversion: to fill.
        valid: files of evaluation rows.
        files_key: the peer's name for them.
        share_key: its name for a share, or a number, of the training rows.

    Raises:
        UserError: the share leaves no row to train on.
    """
    tool = conversion.peer.tool
    conversion.set("max_eval_share", 0, why=f"{tool} evaluates on all rows")
    if valid:
        conversion.set("valid_files", list(valid), files_key)
        return
    share = conversion.value(share_key) or 0
    rows = sum(conversion.rows[path] for path in conversion.settings["train_files"])
    if share < 0 or share >= (max(rows, 1) if share_key in _OR_ROWS else 1):
        raise conversion.refuse(share_key, f"there are {rows} rows to train on", "hold out some of them")
    if share >= 1:
        conversion.set("valid_fraction", round((share - 0.5) / rows, 9), share_key, why=f"of {rows} rows")
    elif share:
        conversion.set("valid_fraction", share, share_key)
    else:
        conversion.set("valid_fraction", ONE_ROW, why=f"{tool} holds out nothing")
        what = "block" if conversion.pipeline == "pretrain" else "row"
        text = f"one {what} is held out, as every run is evaluated at its end; valid_files names others"
        conversion.note(share_key, "differs", text)
