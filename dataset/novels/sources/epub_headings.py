"""Headings in the pages of an .epub: which blocks are one, and which of them begin chapters."""

from __future__ import annotations

from collections.abc import Sequence

from dataset.novels.chapters.heading_choice import choose_headings
from dataset.novels.chapters.headings import HeadingCandidate, find_candidates
from dataset.novels.sources.epub_page import PageBlock

CHAPTER_UNITS = "章回话話"
_PARAGRAPH_LEVEL = 7  # of headings that are written as paragraphs: below h6


def mark_headings(blocks: Sequence[PageBlock]) -> None:
    """Numbered headings that are written as paragraphs, in a book of which no numbered heading is marked as one."""
    if not any(is_chapter(block.text) for block in blocks if block.level):
        for heading in choose_headings([block.text for block in blocks]).chapters:
            if heading.unit in CHAPTER_UNITS:
                blocks[heading.index].level = _PARAGRAPH_LEVEL


def find_units(blocks: list[PageBlock], level: int) -> list[tuple[int, str, HeadingCandidate | None]]:
    """Headings: index of the first block, the words of it and of those that go with it, and whether it is numbered.

    Headings in a row are one ("第二章", "风"), until one that says itself which chapter it is, or is another of the
    `level` of chapters below one with a title.
    """
    units: list[tuple[int, str, HeadingCandidate | None]] = []
    for index, block in enumerate(blocks):
        if not block.level:
            continue
        shaped = next((one for one in find_candidates([block.text]) if one.shaped), None)
        above = blocks[index - 1] if index else None
        if above is None or not above.level or shaped is not None:
            units.append((index, block.text, shaped))
            continue
        first, title, before = units[-1]
        untitled = first == index - 1 and before is not None and not before.title
        if block.level == level and block.heading != above.heading and not untitled:
            units.append((index, block.text, shaped))
        else:
            units[-1] = (first, f"{title} {block.text}", before)
    return units


def chapter_level(levels: Sequence[int], only: bool) -> int:
    """The level of the headings that begin chapters in a book without contents: the highest, if it comes repeatedly.

    `only`: the page is the whole book, in which a heading that stands alone is the book's name.
    """
    repeated = [level for level in sorted(set(levels)) if levels.count(level) > 1]
    highest = min(levels, default=0)
    return repeated[0] if repeated and (only or repeated[0] == highest) else 0


def is_chapter(title: str) -> bool:
    """Whether a title has a chapter's number."""
    return any(one.shaped and one.unit in CHAPTER_UNITS for one in find_candidates([title]))


def says(heading: str, title: str) -> bool:
    """Whether a heading says what a title of the contents does, or a part of it."""
    first, second = without_blanks(heading), without_blanks(title)
    return bool(second) and (first.startswith(second) or second.startswith(first))


def without_blanks(text: str) -> str:
    """The text with all white space left out."""
    return "".join(text.split())
