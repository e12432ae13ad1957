"""Books and chapters that say the same: equal, alike, or one inside the other.

Measured on 13 editions of ten classics: two editions of one novel share 70 % of their shingles (chapter by chapter 35 %
at least, 69 % in the middle), a book stands in a collection with 92 % of its own and 41 % of the collection's; of two
different books never more than 0.9 % of one stand in the other, of 5,000 characters of a book never more than 2.3 % in
another book, of 1,000 characters 3.9 %, of 300 characters 7.8 %. The thresholds lie between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dataset.novels.duplicates.overlaps import (
    LEAST_SHARED,
    Collection,
    Pairs,
    Shared,
    collect,
    same_digests,
    shared_shingles,
    similar_signatures,
)
from dataset.novels.duplicates.shingles import VERSION, Fingerprints, fingerprint, load_fingerprints, save_fingerprints

__all__ = [
    "VERSION",
    "BookPrints",
    "Duplicates",
    "Fingerprints",
    "Pair",
    "Place",
    "Thresholds",
    "find_duplicates",
    "fingerprint",
    "load_fingerprints",
    "save_fingerprints",
]


@dataclass(frozen=True)
class Thresholds:
    """From where on two texts count as the same; shares in [0, 1].

    Attributes:
        near: similarity (Jaccard) of two chapters that are near-duplicates.
        contained: share of a chapter that stands in one other book, from which on the chapter is a repeat.
        related: the same, where the two books are related: more of the chapter is old than new.
        book: share of a book that stands in another one, from which on the two are related.
        edition: share of each in the other, from which on two books are editions of one book.
        leak: share, or similarity, from which on a chapter overlaps a held-out book. Low, so as to be on the safe
            side: with 5 % of its characters changed a text keeps a share of 0.77, with 20 % 0.33.
    """

    near: float = 0.8
    contained: float = 0.8
    related: float = 0.5
    book: float = 0.3
    edition: float = 0.5
    leak: float = 0.2


DEFAULTS = Thresholds()


@dataclass(frozen=True)
class BookPrints:
    """A book, by what finding its repeats takes.

    Attributes:
        name: of the book.
        source: where it comes from.
        prints: of its chapters, in order.
    """

    name: str
    source: str
    prints: Fingerprints


class Place(NamedTuple):
    """A chapter of a book, or a whole one."""

    source: str
    book: str
    chapter: int
    """From 1; 0 for the whole book."""


Kind = Literal["exact", "near", "contained"]


class Pair(NamedTuple):
    """Two places that say the same.

    "exact": what counts in them is equal. "near": alike; of books, editions of one. "contained": much of the first
    stands in the second; of a chapter, in the second and other chapters of its book.
    """

    kind: Kind
    level: Literal["book", "chapter"]
    first: Place
    """The shorter book, or a chapter of it; of "contained" what stands in the second."""
    second: Place
    similarity: float
    """Jaccard similarity; of "contained" the share of the first."""


@dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` finds.

    Attributes:
        pairs: books before chapters; by source, name and chapter of the first place, then of the second.
        editions: for each book, the place of the longest edition of it among the books given: often its own.
        related: pairs of places of books, both ways round, of which much of one stands in the other.
    """

    pairs: list[Pair]
    editions: list[int]
    related: frozenset[tuple[int, int]]

    def are_related(self, first: int, second: int) -> bool:
        """Whether two different books are editions of one, or much of one stands in the other."""
        return first != second and (self.editions[first] == self.editions[second] or (first, second) in self.related)


def find_duplicates(books: Sequence[BookPrints], thresholds: Thresholds = DEFAULTS) -> Duplicates:
    """Pairs of books and of chapters, inside a book too. The order of `books` makes no difference to the pairs.

    A chapter is paired with chapters of larger books, or of its own before it, and of several of them not with every
    one: equal copies with the first, others with a few. Time grows with n log n; memory holds, beside the fingerprints,
    some bytes for each pair of chapters that have a shingle in common.
    """
    order = order_of(books)
    collection = collect([books[i].prints for i in order])
    shared = shared_shingles(collection, min(thresholds.related, thresholds.contained))
    pairs, editions, related = _compare_books(books, order, shared, thresholds)
    found = Duplicates(pairs, editions, frozenset(related))
    pairs += _compare_chapters(books, order, collection, shared.chapters, found, thresholds)
    pairs.sort(key=_sort_key)
    return found


def order_of(books: Sequence[BookPrints], first: Sequence[bool] = ()) -> list[int]:
    """Places of the books, in the order in which they are kept: those marked as `first`, the longest, by source.

    The longest of several editions is the one least likely to lack something; an excerpt tears no hole into it.
    """
    marks = first or [False] * len(books)
    return sorted(
        range(len(books)),
        key=lambda i: (not marks[i], -int(books[i].prints.characters.sum()), books[i].source, books[i].name),
    )


