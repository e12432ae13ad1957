"""Which books and chapters of a collection are listed works, whatever their name, script, encoding or division."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dataset.novels.duplicates.near_duplicates import BookPrints, Duplicates, Location
from dataset.novels.duplicates.split import Decision, Reserved
from dataset.novels.held_out.sketches import SketchIndex, sketch_of
from dataset.novels.held_out.works import HeldOutWork, HeldOutWorks, words_of

AUTHOR, EDITION = "held_out_author", "held_out_edition"
"""Why a book is in neither split: of the author of a work to test on; another edition of one, or with much of one."""


@dataclass
class _Found:
    """Books by what was recognised: index of the book -> the work to test on, or the reason to leave it out.

    Attributes:
        files: works to test on by the hash of their file.
        editions: the same by name or by content.
        left_out: books for neither split.
    """

    files: dict[int, HeldOutWork] = field(default_factory=dict)
    editions: dict[int, HeldOutWork] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)


def recognise(
    listed: HeldOutWorks, books: Sequence[BookPrints], duplicates: Duplicates, sha256_of: Mapping[str, str]
) -> Reserved:
    """Find the works of a list in a collection.

    A book is a listed work if its file has the same hash; else if its name or path has its author and title; else if it
    is an edition by content: half of each is in the other. A book whose name or path has the author of a work to test
    on, is another one by that author. Where the very file of a work is there, other editions of it are left out; else
    they are held out in its place.

    Args:
        listed: the list.
        books: of the collection.
        duplicates: from `find_duplicates`, of these books in the same order.
        sha256_of: source -> hash, of files that are one book.
    """
    index = SketchIndex([work.sketch for work in listed.works])
    found = _Found()
    chapters: dict[tuple[int, int], Decision] = {}
    for number, book in enumerate(books):
        sketch = sketch_of(book.prints)
        edition = index.editions(sketch)
        _recognise_book(number, book, listed, edition, sha256_of.get(book.source, ""), found)
        for chapter, overlap in index.overlaps(sketch).items():
            work = listed.works[overlap.work]
            where = Location(work.name, work.title, overlap.chapter + 1)
            chapters[number, chapter] = Decision("left_out", "leak", where, overlap.share)
    _add_editions(duplicates, found)
    present = {work.name for work in found.files.values()}
    for number, work in found.editions.items():
        if work.name in present:
            found.left_out[number] = EDITION
    held = {*found.files, *(number for number in found.editions if number not in found.left_out)}
    return Reserved(frozenset(held), found.left_out, chapters)


def _recognise_book(
    number: int, book: BookPrints, listed: HeldOutWorks, edition: int | None, sha256: str, found: _Found
) -> None:
    words = [*words_of(book.name), *words_of(book.source)]
    for work in listed.works:
        if sha256 == work.sha256:
            _add(number, work, found.files, found)
            return
    named = next((work for work in listed.works if work.is_named(words)), None)
    if named is None and edition is not None:
        named = listed.works[edition]
    if named is not None:
        _add(number, named, found.editions, found)
    elif any(work.role == "test" and work.is_by(words) for work in listed.works):
        found.left_out[number] = AUTHOR


def _add(number: int, work: HeldOutWork, tested: dict[int, HeldOutWork], found: _Found) -> None:
    if work.role == "test":
        tested[number] = work
    else:
        found.left_out[number] = AUTHOR if work.role == "same_author" else EDITION


def _add_editions(duplicates: Duplicates, found: _Found) -> None:
    """Books that the comparison of all books takes for editions of one that was recognised."""
    tested = {**found.editions, **found.files}
    work_of = {duplicates.editions[number]: work for number, work in tested.items()}
    for number, edition in enumerate(duplicates.editions):
        if edition in work_of and number not in tested and number not in found.left_out:
            found.editions[number] = work_of[edition]
