"""One book: decoded text -> chapters, and a record that accounts for every character."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dataset.mending import find_shifted
from dataset.novels.chapters.chapters import split_chapters
from dataset.novels.chapters.headings import first_heading
from dataset.novels.chapters.paragraphs import join_lines
from dataset.novels.cleaning.cleaning import Rules, clean, to_simplified
from dataset.novels.cleaning.quality import judge
from dataset.novels.normalized import without_blanks
from dataset.novels.records import BookRecord, BookSection, ChapterText, RawBook, Removed

MAX_BAD_BYTES_SHOWN = 20
MAX_SHIFTED_SHOWN = 20


@dataclass(frozen=True)
class PreparedBook:
    """A book after the steps that need no other book.

    Attributes:
        record: of the book.
        chapters: in order.
        removed: what was removed, and the number of its section, from 1, where the source gives sections. Line numbers
            are those in the section, else in the source.
    """

    record: BookRecord
    chapters: list[ChapterText]
    removed: list[tuple[Removed, int | None]]


def count_visible(text: str) -> int:
    """Number of characters that are not white space."""
    return sum(map(len, text.split()))


def prepare_book(book: RawBook, rules: Rules, simplify: bool) -> PreparedBook:
    """Clean a book, find its chapters and judge its quality.

    Every character of the book that is not white space is in a chapter or in what was removed: `characters_in` of the
    record is `characters_kept` and the characters of `removed` together. What a rule inserts in place of removed text
    counts as kept, and is subtracted from the characters that the rule removed.
    """
    record = BookRecord(
        name=book.name,
        source=book.source,
        encoding=book.encoding,
        bad_bytes=[{"offset": bad.offset, "hex": bad.data.hex()} for bad in book.bad_bytes[:MAX_BAD_BYTES_SHOWN]],
        bad_byte_count=sum(len(bad.data) for bad in book.bad_bytes),
        findings=list(book.findings),
    )
    chapters: list[ChapterText] = []
    removed: list[tuple[Removed, int | None]] = []
    if book.sections is None:
        record.characters_in = count_visible(book.text)
        cleaned = clean(book.text, rules)
        split = split_chapters(cleaned.lines)
        chapters = split.chapters
        record.findings += [*split.findings, *_describe_shifted(book.text)]
        removed += [(entry, None) for entry in (*cleaned.removed, *split.removed)]
    else:
        record.characters_in = sum(count_visible(one.title) + count_visible(one.text) for one in book.sections)
        for number, section in enumerate(book.sections, start=1):
            chapter, taken = _prepare_section(section, rules)
            chapters += [] if chapter is None else [chapter]
            removed += [(entry, number) for entry in taken]
    inserted = {rule.name: count_visible(rule.becomes) for rule in rules.rules}
    for (_, rule, text), _ in removed:
        counts = record.removed.setdefault(rule, {"lines": 0, "characters": 0})
        counts["lines"] += 1
        counts["characters"] += count_visible(text) - inserted.get(rule, 0)
    if simplify:
        chapters = [
            replace(
                chapter,
                heading=to_simplified(chapter.heading),
                label=to_simplified(chapter.label),
                title=to_simplified(chapter.title),
                volume=to_simplified(chapter.volume),
                text=to_simplified(chapter.text),
            )
            for chapter in chapters
        ]
    record.chapter_characters = [count_visible(chapter.text) for chapter in chapters]
    record.characters_kept = sum(record.chapter_characters)
    quality = judge("\n".join(chapter.text for chapter in chapters))
    record.chinese_share, record.repetition, record.script, record.refused = quality
    if not chapters:
        record.refused = "nothing is left of it after cleaning" if record.characters_in else "it holds no text"
    if record.refused:
        record.split = "refused"
    return PreparedBook(record, chapters, removed)


def _describe_shifted(text: str) -> list[str]:
    """A sentence for each stretch that an earlier loss of a byte has turned into other characters."""
    shifted = list(itertools.islice(find_shifted(text), MAX_SHIFTED_SHOWN + 1))
    sentences = [
        f"line {number}: double bytes paired up wrongly; it likely said: {reading[:80]}"
        for number, _, reading in shifted[:MAX_SHIFTED_SHOWN]
    ]
    return [*sentences, "further lines of this kind are not listed"] if len(shifted) > len(sentences) else sentences


def _prepare_section(section: BookSection, rules: Rules) -> tuple[ChapterText | None, Sequence[Removed]]:
    """A section as a chapter, None if it is not one or has no text below its title; and the removed text."""
    if section.rule:
        lines = enumerate([section.title, *section.text.split("\n")], start=1)
        return None, [Removed(number, section.rule, line) for number, line in lines if line.strip()]
    cleaned = clean(f"{section.title}\n{section.text}", rules)
    title = " ".join(" ".join(line.text for line in cleaned.lines if line.number == 1).split())
    paragraphs = join_lines([line.text for line in cleaned.lines if line.number > 1])
    removed = list(cleaned.removed)
    if title and paragraphs and without_blanks(paragraphs[0]) == without_blanks(title):
        removed.append(Removed(2, "repeated_heading", paragraphs.pop(0)))
    if not paragraphs:
        return None, [*removed, Removed(1, "empty_section", title)] if title else removed
    found = first_heading([title])
    label, words, number = (found.label, found.title, found.number) if found else ("", title, None)
    text = "\n".join([title, *paragraphs] if title else paragraphs)
    return ChapterText(title, label, words, number, "", text), removed
