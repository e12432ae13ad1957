"""What `--train_files` and its like name: sources of rows, each of one or several files."""

from __future__ import annotations

import glob
import itertools
import random
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dataset.records import Record, read_raw_rows
from novelgpt.settings.errors import UserError
from novelgpt.settings.file_hashes import content_hash
from novelgpt.settings.process import is_first_process
from novelgpt.settings.remedies import python_module, run_pipeline
from novelgpt.settings.terminal import counted, say
from novelgpt.text.data_names import ROW_SUFFIXES, TEXT, Part, find_files, is_prepared, split_part

PART_SEED = 42


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
        name: short, for tables and logs; no other source of the same list has it.
        given: as the user wrote it.
        files: names of its files, as errors write them.
        part: of its rows that is drawn; None for all.
        max_rows: of these, the first ones that are taken; None for all.
    """

    name: str
    given: str
    files: tuple[str, ...]
    part: Part | None = None
    max_rows: int | None = None

    def rows(self) -> Iterator[SourcedRow]:
        """All rows, or those of its part, in order.

        Raises:
            UserError: what `read_raw_rows` raises.
        """
        rows = self._all_rows()
        if self.part is not None:
            rows = _drawn(rows, sum(1 for _ in self._all_rows()), self.part, self.given)
        return itertools.islice(rows, self.max_rows)

    def _all_rows(self) -> Iterator[SourcedRow]:
        for number, file in enumerate(self.files):
            for row in read_raw_rows(Path(file)):
                yield SourcedRow(number, *row)

    def record(self, fields: Record, where: str) -> Record:
        """The fields of a row under the names that the readers know.

        Args:
            fields: of the row.
            where: its file and place, for errors.
        """
        return fields

    def identity(self) -> dict[str, Any]:
        """What decides its rows, wherever its files lie: JSON that is equal where the rows are."""
        chosen = {"part": self.part.text} if self.part else {}
        chosen |= {"max_rows": str(self.max_rows)} if self.max_rows is not None else {}
        return {"files": [[Path(file).suffix.lower(), content_hash(Path(file))[0]] for file in self.files], **chosen}


def find_row_sources(names: Sequence[str], max_rows: int | None = None) -> list[RowSource]:
    """The sources that `--train_files` and its like name, in order.

    Args:
        names: of files, patterns and folders, each with the part of its rows that is meant (see `data_names`).
        max_rows: of each source, the first ones; None for all.

    Raises:
        UserError: a name that is none, or text, which is for pretraining.
    """
    sources = []
    for given in names:
        place, part = split_part(given)
        files = [] if is_prepared(place) else find_files(place)
        text = next((file for file in files if file.lower().endswith(TEXT)), None)
        if text is not None or not files:
            raise _no_rows_error(Path(text or place))
        if files != [place] and is_first_process():
            say(f"{given}: {counted(len(files), 'file')}")
        if part is not None and not all(Path(file).is_file() for file in files):
            raise UserError(f"{given}: a pipe can be read only once, and its rows must be counted to draw some of them",
                            "write its rows to a file, and name that")  # fmt: skip
        sources.append(RowSource(_short_name(place), given, tuple(files), part, max_rows))
    return _named_apart(sources)


def _no_rows_error(path: Path) -> UserError:
    if path.is_dir() and not is_prepared(str(path)) and next(path.rglob(f"*{TEXT}"), None) is None:
        return UserError(f"{path} holds no {', '.join(ROW_SUFFIXES)}", "name a folder with files of rows")
    return text_error(path)


def text_error(path: Path) -> UserError:
    """The error of a file or folder of text in place of conversations."""
    return UserError(
        f"{path}: no reader for {path.suffix.lower() or 'files without a suffix'}: it holds text, no conversations",
        f"pretrain on it: {run_pipeline('pretrain', f'--train_files {shlex.quote(str(path))}')}; or make "
        f"conversations of it: {python_module('dataset novels')}, then {python_module('dataset conversations')}",
    )


def _drawn(rows: Iterable[SourcedRow], count: int, part: Part, given: str) -> Iterator[SourcedRow]:
    """The rows of a part, in order: each set of that many rows is equally likely (Knuth, algorithm S)."""
    wanted = part.count(count)
    if part.exceeds > count and is_first_process():
        say(f"{given}: there are only {counted(count, 'row')}, and all are taken", style="yellow")
    draw = random.Random(PART_SEED)
    for number, row in enumerate(rows):
        if draw.random() * (count - number) < wanted:
            wanted -= 1
            yield row
        if not wanted:
            return


def _short_name(place: str) -> str:
    """The name of a file, or of the folder that a pattern starts in."""
    path = Path(place)
    while glob.has_magic(path.name) and not path.exists():
        path = path.parent
    return (path.stem if path.is_file() else path.name or path.resolve().name) or "rows"


def _named_apart(sources: list[RowSource]) -> list[RowSource]:
    """The same sources, those of one name with the folder before it, or with a number behind it."""
    shared = Counter(source.name for source in sources)
    taken: set[str] = set()
    apart = []
    for source in sources:
        name = source.name
        if shared[name] > 1 and len(source.files) == 1 and Path(source.files[0]).parent.name:
            name = f"{Path(source.files[0]).parent.name}/{name}"
        numbered = itertools.chain([name], map(f"{name}~{{}}".format, itertools.count(2)))
        name = next(one for one in numbered if one not in taken)
        taken.add(name)
        apart.append(replace(source, name=name))
    return apart
