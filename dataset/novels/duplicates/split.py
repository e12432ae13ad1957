"""Which books are held out, and which chapters training may see.

Held-out books are for evaluation: no chapter that overlaps one of them goes to training, whatever its edition, script
or division into chapters. Of the rest, and of the held-out chapters among themselves, each text is kept once.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np

from dataset.novels.duplicates.near_duplicates import (
    DEFAULTS,
    BookPrints,
    Duplicates,
    Kind,
    Location,
    Thresholds,
    fullest_match,
    location_of,
    order_of,
    shares_in_books,
)
from dataset.novels.duplicates.overlaps import (
    MIN_SHARED,
    RELIABLE,
    Collection,
    Pairs,
    collect,
    follow_neighbours,
    same_digests,
    shared_shingles,
    similar_signatures,
)
from novelgpt.settings.errors import UserError

Split = Literal["train", "held_out", "left_out"]


class Decision(NamedTuple):
    """What becomes of a chapter."""

    fate: Literal["train", "held_out", "left_out"]
    reason: str = ""
    """Why it is left out: "leak" where it overlaps a held-out book, or one in neither split; the `kind` of `Pair` where
    it duplicates a chapter that is kept; what `Reserved` says; a sentence where its book is refused."""
    other: Location | None = None
    """That other chapter."""
    similarity: float = 0.0
    """As in `Pair`; of a leak the share of either in the other, or their similarity; of a chapter too short to judge,
    left out for the leak beside it, the value of that one."""


@dataclass(frozen=True)
class Reserved:
    """What a list of held-out works says about a collection.

    Attributes:
        held_out: indices of the books that are works to test on.
        left_out: index of a book that goes to neither split -> the reason.
        chapters: (index of the book, index of the chapter in it) of chapters that overlap a listed work, in any book.
    """

    held_out: frozenset[int] = frozenset()
    left_out: Mapping[int, str] = field(default_factory=dict)
    chapters: Mapping[tuple[int, int], Decision] = field(default_factory=dict)


NOTHING = Reserved()


def assign_splits(
    books: Sequence[BookPrints],
    duplicates: Duplicates,
    held_out_names: Sequence[str] = (),
    held_out_share: float = 0.0,
    seed: int = 0,
    reserved: Reserved = NOTHING,
) -> list[Split]:
    """The split of each book. Editions of one book go together.

    Args:
        books: the collection.
        duplicates: from `find_duplicates`, of these books in the same order.
        held_out_names: books held out by name, source, or stem of the source; with the wildcards * ? [ ].
        held_out_share: share of the books, by number, held out besides, in [0, 1). A book is drawn by a hash of seed
            and name, independently of the rest of the collection. So in a small collection the share drawn may be far
            from the share requested; but where it is above 0, nothing is held out by name, and there are two books or
            more, at least one book is held out, and at least one is not.
        seed: of the draw.
        reserved: books that a list assigns. A book held out by name is held out all the same; of the others, and of
            their editions, none is drawn.

    Raises:
        UserError: a name matches no book, no book is left to train on, or the share is out of range.
    """
    if not 0 <= held_out_share < 1:
        raise UserError(f"a held-out share of {held_out_share}", "give a number from 0 up to, but not including, 1")
    held = {duplicates.editions[i] for name in held_out_names for i in _named(books, name)}
    draws: dict[int, float] = {}
    for book, edition in zip(books, duplicates.editions, strict=True):
        digest = hashlib.sha256(f"{seed}\n{book.name}".encode()).digest()
        # The min of its editions: one more edition may hold the book out, but never moves it back to training.
        draws[edition] = min(int.from_bytes(digest[:8], "big") / 2**64, draws.get(edition, 1.0))
    assigned: dict[int, Split] = dict.fromkeys(reserved.left_out, "left_out")
    assigned |= dict.fromkeys(reserved.held_out, "held_out")
    for number in assigned:
        draws.pop(duplicates.editions[number], None)
    if (held or assigned) and held.issuperset(draws):
        raise UserError("all books are held out by name" + " or by the list" * bool(assigned), "leave some to train on")
    if held_out_share > 0 and len(draws) > 1:
        ranked = sorted(draws, key=lambda edition: (draws[edition], books[edition].source))
        at_least = set() if held or reserved.held_out else {ranked[0]}
        held |= {edition for edition in ranked[:-1] if draws[edition] < held_out_share} | at_least
        if held.issuperset(draws):
            held.discard(ranked[-1])
    return [
        "held_out" if edition in held else assigned.get(number, "train")
        for number, edition in enumerate(duplicates.editions)
    ]


def decide(
    books: Sequence[BookPrints],
    duplicates: Duplicates,
    splits: Sequence[Split],
    thresholds: Thresholds = DEFAULTS,
    reserved: Reserved = NOTHING,
) -> list[list[Decision]]:
    """What becomes of each chapter of each book; independent of the order of `books`.

    Books are ranked: held-out, in neither split, training; then the longest first, then by source. A chapter is left
    out of training where it overlaps any chapter of the first two ranks, or a listed work; and left out of its split
    where it duplicates what is kept before it. Of several editions the longest is thus kept whole, and of the others
    what it lacks.

    Args:
        books: the collection.
        duplicates: from `find_duplicates`, of these books in the same order.
        splits: from `assign_splits`, or any other choice.
        thresholds: for overlaps and duplicates.
        reserved: as for `assign_splits`.
    """
    order = order_of(books, [("train", "left_out", "held_out").index(split) for split in splits])
    collection = collect([books[i].prints for i in order])
    is_held = np.array([splits[order[rank]] != "train" for rank in collection.book_of], bool)
    same = same_digests(collection)
    alike = similar_signatures(collection, min(thresholds.near, thresholds.leak))
    least = min(thresholds.leak, thresholds.related, thresholds.contained)
    shared = shared_shingles(collection, least).chapters
    left_out = _find_leaks(collection, is_held, (same, alike), shared, thresholds.leak)
    settled = _settled_by_list(collection, order, splits, reserved, left_out)
    _find_repeats(collection, same, alike, shared, left_out, thresholds, duplicates, order)
    decisions: list[list[Decision]] = [[] for _ in books]
    for chapter, held in enumerate(is_held.tolist()):
        decision = Decision("held_out" if held else "train")
        if chapter in settled:
            decision = settled[chapter]
        elif chapter in left_out:
            reason, other, similarity = left_out[chapter]
            decision = Decision("left_out", reason, location_of(books, order, collection, other), similarity)
        decisions[order[collection.book_of[chapter]]].append(decision)
    return decisions


_LeftOut = dict[int, tuple[Kind | Literal["leak"], int, float]]


def _settled_by_list(
    collection: Collection, order: Sequence[int], splits: Sequence[Split], reserved: Reserved, left_out: _LeftOut
) -> dict[int, Decision]:
    """Chapters that the list leaves out, by their number; marks them in `left_out`, so that none counts as kept."""
    settled: dict[int, Decision] = {}
    for rank, book in enumerate(order):
        first, end = collection.firsts[rank : rank + 2].tolist()
        for chapter in range(first, end):
            if splits[book] == "left_out":
                settled[chapter] = Decision("left_out", reserved.left_out[book])
            elif splits[book] == "train" and (book, chapter - first) in reserved.chapters and chapter not in left_out:
                settled[chapter] = reserved.chapters[book, chapter - first]
    left_out |= {chapter: ("leak", chapter, decision.similarity) for chapter, decision in settled.items()}
    return settled


def _find_leaks(
    collection: Collection, is_held: np.ndarray, similar: Sequence[Pairs], shared: Pairs, least: float
) -> _LeftOut:
    """Chapters of training books -> ("leak", the chapter kept from training that it overlaps most, by how much)."""
    overlaps: list[tuple[int, int, float]] = []
    for pairs in similar:
        crossing = ~is_held[pairs.later] & is_held[pairs.earlier] & (pairs.value >= least)
        overlaps += pairs.some(crossing).rows()
    shares = shares_in_books(collection, shared)
    crossing = ~is_held[shares.later] & is_held[collection.firsts[shares.earlier]] & (shares.value >= least)
    for later, book, value in shares.some(crossing).rows():
        overlaps.append((later, fullest_match(collection, shared, later, book), value))
    # The other way round: a short held-out chapter inside a long chapter.
    part = shared.value / np.maximum(collection.sampled[shared.earlier], 1)
    crossing = ~is_held[shared.later] & is_held[shared.earlier] & (shared.value >= MIN_SHARED) & (part >= least)
    overlaps += Pairs(shared.later, shared.earlier, part).some(crossing).rows()
    leaks: _LeftOut = {}
    for later, earlier, value in overlaps:
        if later not in leaks or value > leaks[later][2]:
            leaks[later] = ("leak", earlier, value)
    short = np.flatnonzero(~is_held & (collection.sampled < RELIABLE))
    follow_neighbours(leaks, short, collection.book_of)
    return leaks


def _find_repeats(
    collection: Collection,
    same: Pairs,
    alike: Pairs,
    shared: Pairs,
    left_out: _LeftOut,
    thresholds: Thresholds,
    duplicates: Duplicates,
    order: Sequence[int],
) -> None:
    """Add the chapters that duplicate one that is kept before them."""
    original_of = {later: earlier for later, earlier, _ in same.rows()}
    near: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    for later, earlier, value in alike.some(alike.value >= thresholds.near).rows():
        near[later].append((value, earlier))
    inside: defaultdict[int, list[int]] = defaultdict(list)

    def limit(chapter: int, book: int) -> float:
        related = duplicates.are_related(order[collection.book_of[chapter]], order[book])
        return thresholds.related if related else thresholds.contained

    for later, book, share in shares_in_books(collection, shared).rows():
        # A book may quote itself: its preface the last page.
        if collection.book_of[later] != book and share >= limit(later, book):
            inside[later].append(book)
    for chapter in range(len(collection.book_of)):
        if chapter in left_out:
            continue
        if chapter in original_of:
            # What equals a chapter shares its fate.
            left_out[chapter] = left_out.get(original_of[chapter], ("exact", original_of[chapter], 1.0))
            continue
        kept = [(value, -earlier) for value, earlier in near[chapter] if earlier not in left_out]
        if kept:
            value, earlier = max(kept)
            left_out[chapter] = ("near", -earlier, value)
            continue
        for book in inside[chapter]:
            share, other = _share_in_kept(collection, shared, chapter, book, left_out)
            if share >= limit(chapter, book):
                left_out[chapter] = ("contained", other, share)
                break


def _share_in_kept(
    collection: Collection, shared: Pairs, chapter: int, book: int, left_out: _LeftOut
) -> tuple[float, int]:
    """Share of a chapter contained in the kept chapters of a book, and the one with most of it; -1 if there is none."""
    kept = [
        (value, -earlier)
        for _, earlier, value in shared.some(shared.slice_of(chapter)).rows()
        if collection.book_of[earlier] == book and earlier not in left_out
    ]
    return sum(value for value, _ in kept) / int(collection.sampled[chapter]), -max(kept, default=(0.0, 1))[1]


def _named(books: Sequence[BookPrints], name: str) -> list[int]:
    """Indices of the books that a name matches."""
    known = [(book.name, book.source, PurePosixPath(book.source.replace("!", "/")).stem) for book in books]
    exact = [i for i, names in enumerate(known) if name in names]
    matching = exact or [i for i, names in enumerate(known) if any(fnmatch.fnmatchcase(one, name) for one in names)]
    if not matching:
        choices = sorted({known_name for names in known for known_name in names})
        nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)
        raise UserError(
            f"no book is called {name!r}" + (f"; the nearest is {nearest[0]!r}" if nearest else ""),
            "name a book, its source or a pattern with * that fits one",
        )
    return matching
