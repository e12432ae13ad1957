"""Papers and prepared novels to candidate rows, each of which names a task; not filtered yet."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.csv_rows import read_csv
from dataset.instructions import Instructions
from dataset.novels.chapters.headings import LONGEST_HEADING
from dataset.novels.chapters.numerals import to_number
from dataset.records import Record, read_records
from dataset.text_files import open_text
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import counted

MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")
SHARD_KINDS = ("parquet", "jsonl")
SKIPPED_COLUMN = "_"
# Kept with a row although they are not fields of its task.
KEPT = ("book", "chapter")
_CHAPTER_NUMBER = re.compile(r"第\s*(\S{1,9}?)\s*[章回节節话話]")
Row = dict[str, str]
Records = Iterator[tuple[str, Record]]


@dataclass(frozen=True)
class RowCandidate:
    """A row that may be kept.

    Attributes:
        row: {"id", "task", the fields of the task, "book" and "chapter" where known, "source"}.
        reason: why it must be dropped; "" if there is none.
        detail: of the reason.
    """

    row: Row
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class ChunkLimits:
    """How chapters are cut into questions and answers.

    Attributes:
        max_characters: of all messages of a row together, in the longest of the task's wordings.
        previous_chapters: max number of chapters in a question before the next one.
        opening_characters: min length of a text to be continued; whole paragraphs.
    """

    max_characters: int
    previous_chapters: int
    opening_characters: int


def find_splits(path: Path) -> dict[str, list[Path]]:
    """Split -> files: the shards of a prepared folder, in order; any other file is for training.

    Raises:
        UserError: a folder that `python -m dataset novels` did not finish.
    """
    if not path.is_dir():
        return {"train": [path], "held_out": []}
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path} holds no {MANIFEST}", f"name a folder that `{python_module('dataset novels')}` has finished"
        )
    shards = {
        split: [file for kind in SHARD_KINDS for file in sorted(path.glob(f"{split}-*.{kind}"))] for split in SPLITS
    }
    if not any(shards.values()):
        raise UserError(f"{path} holds no chapters", "name a folder with train-… or held_out-… files")
    return shards


def read_table(path: Path, columns: Sequence[str] = ()) -> Records:
    """("file:line", fields) of each row of a .tsv file, or of a file that `read_records` knows.

    Args:
        path: of the file. Quotation marks in a .tsv are text.
        columns: their names in a .tsv or .csv file without a header; "_" for one that is left out.

    Raises:
        UserError: what `read_records` raises, or a line with another number of columns.
    """
    kind = path.suffix.lower()
    if kind != ".tsv" and not (kind == ".csv" and columns):
        yield from read_records(path)
        return
    read = _read_tsv if kind == ".tsv" else read_csv
    for where, record in read(open_text(path).lines(), str(path), columns):
        yield where, {name: value for name, value in record.items() if name != SKIPPED_COLUMN}


def _read_tsv(lines: Iterable[str], path: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    names = list(columns)
    for number, line in enumerate(lines, start=1):
        values = line.split("\t")
        if not line.strip():
            continue
        if not names:
            names = values
            continue
        if len(values) != len(names):
            raise UserError(
                f"{path}:{number}: {counted(len(values), 'column')} instead of {len(names)}",
                "correct that line, or name the columns in order with --columns, _ for one to leave out",
            )
        yield f"{path}:{number}", dict(zip(names, values, strict=True))


def read_candidates(
    files: Sequence[Path], task: str, instructions: Instructions, limits: ChunkLimits, columns: Sequence[str] = ()
) -> Iterator[RowCandidate]:
    """Rows for a task: from the fields of each record, or, for next_chapter and continue_text, cut from its chapters.

    Raises:
        UserError: what `read_table` raises, an unknown task, or a record without a text where chapters are needed.
    """
    builders = {"next_chapter": _next_chapters, "continue_text": _continued_texts}
    if task in builders:
        yield from builders[task](files, instructions, limits, columns)
        return
    for file in files:
        for index, (where, record) in enumerate(read_table(file, columns)):
            row = _row(task, instructions, str(record.get("id") or f"{file.stem}-{index}"), record, where)
            if task == "chapter_title":
                row["text"] = _without_heading(row["text"], row["title"])
            yield RowCandidate(row)


def keep_tail(text: str, characters: int) -> str:
    """The last whole paragraphs of `text` that fit into `characters`; "" if not even the last one does.

    >>> keep_tail("一二三\\n四五\\n六", 4)
    '四五\\n六'
    """
    if len(text) <= characters:
        return text
    boundary = text.find("\n", max(0, len(text) - characters - 1))
    return text[boundary + 1 :].lstrip("\n") if boundary >= 0 else ""


@dataclass
class _ChapterRow:
    """A text row. name: of its book, and its index; first: whether it is its book's first; number: of its label."""

    record: Record
    where: str
    text: str
    name: str
    first: bool
    number: int | None


