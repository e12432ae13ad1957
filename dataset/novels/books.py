"""One book: decoded text -> chapters, and a record of what became of every character."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dataset.mending import find_shifted
from dataset.novels.chapters.chapters import split_chapters
from dataset.novels.chapters.headings import find_candidates
from dataset.novels.chapters.paragraphs import join_lines
from dataset.novels.cleaning.cleaning import Rules, clean, to_simplified
from dataset.novels.cleaning.quality import judge
from dataset.novels.records import BookRecord, Chapter, RawBook, Removed, Section

MOST_BAD_BYTES_SHOWN = 20
MOST_SHIFTED_SHOWN = 20


@dataclass(frozen=True)
class RemovedFrom:
    """Text that was taken out of a book.

    Attributes:
        removed: the text, its rule, and its line in the source, or in the section.
        section: number of the section, from 1, where the source gives sections.
    """

    removed: Removed
    section: int | None = None


@dataclass(frozen=True)
class PreparedBook:
    """A book after the steps that need no other book."""

    record: BookRecord
    chapters: list[Chapter]
    removed: list[RemovedFrom]


def count_visible(text: str) -> int:
    """Characters that are not white space."""
    return sum(map(len, text.split()))


def prepare_book(book: RawBook, rules: Rules, simplify: bool) -> PreparedBook:
    """Clean a book, find its chapters and judge it.

    Every character of the book that is no white space is in a chapter or in what was removed: `characters_in` of the
    record is `characters_kept` and the characters of `removed` together. What a rule puts in place of what it takes
    counts as kept, and is taken off the characters that the rule removed.
    """
    record = BookRecord(
        name=book.name,
        source=book.source,
        encoding=book.encoding,
        bad_bytes=[{"offset": bad.offset, "hex": bad.data.hex()} for bad in book.bad_bytes[:MOST_BAD_BYTES_SHOWN]],
        bad_byte_count=sum(len(bad.data) for bad in book.bad_bytes),
    )
    if book.sections is None:
        record.characters_in = count_visible(book.text)
        cleaned = clean(book.text, rules)
        split = split_chapters(cleaned.lines)
        chapters, record.findings = split.chapters, [*split.findings, *_describe_shifted(book.text)]
        removed = [RemovedFrom(entry) for entry in (*cleaned.removed, *split.removed)]
    else:
        record.characters_in = sum(map(count_visible, _texts(book.sections)))
        chapters, removed = [], []
        for place, section in enumerate(book.sections, start=1):
            chapter, taken = _prepare_section(section, rules) if not section.rule else (None, _leave_out(section))
            chapters += [] if chapter is None else [chapter]
            removed += [RemovedFrom(entry, place) for entry in taken]
    record.findings = [*book.findings, *record.findings]
    _count_removed(record, removed, rules)
    if simplify:
        chapters = list(map(_simplify, chapters))
    record.chapter_characters = [count_visible(chapter.text) for chapter in chapters]
    record.characters_kept = sum(record.chapter_characters)
    quality = judge("\n".join(chapter.text for chapter in chapters))
    record.chinese_share, record.repetition = quality.chinese_share, quality.repetition
    record.script, record.refused = quality.script, quality.refused
    if not chapters:
        record.refused = "nothing is left of it after cleaning" if record.characters_in else "it holds no text"
    if record.refused:
        record.split = "refused"
    return PreparedBook(record, chapters, removed)


def _describe_shifted(text: str) -> list[str]:
    """A sentence for each stretch that a lost byte before this file was made has turned into other characters."""
    shifted = list(itertools.islice(find_shifted(text), MOST_SHIFTED_SHOWN + 1))
    sentences = [
        f"line {stretch.number}: double bytes paired up wrongly; it likely said: {stretch.reading[:80]}"
        for stretch in shifted[:MOST_SHIFTED_SHOWN]
    ]
    return [*sentences, "further lines of this kind are not listed"] if len(shifted) > len(sentences) else sentences


def _texts(sections: Sequence[Section]) -> Iterator[str]:
    for section in sections:
        yield section.title
        yield section.text


def _prepare_section(section: Section, rules: Rules) -> tuple[Chapter | None, list[Removed]]:
    """A section is a chapter; without text below its title, it is none."""
    cleaned = clean(f"{section.title}\n{section.text}", rules)
    title = " ".join(" ".join(line.text for line in cleaned.lines if line.number == 1).split())
    paragraphs = join_lines([line.text for line in cleaned.lines if line.number > 1])
    removed = list(cleaned.removed)
    if title and paragraphs and "".join(paragraphs[0].split()) == "".join(title.split()):
        removed.append(Removed(2, "repeated_heading", paragraphs.pop(0)))
    if not paragraphs:
        return None, [*removed, Removed(1, "empty_section", title)] if title else removed
    found = next((candidate for candidate in find_candidates([title]) if candidate.shaped), None)
    label, words, number = (found.label, found.title, found.number) if found else ("", title, None)
    return Chapter(title, label, words, number, "", "\n".join([title, *paragraphs] if title else paragraphs)), removed


def _leave_out(section: Section) -> list[Removed]:
    """All lines of a section that is no chapter."""
    lines = enumerate([section.title, *section.text.split("\n")], start=1)
    return [Removed(number, section.rule, line) for number, line in lines if line.strip()]


def _count_removed(record: BookRecord, removed: Sequence[RemovedFrom], rules: Rules) -> None:
    put_back = {rule.name: count_visible(rule.becomes) for rule in rules.rules}
    for entry in removed:
        counts = record.removed.setdefault(entry.removed.rule, {"lines": 0, "characters": 0})
        counts["lines"] += 1
        counts["characters"] += count_visible(entry.removed.text) - put_back.get(entry.removed.rule, 0)


def _simplify(chapter: Chapter) -> Chapter:
    return replace(
        chapter,
        heading=to_simplified(chapter.heading),
        label=to_simplified(chapter.label),
        title=to_simplified(chapter.title),
        volume=to_simplified(chapter.volume),
        text=to_simplified(chapter.text),
    )
