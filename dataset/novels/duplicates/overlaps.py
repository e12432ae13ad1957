"""Which chapters of a collection share their shingles: exactly, by signature, by sample.

All comparisons look back: a chapter is compared with those before it in a given order of the books. Of the books that
have a shingle, only the first `PARTNERS` count as places where it stood before. So the work grows with the number of
shingles and not with its square, however many copies of a book there are; and a copy finds its original all the same,
as the original is among the first with each of its shingles, frequent ones apart.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dataset.novels.duplicates.shingles import PERMUTATIONS, SHINGLE, Fingerprints

PARTNERS = 4
LEAST_SHARED = 3
"""Sampled shingles that two texts have in common at least, before any share is made of them."""

_BANDS = 32  # of 4 rows: finds 99.99 % of the pairs that are alike by 0.8, 87 % by 0.5, and 0.02 % by 0.05
_AT_ONCE = 1 << 20  # shingles that are sorted together; 100 bytes each while they are
_PAIRS_AT_ONCE = 1 << 13
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_ENTRY = np.dtype([("key", "<u8"), ("count", "<i4")])


@dataclass(frozen=True)
class Collection:
    """The fingerprints of books, in the order in which they look back; chapters are numbered through from 0.

    Attributes:
        books: as given.
        firsts: (books + 1,) the number of the first chapter of each book, and of all chapters.
        book_of: (chapters,) int32, place of the book of each.
        characters: (chapters,) that count.
        sampled: (chapters,) how many shingles of each are in the sample.
    """

    books: Sequence[Fingerprints]
    firsts: np.ndarray
    book_of: np.ndarray
    characters: np.ndarray
    sampled: np.ndarray


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
    """Pairs of numbers, in rising order: the later one, an earlier one, and what they have in common."""

    later: np.ndarray
    earlier: np.ndarray
    value: np.ndarray

    def some(self, chosen: np.ndarray | slice) -> Pairs:
        """Those that a mask or a slice chooses."""
        return Pairs(self.later[chosen], self.earlier[chosen], self.value[chosen])

    def slice_of(self, later: int) -> slice:
        """Where the pairs of a later one stand."""
        begin, end = np.searchsorted(self.later, np.array([later, later + 1], self.later.dtype))
        return slice(int(begin), int(end))

    def rows(self) -> Iterator[tuple[int, int, float]]:
        """(later, earlier, value) of each."""
        return zip(self.later.tolist(), self.earlier.tolist(), self.value.tolist(), strict=True)


@dataclass(frozen=True)
class Shared:
    """Sampled shingles in common.

    Attributes:
        chapters: later chapter, earlier chapter, how many shingles of the later one stand first in the earlier one, of
            all chapters of its book.
        books: later book, earlier book, how many they have in common.
        distinct: (books,) different ones of each book.
    """

    chapters: Pairs
    books: Pairs
    distinct: np.ndarray


def same_digests(collection: Collection) -> Pairs:
    """Each chapter that equals an earlier one, with the first such; value 1. Empty chapters equal nothing."""
    if not len(collection.characters):
        return Pairs(*np.zeros((3, 0), np.int64))
    digests = np.concatenate([book.digests for book in collection.books])
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort((np.arange(len(words)), *words.T))
    same = np.zeros(len(order), bool)
    same[1:] = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))]
    kept = np.flatnonzero(same & (collection.characters[order] > 0))
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
        same = np.zeros(len(order), bool)
        same[1:] = key[order[1:]] == key[order[:-1]]
        places = np.flatnonzero(same)
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))[places]
        later = usable[order[places]].astype(np.uint64) << _HALF
        for earlier in (first, places - 1):
            found.append(np.unique(later | usable[order[earlier]].astype(np.uint64)))
    keys = np.unique(np.concatenate(found))
    later, earlier = _split(keys)
    value = np.zeros(len(keys))
    for begin in range(0, len(keys), _PAIRS_AT_ONCE):
        some = slice(begin, begin + _PAIRS_AT_ONCE)
        value[some] = (signatures[later[some]] == signatures[earlier[some]]).mean(axis=1)
    alike = value >= least
    return Pairs(later[alike], earlier[alike], value[alike])


def shared_shingles(collection: Collection, least: float = 0.0) -> Shared:
    """What chapters and books have in common with earlier ones.

    Works through the range of sampled shingles in slices, and through the chapters in parts, so that little more than
    the result is in memory.

    Args:
        collection: of the books.
        least: pairs of chapters matter from this share on: of the later chapter that stands in the book of the
            earlier one, or of the earlier chapter that stands in the later one. Others, and those with fewer than
            `LEAST_SHARED` shingles, are left out; all pairs of a chapter with a book are there or none.
    """
    total = int(collection.sampled.sum())
    slices = max(1, -(-total // _AT_ONCE))
    borders = [(i << 32) // slices for i in range(slices + 1)]
    books = _Counter()
    distinct = np.zeros(len(collection.books), np.int64)
    with contextlib.ExitStack() as files:
        chapters = _ChapterCounter(collection, slices, files)
        for low, high in zip(borders, borders[1:], strict=False):
            keys = _postings(collection, low, high)
            _count_slice(collection, keys, chapters, books, distinct)
        return Shared(chapters.pairs(least), books.pairs(), distinct)


def _postings(collection: Collection, low: int, high: int) -> np.ndarray:
    """(n,) uint64, sorted: shingle << 32 | chapter, of the shingles from `low` up to `high`."""
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
    new_shingle = np.ones(len(keys), bool)
    new_shingle[1:] = shingle[1:] != shingle[:-1]
    new_book = new_shingle.copy()
    new_book[1:] |= book[1:] != book[:-1]
    # The heads of a shingle: the first chapter that has it, of each book that has it. The first few heads are partners.
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
    """Counts pairs of chapters, of which most share a phrase or two and nothing that matters: on disk, until a part of
    the later chapters is complete and can be thinned out.

    Args:
        collection: of the books.
        parts: how many.
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
        borders = np.searchsorted(keys, firsts)
        for file, begin, end in zip(self._files, borders, borders[1:], strict=False):
            file.write(entries[begin:end].tobytes())

    def pairs(self, least: float) -> Pairs:
        """Those that matter."""
        found = [self._thinned(file, least) for file in self._files]
        return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _thinned(
        self, file: tempfile.SpooledTemporaryFile[bytes], least: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        file.seek(0)
        entries = np.frombuffer(file.read(), _ENTRY)
        order = np.argsort(entries["key"], kind="stable")
        keys, counts = entries["key"][order], entries["count"][order]
        new = np.ones(len(keys), bool)
        new[1:] = keys[1:] != keys[:-1]
        counts = np.add.reduceat(counts, np.flatnonzero(new)) if len(keys) else counts
        later, earlier = _split(keys[new])
        sampled, book = self._collection.sampled, self._collection.book_of[earlier]
        new_book = np.ones(len(later), bool)
        new_book[1:] = (later[1:] != later[:-1]) | (book[1:] != book[:-1])
        starts = np.flatnonzero(new_book)
        in_book = np.add.reduceat(counts, starts) if len(starts) else counts
        of_later = in_book >= np.maximum(LEAST_SHARED, least * sampled[later[starts]])
        of_earlier = counts >= np.maximum(LEAST_SHARED, least * sampled[earlier])
        whole = np.maximum.reduceat(of_earlier, starts) if len(starts) else of_earlier
        kept = (of_later | whole)[np.cumsum(new_book) - 1] if len(starts) else np.zeros(0, bool)
        return later[kept], earlier[kept], counts[kept]


class _Counter:
    """Counts pairs of numbers; holds those that differ, and while it merges, three times as much."""

    def __init__(self) -> None:
        self._parts = [(np.zeros(0, np.uint64), np.zeros(0, np.int32))]
        self._merged = 0
        self._waiting = 0

    def add(self, later: np.ndarray, earlier: np.ndarray) -> None:
        keys, counts = np.unique(later.astype(np.uint64) << _HALF | earlier.astype(np.uint64), return_counts=True)
        self._parts.append((keys, counts.astype(np.int32)))
        self._waiting += len(keys)
        # Only when much has come since the last time: each key is sorted a few times, not once a slice.
        if 2 * self._waiting > self._merged:
            self._merge()

    def pairs(self) -> Pairs:
        self._merge()
        keys, counts = self._parts[0]
        return Pairs(*_split(keys), counts)

    def _merge(self) -> None:
        keys = np.concatenate([keys for keys, _ in self._parts])
        counts = np.concatenate([counts for _, counts in self._parts])
        self._parts = []  # frees them
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        new = np.ones(len(keys), bool)
        new[1:] = keys[1:] != keys[:-1]
        if len(keys):
            counts = np.add.reduceat(counts, np.flatnonzero(new))
        self._parts = [(keys[new], counts)]
        self._merged, self._waiting = len(counts), 0


def _split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (keys >> _HALF).astype(np.uint32), (keys & _LOW).astype(np.uint32)
