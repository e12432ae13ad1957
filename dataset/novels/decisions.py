"""What the comparison of all books means: which are held out, which chapters are left out, which pairs are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.novels.artefacts import FINGERPRINTS
from dataset.novels.duplicates.near_duplicates import BookPrints, Place, Thresholds, find_duplicates, load_fingerprints
from dataset.novels.duplicates.split import Decision, assign_splits, decide
from dataset.novels.records import BookRecord


@dataclass(frozen=True)
class CollectionOptions:
    """What decides about the collection as a whole.

    Attributes:
        format: "parquet" or "jsonl".
        shard_megabytes: of UTF-8 text in a file.
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


@dataclass(frozen=True)
class Shelf:
    """The books of one source file.

    Attributes:
        artefact: the folder of what was prepared.
        first: place of its first book among all books.
        books: its records, in order.
    """

    artefact: Path
    first: int
    books: list[BookRecord]


@dataclass(frozen=True)
class Decisions:
    """About a whole collection.

    Attributes:
        pairs: rows of duplicates.jsonl: {"kind", "level", "first", "second", "similarity"}.
        of_book: place of a book -> what becomes of each of its chapters; none for a book that is refused.
    """

    pairs: list[dict[str, Any]]
    of_book: dict[int, list[Decision]]


def compare_books(shelves: Sequence[Shelf], options: CollectionOptions) -> Decisions:
    """Compare all books that can be used, and note the split of each in its record.

    Raises:
        UserError: there is no such book as `options.held_out` names, or it leaves nothing to train on.
    """
    usable: list[tuple[int, BookRecord]] = []
    prints: list[BookPrints] = []
    for shelf in shelves:
        of_books = load_fingerprints(shelf.artefact / FINGERPRINTS)
        for place, (book, marks) in enumerate(zip(shelf.books, of_books, strict=True), start=shelf.first):
            if not book.refused:
                usable.append((place, book))
                prints.append(BookPrints(book.name, book.source, marks))
    threshold = options.near_duplicate_threshold
    thresholds = Thresholds(near=threshold, contained=threshold)
    duplicates = find_duplicates(prints, thresholds)
    splits = assign_splits(prints, duplicates, options.held_out, options.held_out_share, options.seed)
    for (_, book), split in zip(usable, splits, strict=True):
        book.split = split
    decisions = decide(prints, duplicates, splits, thresholds)
    pairs = [
        {"kind": pair.kind, "level": pair.level, "first": name_place(pair.first), "second": name_place(pair.second),
         "similarity": round(float(pair.similarity), 4)}
        for pair in duplicates.pairs
    ]  # fmt: skip
    return Decisions(pairs, {place: made for (place, _), made in zip(usable, decisions, strict=True)})


def name_place(place: Place) -> str:
    """As rows name their source: "a.zip!b.txt#3" for the third chapter, "a.zip!b.txt" for the book."""
    return f"{place.source}#{place.chapter}" if place.chapter else place.source
