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
from novelgpt.settings.terminal import counted

Read = Callable[[Record], Record | None]
SEED = 42
# That are drawn of a dataset; beyond it lies no data, but a slip of the pen.
MOST_ROWS = 10_000_000


@dataclass
class RowFile:
    """A file of rows, as the tool reads it.

    Attributes:
        name: of the dataset.
        file: with the rows.
        read: a row as ours ("messages", "tools", or the text); None for one that the tool leaves out. Raises
            ValueError of one that it cannot read.
        first: rows that are taken, those that are left out among them; None for all.
        drawn: rows that are drawn at random before; None for all as they stand.
        text_column: field of the text, in pretraining.
    """

    name: str
    file: Path
    read: Read
    first: int | None = None
    drawn: int | None = None
    text_column: str | None = None


class RowWriter:
    """Decides for each file whether it stays, and makes the rows of those that have to be written.

    Args:
        conversion: whose files they are.
        folder: for rows that are written; None where the user named none.

    Attributes:
        rows: rows of each file that is read, by its path in our settings.
        written: what has to be written, by file.
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

    def _path(self, source: RowFile) -> str:
        if source.file.suffix.lower() == ".txt" and source.text_column:
            self.rows[str(source.file)] = 1
            return str(source.file)
        rows, reason = self._read(source)
        count = len(rows)
        if source.drawn is not None and source.drawn != count:
            rows = _drawn(rows, source.drawn)
        rows = rows[: source.first]
        if len(rows) != count:
            reason = reason or f"{len(rows)} of its {counted(count, 'row')} are taken"
        kept = [row for row in rows if row is not None]
        left_out = len(rows) - len(kept)
        if not kept:
            raise UserError(f"{source.file}: {self.conversion.tool} reads no row of it", "check its columns and tags")
        path = str(source.file)
        if reason:
            path = str(self._write(source, kept, reason))
            text = f"rows of {source.file} stand in {path}, as {self.conversion.tool} reads them: {reason}"
            if left_out:
                text += f"; {counted(left_out, 'row')} left out"
            self.conversion.note(source.name, "differs", text)
        self.rows[path] = len(kept)
        return path

    def _read(self, source: RowFile) -> tuple[list[Record | None], str]:
        """The rows, None for those that are left out, and why they cannot stay as they are; "" where they can."""
        rows: list[Record | None] = []
        reason = ""
        for where, record in read_records(source.file):
            try:
                row = source.read(record)
            except ValueError as error:
                raise UserError(f"{where}: {error}", "correct the row") from error
            rows.append(row)
            if row is None:
                reason = reason or f"{where} is left out by {self.conversion.tool}"
            elif not reason and not _reads_alike(record, row, where, source.text_column):
                reason = f"{where} is read otherwise here than by {self.conversion.tool}"
        return rows, reason

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


def _drawn(rows: list[Record | None], most: int) -> list[Record | None]:
    """As many as are asked for, and all of them again and again where they are too few."""
    if not rows:
        return rows
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
