"""Which chapters of a collection share their shingles: exactly, by signature, by sample.

Each chapter is compared with those before it in a given order of the books. Of the books that contain a shingle, only
the first `PARTNERS` count as earlier occurrences. So the work grows linearly with the number of shingles, however many
copies of a book there are; and a copy still finds its original, which is among the first with each of its shingles,
frequent ones apart.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from dataset.novels.duplicates.shingles import PERMUTATIONS, SHINGLE, Fingerprints

PARTNERS = 4
MIN_SHARED = 3
"""Sampled shingles that two texts must have in common before a share is computed from them."""
RELIABLE = 8
"""Shingles of a sample below which a text is too short to be judged by it: all may be changed ones."""

_BANDS = 32  # of 4 rows: finds 99.99 % of the pairs with similarity 0.8, 87 % at 0.5, and 0.02 % at 0.05
_BATCH = 1 << 20  # shingles that are sorted together, at 100 bytes each meanwhile
_PAIR_BATCH = 1 << 13
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_ENTRY = np.dtype([("key", "<u8"), ("count", "<i4")])
Found = TypeVar("Found")


@dataclass(frozen=True)
class Collection:
    """The fingerprints of books, in the order in which they are compared; chapters are numbered through from 0.

    Attributes:
        books: as given.
        firsts: (books + 1,) the number of the first chapter of each book, and the count of all chapters.
        book_of: (chapters,) int32, index of the book of each.
        characters: (chapters,) that count.
        sampled: (chapters,) number of shingles of each in the sample.
    """

    books: Sequence[Fingerprints]
    firsts: np.ndarray
    book_of: np.ndarray
    characters: np.ndarray
    sampled: np.ndarray


def follow_neighbours(found: dict[int, Found], short: np.ndarray, book_of: np.ndarray) -> None:
    """Let chapters that are too short to judge follow the one beside them: other divisions leave such fragments.

    Args:
        found: chapter -> what was found of it; those beside a chapter with an entry get the same one.
        short: chapters that may follow, ascending.
        book_of: (chapters,) index of the book of each, beyond which none follows.
    """
    chapters = short.tolist()
    for ordered, step in ((chapters, -1), (chapters[::-1], 1)):
        for chapter in ordered:
            beside = chapter + step
            if beside in found and chapter not in found and book_of[beside] == book_of[chapter]:
                found[chapter] = found[beside]


def collect(books: Sequence[Fingerprints]) -> Collection:
    """Number the chapters of all books."""
    counts = np.array([len(book) for book in books], np.int64)
    nothing = [np.zeros(0, np.int64)]
    return Collection(
        books,
        np.concatenate([[0], np.cumsum(counts)]),
        np.repeat(np.arange(len(books), dtype=np.int32), counts),
        np.concatenate(nothing + [book.characters for book in books]),
        np.concatenate(nothing + [np.diff(book.starts) for book in books]),
    )


@dataclass(frozen=True)
class Pairs:
    """Pairs of numbers, in ascending order: the later one, an earlier one, and what they have in common."""

    later: np.ndarray
    earlier: np.ndarray
    value: np.ndarray

    def some(self, chosen: np.ndarray | slice) -> Pairs:
        """Those selected by a mask or a slice."""
        return Pairs(self.later[chosen], self.earlier[chosen], self.value[chosen])

    def slice_of(self, later: int) -> slice:
        """The range of the pairs of a later one."""
        begin, end = np.searchsorted(self.later, np.array([later, later + 1], self.later.dtype))
        return slice(int(begin), int(end))

    def rows(self) -> Iterator[tuple[int, int, float]]:
        """(later, earlier, value) of each."""
        return zip(self.later.tolist(), self.earlier.tolist(), self.value.tolist(), strict=True)


@dataclass(frozen=True)
class Shared:
    """Sampled shingles in common.

    Attributes:
        chapters: later chapter, earlier chapter, number of shingles of the later one whose first occurrence in the
            earlier one's book is in the earlier one.
        books: later book, earlier book, number of shingles in common.
        distinct: (books,) number of distinct shingles of each book.
    """

    chapters: Pairs
    books: Pairs
    distinct: np.ndarray


def run_starts(*columns: np.ndarray) -> np.ndarray:
    """(n,) bool: where a run of equal rows starts; of n rows whose columns are given, each (n,)."""
    starts = np.ones(len(columns[0]), bool)
    starts[1:] = functools.reduce(np.logical_or, (column[1:] != column[:-1] for column in columns))
    return starts


def sum_runs(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(runs,): the sum of the values of each run.

    Args:
        values: (n,).
        starts: (runs,) index of the first value of each run; none if there are no values.
    """
    return np.add.reduceat(values, starts) if len(starts) else values


