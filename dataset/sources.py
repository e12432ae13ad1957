"""What `--train_files` and its like name: sources of rows, each of one or several files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dataset.records import Record, read_raw_rows
from novelgpt.settings.file_hashes import content_hash


class SourcedRow(NamedTuple):
    """A row of a source, not parsed.

    Attributes:
        file: index in `RowSource.files`.
        place: of the row in that file (see `RawRow`).
        text: JSON of the row.
    """

    file: int
    place: str
    text: str


@dataclass(frozen=True)
class RowSource:
    """A name on the command line, and the rows behind it.

    Attributes:
        name: short, for tables and logs.
        given: as the user wrote it.
        files: names of its files, as errors write them.
    """

    name: str
    given: str
    files: tuple[str, ...]

    def rows(self) -> Iterator[SourcedRow]:
        """All rows, in order.

        Raises:
            UserError: what `read_raw_rows` raises.
        """
        for number, file in enumerate(self.files):
            for row in read_raw_rows(Path(file)):
                yield SourcedRow(number, *row)

    def record(self, fields: Record) -> Record:
        """The fields of a row under the names that the readers know."""
        return fields

    def identity(self) -> dict[str, Any]:
        """What decides its rows, wherever its files lie: JSON that is equal where the rows are."""
        return {"files": [[Path(file).suffix.lower(), content_hash(Path(file))[0]] for file in self.files]}


def find_row_sources(names: Sequence[str]) -> list[RowSource]:
    """The sources that `--train_files` and its like name, in order.

    Raises:
        UserError: a name that is none.
    """
    return [RowSource(Path(name).stem, name, (name,)) for name in names]
