"""Sketches of works: so few of their shingles that a list can hold them, enough to recognise a chapter.

A sketch holds every shingle whose hash lies in the lowest 1/64 of the range (FracMinHash, as the samples of
`dataset.novels.duplicates.shingles`, of which it is every other one): of a chapter of 3,000 characters 47 of them.
It holds no text. The hashes do not depend on the machine; the version of OpenCC or of Unicode changes those of rare
characters, which costs a few shingles and no recognition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dataset.novels.duplicates.near_duplicates import DEFAULTS
from dataset.novels.duplicates.overlaps import MIN_SHARED, RELIABLE, follow_neighbours
from dataset.novels.duplicates.shingles import SAMPLED, Fingerprints

SKETCHED = 64
"""One shingle in this many is in a sketch."""
LIMIT = (1 << 32) * SAMPLED // SKETCHED
"""Sampled shingles below this are in a sketch."""
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Sketch:
    """Of a work of n chapters.

    Attributes:
        values: (m,) uint32, below `LIMIT`, chapter after chapter, each ascending and distinct.
        starts: (n + 1,) int64, those of chapter i are values[starts[i] : starts[i + 1]].
    """

    values: np.ndarray
    starts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """(n,) int64, number of shingles of each chapter."""
        return np.diff(self.starts)

    def some(self, chosen: np.ndarray) -> Sketch:
        """With only those shingles that a mask, (m,) bool, selects."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        return Sketch(self.values[chosen], before[self.starts])

    def without(self, known: Sequence[Sketch]) -> Sketch:
        """With only those shingles that none of the others has."""
        if not known:
            return self
        return self.some(~np.isin(self.values, np.concatenate([one.values for one in known])))


EMPTY = Sketch(np.zeros(0, np.uint32), np.zeros(1, np.int64))


def sketch_of(prints: Fingerprints) -> Sketch:
    """The sketch of a book, by its fingerprints."""
    return Sketch(prints.samples, prints.starts).some(prints.samples < LIMIT)


class Overlap(NamedTuple):
    """What a chapter has in common with a work."""

    work: int
    chapter: int
    """Of the work, from 0: the one with most of it."""
    share: float
    """Of the chapter in the work, or of the work's chapter in it, whichever is larger."""


class SketchIndex:
    """Finds works in a text, by their sketches."""

    def __init__(self, works: Sequence[Sketch]) -> None:
        nothing = [np.zeros(0, np.int64)]
        sizes = [one.sizes for one in works]
        self._size_of_work = np.array([len(np.unique(one.values)) for one in works], np.int64)
        self._size_of_chapter = np.concatenate(nothing + sizes)
        self._first_chapter = np.cumsum([0, *map(len, sizes)])
        self._work_of_chapter = np.repeat(np.arange(len(works)), list(map(len, sizes)))
        values = np.concatenate([np.zeros(0, np.uint32), *(one.values for one in works)])
        order = np.argsort(values, kind="stable")
        self._values = values[order]
        self._chapters = np.repeat(np.arange(len(self._size_of_chapter)), self._size_of_chapter)[order]

    def editions(self, book: Sketch, least: float = DEFAULTS.edition) -> int | None:
        """The work that a book is an edition of: each holds a share of `least` or more of the other; None if none."""
        places, chapters = self._matches(book)
        work = self._work_of_chapter[chapters]
        pairs = np.unique(work.astype(np.uint64) << _HALF | book.values[places])
        shared = np.bincount((pairs >> _HALF).astype(np.int64), minlength=len(self._size_of_work))
        size = len(np.unique(book.values))
        shares = shared / np.maximum(np.maximum(self._size_of_work, size), 1)
        shares[shared < RELIABLE] = 0
        best = int(np.argmax(shares)) if len(shares) else 0
        return best if len(shares) and shares[best] >= least else None

    def overlaps(self, book: Sketch, least: float = DEFAULTS.leak) -> dict[int, Overlap]:
        """Chapters of a book that share `least` or more with a work, by their number from 0.

        A chapter that is too short to judge follows the one beside it.
        """
        found: dict[int, Overlap] = {}
        places, theirs = self._matches(book)
        ours = np.searchsorted(book.starts, places, side="right") - 1
        work = self._work_of_chapter[theirs]
        most: dict[tuple[int, int], tuple[int, int]] = {}
        pairs, counts = np.unique(np.stack([ours, theirs]), axis=1, return_counts=True)
        for (chapter, other), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            key = chapter, int(self._work_of_chapter[other])
            most[key] = max(most.get(key, (0, 0)), (count, -other))
            share = count / int(self._size_of_chapter[other])
            if count >= MIN_SHARED and share >= least:
                self._keep_larger(found, chapter, other, share)
        # A shingle that several chapters of a work have counts once.
        distinct = np.unique(np.stack([ours, work, places]), axis=1)[:2]
        pairs, counts = np.unique(distinct, axis=1, return_counts=True)
        for (chapter, number), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            share = count / int(book.sizes[chapter])
            if count >= MIN_SHARED and share >= least:
                self._keep_larger(found, chapter, -most[chapter, number][1], share)
        follow_neighbours(found, np.flatnonzero(book.sizes < RELIABLE), np.zeros(len(book.sizes), np.int64))
        return found

    def _keep_larger(self, found: dict[int, Overlap], chapter: int, other: int, share: float) -> None:
        work = int(self._work_of_chapter[other])
        if chapter not in found or share > found[chapter].share:
            found[chapter] = Overlap(work, other - int(self._first_chapter[work]), share)

    def _matches(self, book: Sketch) -> tuple[np.ndarray, np.ndarray]:
        """(matches,) places in `book.values`, and the chapters of works, numbered through, that have the shingle."""
        first, end = (np.searchsorted(self._values, book.values, side) for side in ("left", "right"))
        counts = end - first
        places = np.repeat(np.arange(len(counts)), counts)
        offsets = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        return places, self._chapters[np.repeat(first, counts) + offsets]
