"""The steps that need all books at once: duplicates, the split, and the files that training reads.

Texts are streamed; of the whole collection only records, fingerprints and decisions are in memory.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.novels.artefacts import BOOKS, CHAPTERS, FINGERPRINTS, REMOVED, SKIPPED, json_line, read_rows
from dataset.novels.duplicates.near_duplicates import BookPrints, Location, Thresholds, find_duplicates
from dataset.novels.duplicates.shingles import load_fingerprints
from dataset.novels.duplicates.split import NOTHING, Decision, assign_splits, decide
from dataset.novels.held_out.recognition import recognise
from dataset.novels.held_out.works import HeldOutWorks
from dataset.novels.records import BookRecord
from dataset.novels.report.report import EXAMPLES, write_report
from dataset.novels.shards import ShardWriter

MAX_EXAMPLES_PER_BOOK = 2


@dataclass(frozen=True)
class CollectionOptions:
    """Options that affect the collection as a whole.

    Attributes:
        format: "parquet" or "jsonl".
        shard_megabytes: of UTF-8 text per file.
        held_out: names or sources of books that are kept out of training.
        held_out_share: share of the books that is, chosen by `seed`, in [0, 1).
        near_duplicate_threshold: similarity, in (0, 1], from which chapters count as the same.
    """

    format: str = "parquet"
    shard_megabytes: int = 256
    held_out: tuple[str, ...] = ()
    held_out_share: float = 0.05
    seed: int = 42
    near_duplicate_threshold: float = 0.8


@dataclass
class CollectionResult:
    """What `write_collection` returns, beside the files.

    Attributes:
        books: all records, complete.
        pairs: rows of duplicates.jsonl.
        left_out: chapters by reason.
        skipped: (source, reason) of files that are not texts.
        rows_of: row count of each file that has rows.
    """

    books: list[BookRecord]
    pairs: list[dict[str, Any]]
    left_out: Counter[str]
    skipped: Sequence[tuple[str, str]]
    rows_of: dict[str, int]


def read_records(artefacts: Iterable[Path]) -> dict[Path, list[BookRecord]]:
    """Artefact of a source file -> the records of its books, in order."""
    return {
        artefact: [BookRecord(**row) for row in json.loads((artefact / BOOKS).read_text(encoding="utf-8"))]
        for artefact in artefacts
    }


def write_collection(
    sources: Mapping[Path, Sequence[BookRecord]],
    skipped: Sequence[tuple[str, str]],
    options: CollectionOptions,
    shown_options: Mapping[str, Any],
    folder: Path,
    listed: HeldOutWorks | None = None,
    sha256_of: Mapping[str, str] | None = None,
) -> CollectionResult:
    """Write everything but the manifest.

    Args:
        sources: from `read_records`; some of the books are usable.
        skipped: (source, reason) of files that are not texts.
        options: of the run.
        shown_options: for the report.
        folder: to write to; empty.
        listed: works that are held out, too.
        sha256_of: source -> hash of the file, by which listed works are recognised.

    Raises:
        UserError: no book matches a name of `options.held_out`.
    """
    books = [book for records in sources.values() for book in records]
    pairs, decisions = _compare_books(sources, options, listed, sha256_of or {})
    # Books that share a name get their source appended: rows of a training file that share a name are one document.
    counts = Counter(book.name for book in books)
    for book in books:
        if counts[book.name] > 1:
            book.name = f"{book.name} ({book.source})"
    rows_of, left_out = _write_chapters(sources, books, decisions, options, folder)
    members = (row for artefact in sources for row in read_rows(artefact / SKIPPED))
    not_texts = [*skipped, *((row["source"], row["reason"]) for row in members)]
    empty = dict.fromkeys(("text", "book", "chapter", "title"), "")
    skipped_rows = (empty | {"source": source, "reason": reason, "other": ""} for source, reason in not_texts)
    rows_of["left_out.jsonl"] = left_out.total() + _write_rows(skipped_rows, folder / "left_out.jsonl", mode="a")
    with (folder / "rejected.jsonl").open("wb") as joined:
        for artefact in sources:
            with (artefact / REMOVED).open("rb") as file:
                shutil.copyfileobj(file, joined)
    examples, rows_of["rejected.jsonl"] = _examples(folder / "rejected.jsonl")
    rows_of["books.jsonl"] = _write_rows(map(asdict, books), folder / "books.jsonl")
    rows_of["duplicates.jsonl"] = _write_rows(pairs, folder / "duplicates.jsonl")
    write_report(books, pairs, examples, shown_options, folder / "report.html", not_texts)
    return CollectionResult(books, pairs, left_out, skipped, rows_of)


def _compare_books(
    sources: Mapping[Path, Sequence[BookRecord]],
    options: CollectionOptions,
    listed: HeldOutWorks | None,
    sha256_of: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[int, list[Decision]]]:
    """Compare all books that can be used, and store the split of each in its record.

    Returns:
        Rows of duplicates.jsonl, {"kind", "level", "first", "second", "similarity"}; and by the index of each book what
        becomes of each of its chapters.
    """
    all_prints = (prints for artefact in sources for prints in load_fingerprints(artefact / FINGERPRINTS))
    books = zip((book for records in sources.values() for book in records), all_prints, strict=True)
    usable = [(index, book, prints) for index, (book, prints) in enumerate(books) if not book.refused]
    prints = [BookPrints(book.name, book.source, fingerprints) for _, book, fingerprints in usable]
    thresholds = Thresholds(near=options.near_duplicate_threshold, contained=options.near_duplicate_threshold)
    duplicates = find_duplicates(prints, thresholds)
    reserved = recognise(listed, prints, duplicates, sha256_of) if listed else NOTHING
    splits = assign_splits(prints, duplicates, options.held_out, options.held_out_share, options.seed, reserved)
    for number, ((_, book, _), split) in enumerate(zip(usable, splits, strict=True)):
        book.split = split
        book.left_out = reserved.left_out[number] if split == "left_out" else ""
    decisions = decide(prints, duplicates, splits, thresholds, reserved)
    pairs = [
        {"kind": pair.kind, "level": pair.level, "first": _source_of(pair.first), "second": _source_of(pair.second),
         "similarity": round(float(pair.similarity), 4)}
        for pair in duplicates.pairs
    ]  # fmt: skip
    return pairs, {index: made for (index, _, _), made in zip(usable, decisions, strict=True)}


def _source_of(location: Location) -> str:
    """As rows name their source: "a.zip!b.txt#3" for the third chapter, "a.zip!b.txt" for the book."""
    return f"{location.source}#{location.chapter}" if location.chapter else location.source


def _write_chapters(
    sources: Mapping[Path, Sequence[BookRecord]],
    books: Sequence[BookRecord],
    decisions: Mapping[int, Sequence[Decision]],
    options: CollectionOptions,
    folder: Path,
) -> tuple[dict[str, int], Counter[str]]:
    """Write every chapter to a shard of its split, or to left_out.jsonl; completes the records.

    Returns:
        Row count of each shard; left-out chapters by reason.
    """
    left_out: Counter[str] = Counter()
    writers = {
        split: ShardWriter(folder, split, options.format, options.shard_megabytes * 10**6)
        for split in ("train", "held_out")
    }
    with (folder / "left_out.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for index, chapter, row in _chapters(sources):
            book = books[index]
            row["book"] = book.name
            decision = Decision("left_out", f"refused: {book.refused}") if book.refused else decisions[index][chapter]
            if decision.reason:
                other = _source_of(decision.other) if decision.other else ""
                file.write(json_line(row | {"reason": decision.reason, "other": other}))
                left_out[decision.reason.partition(":")[0]] += 1
                book.duplicate_chapters += not (book.refused or book.left_out)
            else:
                writers[book.split].add(row)
                book.characters_out += book.chapter_characters[chapter]
    for writer in writers.values():
        writer.close()
    return writers["train"].rows_of | writers["held_out"].rows_of, left_out


def _chapters(sources: Mapping[Path, Sequence[BookRecord]]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(index of the book, index of the chapter in it, its row) of all chapters."""
    first = 0
    for artefact, records in sources.items():
        book, chapter = -1, 0
        for row in read_rows(artefact / CHAPTERS):
            chapter = chapter + 1 if row["book"] == book else 0
            book = row["book"]
            yield first + book, chapter, row
        first += len(records)


def _write_rows(rows: Iterable[dict[str, Any]], path: Path, mode: str = "w") -> int:
    """Write rows as JSON lines and return their number."""
    count = 0
    with path.open(mode, encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


def _examples(rejected: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Removed lines for the report, by rule, few per book to show many books; and the number of all rows."""
    examples: dict[str, list[dict[str, Any]]] = {}
    per_book: Counter[tuple[str, str]] = Counter()
    count = 0
    for row in read_rows(rejected):
        count += 1
        chosen = examples.setdefault(row["rule"], [])
        key = (row["rule"], row["source"])
        if "line" in row and len(chosen) < EXAMPLES and per_book[key] < MAX_EXAMPLES_PER_BOOK:
            per_book[key] += 1
            chosen.append({"source": row["source"], "line": row["line"], "text": row["text"]})
    return examples, count
