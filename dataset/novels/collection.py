"""The steps that need all books at once: duplicates, the split, and the files that training reads.

Texts pass through one at a time; of the whole collection only records, fingerprints and decisions are in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.novels.artefacts import REMOVED, SKIPPED, json_line, read_book_records, read_chapters
from dataset.novels.decisions import CollectionOptions, Decisions, Shelf, compare_books, name_place
from dataset.novels.records import BookRecord
from dataset.novels.report.report import EXAMPLES, write_report
from dataset.novels.shards import ShardWriter

MOST_EXAMPLES_OF_BOOK = 2


@dataclass
class Written:
    """What `write_collection` leaves, beside the files.

    Attributes:
        books: all records, complete.
        pairs: rows of duplicates.jsonl.
        left_out: chapters by reason.
        skipped: (source, reason) of files that are no texts.
        rows_of: rows of each file that has rows.
    """

    books: list[BookRecord]
    pairs: list[dict[str, Any]]
    left_out: Counter[str]
    skipped: Sequence[tuple[str, str]]
    rows_of: dict[str, int]


def read_shelves(artefacts: Sequence[Path]) -> list[Shelf]:
    """The records of all source files, in the order of these."""
    shelves: list[Shelf] = []
    first = 0
    for artefact in artefacts:
        shelf = Shelf(artefact, first, read_book_records(artefact))
        shelves.append(shelf)
        first += len(shelf.books)
    return shelves


def write_collection(
    shelves: Sequence[Shelf],
    skipped: Sequence[tuple[str, str]],
    options: CollectionOptions,
    shown_options: Mapping[str, Any],
    folder: Path,
) -> Written:
    """Write everything but the manifest.

    Args:
        shelves: the books; some can be used.
        skipped: (source, reason) of files that are no texts.
        options: of the run.
        shown_options: for the report.
        folder: where to write; it is empty.

    Raises:
        UserError: there is no such book as `options.held_out` names.
    """
    artefacts = [shelf.artefact for shelf in shelves]
    books = [book for shelf in shelves for book in shelf.books]
    decisions = compare_books(shelves, options)
    _make_names_unique(books)
    left_out: Counter[str] = Counter()
    rows_of = _write_chapters(shelves, books, decisions, options, folder, left_out)
    no_texts = [*skipped, *_skipped_members(artefacts)]
    rows_of["left_out.jsonl"] += _write_skipped(no_texts, folder / "left_out.jsonl")
    rows_of["rejected.jsonl"] = _join_files([artefact / REMOVED for artefact in artefacts], folder / "rejected.jsonl")
    rows_of["books.jsonl"] = _write_rows(map(asdict, books), folder / "books.jsonl")
    rows_of["duplicates.jsonl"] = _write_rows(decisions.pairs, folder / "duplicates.jsonl")
    examples = _examples(folder / "rejected.jsonl")
    write_report(books, decisions.pairs, examples, shown_options, folder / "report.html", no_texts)
    return Written(books, decisions.pairs, left_out, skipped, rows_of)


def _make_names_unique(books: Sequence[BookRecord]) -> None:
    """Books of one name get their source behind it: rows of a training file that share a name are one document."""
    counts = Counter(book.name for book in books)
    for book in books:
        if counts[book.name] > 1:
            book.name = f"{book.name} ({book.source})"


def _write_chapters(
    shelves: Sequence[Shelf],
    books: Sequence[BookRecord],
    decisions: Decisions,
    options: CollectionOptions,
    folder: Path,
    left_out: Counter[str],
) -> dict[str, int]:
    """Every chapter into a file of its split, or into left_out.jsonl; completes the records."""
    writers = {
        split: ShardWriter(folder, split, options.format, options.shard_megabytes * 10**6)
        for split in ("train", "held_out")
    }
    rows_left_out = 0
    with (folder / "left_out.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for place, chapter, row in _chapters(shelves):
            book = books[place]
            row["book"] = book.name
            reason, other = _why_left_out(book, decisions, place, chapter)
            if reason:
                file.write(json_line(row | {"reason": reason, "other": other}))
                left_out[reason.partition(":")[0]] += 1
                rows_left_out += 1
                book.duplicate_chapters += not book.refused
            else:
                writers[book.split].add(row)
                book.characters_out += book.chapter_characters[chapter]
    for writer in writers.values():
        writer.close()
    return writers["train"].rows_of | writers["held_out"].rows_of | {"left_out.jsonl": rows_left_out}


def _why_left_out(book: BookRecord, decisions: Decisions, place: int, chapter: int) -> tuple[str, str]:
    """Reason and other place; "" twice for a chapter that is kept."""
    if book.refused:
        return f"refused: {book.refused}", ""
    decision = decisions.of_book[place][chapter]
    return decision.reason, name_place(decision.other) if decision.other else ""


def _chapters(shelves: Sequence[Shelf]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(place of the book, place of the chapter in it, its row) of all chapters."""
    for shelf in shelves:
        book, chapter = -1, 0
        for row in read_chapters(shelf.artefact):
            chapter = chapter + 1 if row["book"] == book else 0
            book = row["book"]
            yield shelf.first + book, chapter, row


def _skipped_members(artefacts: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(source, reason) of members of archives that are no texts."""
    for artefact in artefacts:
        for line in (artefact / SKIPPED).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["source"], row["reason"]


def _write_skipped(skipped: Sequence[tuple[str, str]], path: Path) -> int:
    """Files and members of archives that are no texts go to the end of left_out.jsonl, without a text."""
    empty = dict.fromkeys(("text", "book", "chapter", "title"), "")
    with path.open("a", encoding="utf-8", newline="\n") as file:
        for source, reason in skipped:
            file.write(json_line(empty | {"source": source, "reason": reason, "other": ""}))
    return len(skipped)


def _join_files(paths: Sequence[Path], output: Path) -> int:
    """One after the other; how many lines they have."""
    lines = 0
    with output.open("wb") as joined:
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    lines += block.count(b"\n")
                    joined.write(block)
    return lines


def _write_rows(rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


def _examples(rejected: Path) -> dict[str, list[dict[str, Any]]]:
    """Removed lines for the report, by rule; of each book a few, so that many books are seen."""
    examples: dict[str, list[dict[str, Any]]] = {}
    of_book: Counter[tuple[str, str]] = Counter()
    with rejected.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            row = json.loads(line)
            chosen = examples.setdefault(row["rule"], [])
            key = (row["rule"], row["source"])
            if "line" in row and len(chosen) < EXAMPLES and of_book[key] < MOST_EXAMPLES_OF_BOOK:
                of_book[key] += 1
                chosen.append({"source": row["source"], "line": row["line"], "text": row["text"]})
    return examples