def same_digests(collection: Collection) -> Pairs:
    """Each chapter that equals an earlier one, with the first such; value 1. Empty chapters equal nothing."""
    if not len(collection.characters):
        return Pairs(*np.zeros((3, 0), np.int64))
    digests = np.concatenate([book.digests for book in collection.books])
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort((np.arange(len(words)), *words.T))
    new = run_starts(*words[order].T)
    firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    kept = np.flatnonzero(~new & (collection.characters[order] > 0))
    kept = kept[np.argsort(order[kept])]
    return Pairs(order[kept], firsts[kept], np.ones(len(kept)))


def similar_signatures(collection: Collection, least: float) -> Pairs:
    """Pairs whose signatures agree in a share of `least` or more; value is that share.

    Candidates share a band of their signatures with the first or the nearest earlier chapter that has it.
    """
    usable = np.flatnonzero(collection.characters >= SHINGLE)
    signatures = np.concatenate(
        [np.zeros((0, PERMUTATIONS), np.uint32), *(book.signatures for book in collection.books)]
    )
    found = [np.zeros(0, np.uint64)]
    rows = PERMUTATIONS // _BANDS
    for band in range(_BANDS):
        part = np.ascontiguousarray(signatures[usable, band * rows : (band + 1) * rows]).view(np.uint64)
        key = part[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ part[:, 1]
        order = np.argsort(key, kind="stable")
        new = run_starts(key[order])
        places = np.flatnonzero(~new)
        first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))[places]
        later = usable[order[places]].astype(np.uint64) << _HALF
        for earlier in (first, places - 1):
            found.append(np.unique(later | usable[order[earlier]].astype(np.uint64)))
    keys = np.unique(np.concatenate(found))
    later, earlier = _split(keys)
    value = np.zeros(len(keys))
    for begin in range(0, len(keys), _PAIR_BATCH):
        some = slice(begin, begin + _PAIR_BATCH)
        value[some] = (signatures[later[some]] == signatures[earlier[some]]).mean(axis=1)
    alike = value >= least
    return Pairs(later[alike], earlier[alike], value[alike])