def _chapters(files: Sequence[Path], columns: Sequence[str]) -> Iterator[_ChapterRow]:
    """Chapters in order; adjacent rows of one book and source belong together."""
    last: tuple[str, str] | None = None
    count = 0
    for file in files:
        for where, record in read_table(file, columns):
            text = _clean(record.get("text"))
            if not text:
                raise UserError(f"{where}: no text in field 'text'", "name a prepared folder or a file of chapters")
            book = (str(record.get("book") or file.stem), str(record.get("source") or file))
            count = 1 if book != last else count + 1
            # The number is that of the label, or else of the first line.
            label = str(record.get("chapter") or "") or text.partition("\n")[0][:LONGEST_HEADING]
            match = _CHAPTER_NUMBER.match(label)
            number = to_number(match[1]) if match else None
            yield _ChapterRow(record, where, text, f"{book[0]}-{count:04d}", book != last, number)
            last = book


def _next_chapters(
    files: Sequence[Path], instructions: Instructions, limits: ChunkLimits, columns: Sequence[str]
) -> Iterator[RowCandidate]:
    task = "next_chapter"
    before: deque[str] = deque(maxlen=limits.previous_chapters)
    number: int | None = None
    for chapter in _chapters(files, columns):
        row = _row(
            task, instructions, chapter.name, chapter.record, chapter.where, {"previous": "", "next": chapter.text}
        )
        if chapter.first:
            before.clear()
            yield RowCandidate(row, "first_chapter")
        elif None not in (number, chapter.number) and chapter.number not in (number, number + 1, 1):  # type: ignore[operator]
            before.clear()  # a chapter between the two is missing, or was left out as a duplicate
            yield RowCandidate(row, "gap_in_chapters", f"{number} -> {chapter.number}")
        else:
            room = limits.max_characters - instructions.max_characters(task, row, chapter.where)
            row["previous"] = keep_tail("\n\n".join(before), room) if room > 0 else ""
            reason = "" if row["previous"] else "no_room_for_context" if room > 0 else "row_too_long"
            yield RowCandidate(row, reason)
        before.append(chapter.text)
        number = chapter.number


def _continued_texts(
    files: Sequence[Path], instructions: Instructions, limits: ChunkLimits, columns: Sequence[str]
) -> Iterator[RowCandidate]:
    """Each chapter from its first to its last paragraph, in as few rows as hold it."""
    task = "continue_text"
    for chapter in _chapters(files, columns):
        paragraphs = chapter.text.split("\n")
        empty = _row(task, instructions, chapter.name, chapter.record, chapter.where, {"opening": "", "rest": ""})
        room = limits.max_characters - instructions.max_characters(task, empty, chapter.where)
        start, part = 0, 1
        while start < len(paragraphs):
            boundary = min(len(paragraphs), _fitting(paragraphs, start, limits.opening_characters) + 1)
            opening = "\n".join(paragraphs[start:boundary])
            # Some wordings state the answer's length, which has at most as many digits as the limit.
            end = _fitting(paragraphs, boundary, room - len(opening) - 2 * len(str(limits.max_characters)))
            row = empty | {"opening": opening, "rest": "\n".join(paragraphs[boundary:end])}
            row["id"] = f"{chapter.name}.{part}-{task}"
            reason = "" if end > boundary else "nothing_follows" if boundary >= len(paragraphs) else "row_too_long"
            yield RowCandidate(row, reason)
            start, part = max(boundary, end), part + 1


def _fitting(paragraphs: Sequence[str], start: int, characters: int) -> int:
    """The end of the longest range of paragraphs from `start` on that fits into `characters`, line ends included."""
    end = start
    while end < len(paragraphs) and characters >= len(paragraphs[end]):
        characters -= len(paragraphs[end]) + 1
        end += 1
    return end


def _row(
    task: str, instructions: Instructions, name: str, record: Record, where: str, replaced: Row | None = None
) -> Row:
    """The row of a task; `replaced`: fields that are not those of the record."""
    names = [name for side in instructions.fields(task, "--task") for name in side]
    fields = {name: _clean(record.get(name)) for name in names} | (replaced or {})
    kept = {key: _clean(record.get(key)) for key in KEPT if record.get(key) and key not in fields}
    source = record.get("source") if isinstance(record.get("source"), str) else Path(where).name
    return {"id": f"{name}-{task}", "task": task, **fields, **kept, "source": str(source)}


def _clean(value: object) -> str:
    return value.replace("\r\n", "\n").replace("\r", "\n").strip() if isinstance(value, str) else ""


def _without_heading(text: str, title: str) -> str:
    """`text` without its first line, if that is a heading that contains the title."""
    first, _, rest = text.partition("\n")
    heading = len(first) <= LONGEST_HEADING and "".join(title.split()) in "".join(first.split())
    return rest.strip() if title and heading else text