def shares_in_books(collection: Collection, chapters: Pairs) -> Pairs:
    """Chapter, earlier book (or its own), share of the chapter that stands there."""
    book = collection.book_of[chapters.earlier]
    new = np.ones(len(book), bool)
    new[1:] = (chapters.later[1:] != chapters.later[:-1]) | (book[1:] != book[:-1])
    starts = np.flatnonzero(new)
    shared = np.add.reduceat(chapters.value, starts) if len(starts) else chapters.value
    later = chapters.later[starts]
    enough = shared >= LEAST_SHARED
    return Pairs(later[enough], book[starts][enough], shared[enough] / collection.sampled[later[enough]])


def place_of(books: Sequence[BookPrints], order: Sequence[int], collection: Collection, chapter: int) -> Place:
    """The chapter of that number in the collection made of the books in that order."""
    place = int(collection.book_of[chapter])
    book = books[order[place]]
    return Place(book.source, book.name, chapter - int(collection.firsts[place]) + 1)


def fullest_match(collection: Collection, chapters: Pairs, later: int, book: int) -> int:
    """Of the chapters of an earlier book, the one that has most of a later chapter."""
    some = chapters.some(chapters.slice_of(later))
    there = np.flatnonzero(collection.book_of[some.earlier] == book)
    return int(some.earlier[there[np.argmax(some.value[there])]])


def _compare_books(
    books: Sequence[BookPrints], order: Sequence[int], shared: Shared, thresholds: Thresholds
) -> tuple[list[Pair], list[int], set[tuple[int, int]]]:
    pairs = []
    # In terms of places in `order` until the end: the smaller one of two editions points at the larger one.
    larger = list(range(len(books)))
    related = set()
    for later, earlier, count in shared.books.rows():
        sizes = int(shared.distinct[later]), int(shared.distinct[earlier])
        shares = count / sizes[0], count / sizes[1]
        if count < LEAST_SHARED or max(shares) < thresholds.book:
            continue
        kind: Kind = "contained"
        similarity = max(shares)
        inner, outer = (later, earlier) if shares[0] >= shares[1] else (earlier, later)
        if min(shares) >= thresholds.edition:
            roots = sorted((_root(larger, later), _root(larger, earlier)))
            larger[roots[1]] = roots[0]
            kind, similarity = "near", count / (sum(sizes) - count)
            inner, outer = later, earlier
            if _equal(books[order[later]].prints, books[order[earlier]].prints):
                kind, similarity = "exact", 1.0
        related |= {(order[inner], order[outer]), (order[outer], order[inner])}
        first, second = (Place(books[order[i]].source, books[order[i]].name, 0) for i in (inner, outer))
        pairs.append(Pair(kind, "book", first, second, similarity))
    editions = [0] * len(books)
    for place, book in enumerate(order):
        editions[book] = order[_root(larger, place)]
    return pairs, editions, related


def _root(larger: Sequence[int], place: int) -> int:
    while larger[place] != place:
        place = larger[place]
    return place


def _equal(first: Fingerprints, second: Fingerprints) -> bool:
    return np.array_equal(first.digests[first.characters > 0], second.digests[second.characters > 0])


def _compare_chapters(
    books: Sequence[BookPrints],
    order: Sequence[int],
    collection: Collection,
    chapters: Pairs,
    duplicates: Duplicates,
    thresholds: Thresholds,
) -> list[Pair]:
    """Each chapter that repeats an earlier one, once: with the one that it equals, is most like, or stands in."""
    best: dict[int, tuple[Kind, int, float]] = {}
    for later, earlier, similarity in same_digests(collection).rows():
        best[later] = ("exact", earlier, similarity)
    for later, earlier, similarity in similar_signatures(collection, thresholds.near).rows():
        if later not in best or (best[later][0] == "near" and similarity > best[later][2]):
            best[later] = ("near", earlier, similarity)
    for later, book, share in shares_in_books(collection, chapters).rows():
        there, here = order[book], order[collection.book_of[later]]
        limit = thresholds.related if duplicates.are_related(here, there) else thresholds.contained
        if share >= limit and (later not in best or (best[later][0] == "contained" and share > best[later][2])):
            best[later] = ("contained", fullest_match(collection, chapters, later, book), share)
    return [
        Pair(
            kind,
            "chapter",
            place_of(books, order, collection, later),
            place_of(books, order, collection, earlier),
            similarity,
        )
        for later, (kind, earlier, similarity) in best.items()
    ]


def _sort_key(pair: Pair) -> tuple[bool, Place, Place]:
    return pair.level != "book", pair.first, pair.second
