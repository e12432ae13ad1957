"""Files of rows as another tool reads them: taken as they are where this toolkit reads the same, else written anew."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.convert_config.conversion import Conversion
from dataset.readers import word_row
from dataset.records import Record, read_records
from novelgpt.settings.errors import UserError
from novelgpt.settings.units import counted
from novelgpt.settings.whole_files import write_whole

Read = Callable[[Record], Record | None]
SEED = 42


@dataclass
class RowFile:
    """A file of rows, as the tool reads it.

    Attributes:
        name: of the dataset.
        file: with the rows.
        read: a row as ours ("messages", "tools", or the text); None for one that the tool leaves out.
        most: rows that are taken; None for all.
        drawn: whether these are drawn at random, or the first ones.
        text_column: field of the text, in pretraining.
    """

    name: str
    file: Path
    read: Read
    most: int | None = None
    drawn: bool = False
    text_column: str | None = None


class RowWriter:
    """Decides for each file, and writes the rows of those that have to be.

    Args:
        conversion: whose files they are.
        folder: for rows that are written; None where the user named none.

    Attributes:
        rows: rows of each file that is read, by its path in our settings.
        written: the files that were made.
    """

    def __init__(self, conversion: Conversion, folder: Path | None) -> None:
        self.conversion = conversion
        self.folder = folder
        self.rows: dict[str, int] = {}
        self.written: dict[Path, str] = {}

    def paths(self, sources: Sequence[RowFile]) -> list[str]:
        """Paths of our files with the rows of the sources.

        Raises:
            UserError: rows have to be written, and no folder is named for them; or a row cannot be read.
        """
        return [self._path(source) for source in sources]

    def write(self) -> None:
        """Write what has to be written, once all else is known to be right."""
        for path, text in self.written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)

    def _path(self, source: RowFile) -> str:
        if source.file.suffix.lower() == ".txt" and source.text_column:
            self.rows[str(source.file)] = 1
            return str(source.file)
        kept, reason, left_out = [], "", 0
        for where, record in read_records(source.file):
            row = source.read(record)
            if row is None:
                left_out += 1
                reason = reason or f"{where} is left out by {self.conversion.tool}"
                continue
            kept.append(row)
            if not reason and not _reads_alike(record, row, where, source.text_column):
                reason = f"{where} is read otherwise here than by {self.conversion.tool}"
        if not kept:
            raise UserError(f"{source.file}: {self.conversion.tool} reads no row of it", "check its columns and tags")
        if source.most is not None and (source.most < len(kept) or source.drawn and source.most != len(kept)):
            reason = reason or f"{source.most} of its {counted(len(kept), 'row')} are taken"
            kept = _some(kept, source.most, source.drawn)
        path = str(source.file)
        if reason:
            path = str(self._write(source, kept, reason))
            text = f"rows of {source.file} stand in {path}, as {self.conversion.tool} reads them: {reason}"
            if left_out:
                text += f"; {counted(left_out, 'row')} left out"
            self.conversion.note(source.name, "differs", text)
        self.rows[path] = len(kept)
        return path

    def _write(self, source: RowFile, rows: list[Record], reason: str) -> Path:
        if self.folder is None:
            raise UserError(
                f"{self.conversion.file}: rows of {source.name} have to be written anew: {reason}",
                "name a folder for them: --output_data FOLDER",
            )
        path = self.folder / f"{source.name.replace('/', '_')}.jsonl"
        if path.exists() or path in self.written:
            raise UserError(f"{path} is there already", "name another --output_data")
        self.written[path] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return path


def _some(rows: list[Record], most: int, drawn: bool) -> list[Record]:
    """The first rows; or as many as are asked for, drawn, and all of them again and again where they are too few."""
    if not drawn:
        return rows[:most]
    whole, rest = divmod(most, len(rows))
    return rows * whole + random.Random(SEED).sample(rows, rest)


def _reads_alike(record: Record, row: Record, where: str, text_column: str | None) -> bool:
    """Whether our reader makes of a record what it makes of the row that the tool reads there.

    Raises:
        UserError: the row cannot be trained on here.
    """
    if text_column is not None:
        return bool(record.get(text_column) == row[text_column])
    wanted = _worded(row, where)
    try:
        return _worded(record, where) == wanted
    except UserError:
        return False


def _worded(record: Record, where: str) -> Any:
    worded = word_row({"id": "", "record": record, "source": where})
    return worded["messages"], worded.get("tools")