def shared_shingles(collection: Collection, least: float = 0.0) -> Shared:
    """What chapters and books have in common with earlier ones.

    Processes the range of sampled shingles in slices, and the chapters in parts, so that little more than the result is
    in memory.

    Args:
        collection: of the books.
        least: min share of a pair of chapters: of the later chapter that is contained in the book of the earlier one,
            or of the earlier chapter that is contained in the later one. Others, and those with fewer than
            `MIN_SHARED` shingles, are left out; of the pairs of a chapter with a book, all are kept or none.
    """
    slices = max(1, -(-int(collection.sampled.sum()) // _BATCH))
    boundaries = [(i << 32) // slices for i in range(slices + 1)]
    books = _Counter()
    distinct = np.zeros(len(collection.books), np.int64)
    with contextlib.ExitStack() as files:
        chapters = _ChapterCounter(collection, slices, files)
        for low, high in pairwise(boundaries):
            _count_slice(collection, _postings(collection, low, high), chapters, books, distinct)
        return Shared(chapters.pairs(least), books.pairs(), distinct)


def _postings(collection: Collection, low: int, high: int) -> np.ndarray:
    """(n,) uint64, sorted: shingle << 32 | chapter, of the shingles from `low` up to, not including, `high`."""
    found = [np.zeros(0, np.uint64)]
    for book, first in zip(collection.books, collection.firsts, strict=False):
        places = np.flatnonzero((book.samples >= low) & (book.samples <= high - 1))
        chapters = np.searchsorted(book.starts, places, side="right") - 1 + first
        found.append(book.samples[places].astype(np.uint64) << _HALF | chapters.astype(np.uint64))
    keys = np.concatenate(found)
    keys.sort()
    return keys


def _count_slice(
    collection: Collection, keys: np.ndarray, chapters: _ChapterCounter, books: _Counter, distinct: np.ndarray
) -> None:
    shingle, chapter = _split(keys)
    book = collection.book_of[chapter]
    new_shingle = run_starts(shingle)
    new_book = run_starts(shingle, book)
    # The heads of a shingle: of each book that has it the first chapter that does. The first few heads are partners.
    heads = np.flatnonzero(new_book)
    distinct += np.bincount(book[heads], minlength=len(distinct))
    first_head = np.flatnonzero(new_shingle[heads])
    group = np.cumsum(new_shingle) - 1
    many = np.append(first_head[1:], len(heads)) - first_head
    repeated = np.flatnonzero(~new_shingle)
    for number in range(PARTNERS):
        enough = repeated[many[group[repeated]] > number]
        partner = heads[first_head[group[enough]] + number]
        before = partner < enough
        enough, partner = enough[before], partner[before]
        chapters.add(chapter[enough], chapter[partner])
        lead = new_book[enough]
        books.add(book[enough[lead]], book[partner[lead]])


class _ChapterCounter:
    """Counts pairs of chapters, most of which share only a phrase: on disk, until a part of the later chapters is
    complete and can be filtered.

    Args:
        collection: of the books.
        parts: number of parts.
        files: closes the temporary files.
    """

    def __init__(self, collection: Collection, parts: int, files: contextlib.ExitStack) -> None:
        self._collection = collection
        spooled = (tempfile.SpooledTemporaryFile(max_size=1 << 16) for _ in range(parts))  # noqa: SIM115
        self._files = [files.enter_context(file) for file in spooled]

    def add(self, later: np.ndarray, earlier: np.ndarray) -> None:
        keys, counts = np.unique(later.astype(np.uint64) << _HALF | earlier.astype(np.uint64), return_counts=True)
        entries = np.empty(len(keys), _ENTRY)
        entries["key"], entries["count"] = keys, counts
        parts = len(self._files)
        chapters = len(self._collection.book_of)
        firsts = np.array([-(-chapters * part // parts) for part in range(parts + 1)], np.uint64) << _HALF
        for file, (start, end) in zip(self._files, pairwise(np.searchsorted(keys, firsts)), strict=True):
            file.write(entries[start:end].tobytes())

    def pairs(self, least: float) -> Pairs:
        """The pairs that `shared_shingles` keeps."""
        found = [self._filtered(file, least) for file in self._files]
        return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _filtered(
        self, file: tempfile.SpooledTemporaryFile[bytes], least: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        file.seek(0)
        entries = np.frombuffer(file.read(), _ENTRY)
        keys, counts = _merge_counts([(entries["key"], entries["count"])])
        later, earlier = _split(keys)
        sampled = self._collection.sampled
        new_book = run_starts(later, self._collection.book_of[earlier])
        starts = np.flatnonzero(new_book)
        of_later = sum_runs(counts, starts) >= np.maximum(MIN_SHARED, least * sampled[later[starts]])
        of_earlier = counts >= np.maximum(MIN_SHARED, least * sampled[earlier])
        whole = np.maximum.reduceat(of_earlier, starts) if len(starts) else of_earlier
        kept = (of_later | whole)[np.cumsum(new_book) - 1] if len(starts) else np.zeros(0, bool)
        return later[kept], earlier[kept], counts[kept]


class _Counter:
    """Counts pairs of numbers; memory holds the distinct ones, and while it merges, three times as much."""

    def __init__(self) -> None:
        self._parts = [(np.zeros(0, np.uint64), np.zeros(0, np.int32))]
        self._merged = 0
        self._waiting = 0

    def add(self, later: np.ndarray, earlier: np.ndarray) -> None:
        keys, counts = np.unique(later.astype(np.uint64) << _HALF | earlier.astype(np.uint64), return_counts=True)
        self._parts.append((keys, counts.astype(np.int32)))
        self._waiting += len(keys)
        # Merge only after enough growth, so that each key is sorted a few times, not once per slice.
        if 2 * self._waiting > self._merged:
            self._parts = [_merge_counts(self._parts)]
            self._merged, self._waiting = len(self._parts[0][0]), 0

    def pairs(self) -> Pairs:
        keys, counts = _merge_counts(self._parts)
        return Pairs(*_split(keys), counts)


def _merge_counts(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct keys, and the sum of the counts of each. Empties `parts`, to free memory before the sort."""
    keys = np.concatenate([keys for keys, _ in parts])
    counts = np.concatenate([counts for _, counts in parts])
    parts.clear()
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    new = run_starts(keys)
    return keys[new], sum_runs(counts, np.flatnonzero(new))


def _split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (keys >> _HALF).astype(np.uint32), (keys & _LOW).astype(np.uint32)
