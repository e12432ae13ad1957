"""What `--train_files` and its like name: sources of rows, each of one or several files."""

from __future__ import annotations

import glob
import itertools
import random
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Any

from dataset.hub_rows import open_hub_data, read_hub_rows
from dataset.records import RawRow, Record, load_record, read_raw_rows
from dataset.row_columns import RowColumns, describe_columns, read_columns
from novelgpt.settings.errors import UserError
from novelgpt.settings.file_hashes import content_hash
from novelgpt.settings.process import is_first_process
from novelgpt.settings.remedies import python_module, run_pipeline
from novelgpt.settings.terminal import counted, say
from novelgpt.text.data_names import ROW_SUFFIXES, TEXT, Part, find_data, is_prepared, split_part
from novelgpt.text.dataset_info import find_datasets
from novelgpt.text.hub_data import HubData, version_of

PART_SEED = 42
_SHOWN_FIELDS = 20


@dataclass(frozen=True)
class RowSource:
    """A name on the command line, and the rows behind it.

    Attributes:
        name: short, for tables and logs; no other source of the same list has it.
        given: as the user wrote it.
        files: names of its files, as errors write them.
        part: of its rows that is drawn; None for all.
        max_rows: of these, the first ones that are taken; None for all.
        columns: names of the rows' fields; None where they are the readers' own.
        hub: the data set of a hub, which is in place of files; `files` has its name.
    """

    name: str
    given: str
    files: tuple[str, ...]
    part: Part | None = None
    max_rows: int | None = None
    columns: RowColumns | None = None
    hub: HubData | None = None

    def rows(self) -> Iterator[RawRow]:
        """All rows, or those of its part, in order.

        Raises:
            UserError: what `read_raw_rows` raises.
        """
        rows = self._all_rows()
        if self.part is not None:
            count = len(open_hub_data(self.hub)) if self.hub else sum(1 for _ in self._all_rows())
            rows = _drawn(rows, count, self.part, self.given)
        return itertools.islice(rows, self.max_rows)

    def _all_rows(self) -> Iterator[RawRow]:
        read = (read_raw_rows(Path(file)) if self.hub is None else read_hub_rows(self.hub) for file in self.files)
        return itertools.chain.from_iterable(
            map(methodcaller("_replace", file=number), rows) for number, rows in enumerate(read)
        )

    def record(self, fields: Record, where: str) -> Record:
        """The fields of a row under the names that the readers know.

        Args:
            fields: of the row.
            where: its file and place, for errors.

        Raises:
            UserError: what `RowColumns.record` raises.
        """
        return fields if self.columns is None else self.columns.record(fields, where)

    def identity(self) -> dict[str, Any]:
        """What decides its rows, wherever its files lie: JSON that is equal where the rows are.

        Raises:
            UserError: a file is a pipe, whose rows would be gone once they are hashed.
        """
        chosen: dict[str, Any] = {} if self.part is None else {"part": self.part.text}
        chosen |= {} if self.max_rows is None else {"max_rows": self.max_rows}
        chosen |= {} if self.columns is None else {"columns": self.columns.said()}
        if self.hub is not None:
            return {"data": str(self.hub), "folder": self.hub.folder, "version": version_of(self.hub), **chosen}
        pipe = next((file for file in self.files if Path(file).is_fifo()), None)
        if pipe is not None:
            raise UserError(f"{pipe}: a pipe can be read only once, and rows are hashed before they are read",
                            "write its rows to a file, and name that")  # fmt: skip
        return {"files": [[Path(file).suffix.lower(), content_hash(Path(file))[0]] for file in self.files], **chosen}


def find_row_sources(
    names: Sequence[str],
    datasets: Sequence[str] = (),
    dataset_dir: str = "",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
) -> list[RowSource]:
    """The sources that `--train_files`, `--dataset` and their like name, in order.

    Args:
        names: of files, patterns, folders and data sets of hubs, each with the part of its rows that is meant (see
            `data_names` and `hub_data`).
        datasets: names in a dataset_info.json.
        dataset_dir: the folder of that file, or the file itself.
        columns: standard field -> field of the rows of `names`.
        max_rows: of each source, the first ones; None for all.

    Raises:
        UserError: a name that is none, text, which is for pretraining, or a column that no row has.
    """
    sources = [_find_source(given, *split_part(given)) for given in names]
    renamed = read_columns(columns)
    if renamed is not None:
        sources = [replace(source, columns=renamed) for source in sources]
        _check_columns(sources, renamed)
    for described in find_datasets(datasets, dataset_dir):
        part = None if described.num_samples is None else Part(str(described.num_samples))
        source = _find_source(described.where, described.place, part, described.folder or "")
        sources.append(replace(source, name=described.name, columns=describe_columns(described)))
    return _named_apart([replace(source, max_rows=max_rows) for source in sources])


def _find_source(given: str, place: str, part: Part | None, folder: str = "") -> RowSource:
    """The source of a place: a path, a pattern or a hub's name.

    Args:
        given: as the user wrote it.
        place: without the part.
        part: of its rows.
        folder: within a hub's data set.
    """
    files = [] if is_prepared(place) else find_data(place, folder)
    if isinstance(files, HubData):
        return RowSource(files.repository.rpartition("/")[2], given, (str(files),), part, hub=files)
    text = next((file for file in files if file.lower().endswith(TEXT)), None)
    if text is not None or not files:
        raise _no_rows_error(Path(text or place))
    if files != [place] and is_first_process():
        say(f"{given}: {counted(len(files), 'file')}")
    if part is not None and not all(Path(file).is_file() for file in files):
        raise UserError(f"{given}: a pipe can be read only once, and its rows must be counted to draw some of them",
                        "write its rows to a file, and name that")  # fmt: skip
    return RowSource(_short_name(place), given, tuple(files), part)


def _check_columns(sources: Sequence[RowSource], columns: RowColumns) -> None:
    """Make sure that some row has each field of `--columns`; the first one tells, unless a field is rare.

    Raises:
        UserError: names the fields that no row has.
    """
    lacking = {own for _, own in columns.names}
    seen: dict[str, None] = {}
    for source in sources:
        if source.hub is None and not all(Path(file).is_file() for file in source.files):
            return  # a pipe, which can be read only once
        for row in source.rows():
            fields = load_record(row.text, f"{source.files[row.file]}{row.place}")
            seen |= dict.fromkeys(fields)
            lacking -= fields.keys()
            if not lacking:
                return
    if seen:
        held = ", ".join(list(seen)[:_SHOWN_FIELDS])
        raise UserError(
            f"--columns: no row has a field {', '.join(sorted(lacking))}", f"name fields of the rows: they have {held}"
        )


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


def _drawn(rows: Iterable[RawRow], count: int, part: Part, given: str) -> Iterator[RawRow]:
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
