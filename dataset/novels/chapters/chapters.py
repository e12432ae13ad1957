"""Divides a book's lines into chapters: finds headings, removes tables of contents and blurbs, reports findings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dataset.novels.chapters.contents import first_line_of_prologue
from dataset.novels.chapters.heading_choice import HeadingChoice, choose_headings
from dataset.novels.chapters.headings import LONGEST_HEADING, HeadingCandidate
from dataset.novels.chapters.paragraphs import fits_width, join_lines, parts_of_about, wrap_width
from dataset.novels.normalized import without_blanks
from dataset.novels.records import ChapterText, Line, Removed
from novelgpt.settings.terminal import counted

PART_CHARACTERS = 5_000
"""Length of the parts of a book without headings."""
MAX_NAMED, MAX_FINDINGS = 20, 50
"""Headings named in one finding, and findings about the numbering of a book."""

_SECTION = re.compile(r"[（(]?[0-9０-９一二三四五六七八九十]{1,4}[)）]?[、.．]?")
_NO_TITLE = re.compile(r".*[。，；：”」』,:;].*|[“「『—].*|.{26,}")
_PROSE = re.compile(r"[。；]|[，,].*[。！？!?…”」』]|[，,][^，,]*[，,]")
"""Not found in titles: the end of a sentence, or several clauses."""
_PART_OF_TITLE = re.compile(r"[（(]?[上中下一二三四五六七八九十0-9]{1,2}[)）]?$")
_LONGEST_WORD = 20
_PROSE_BEGINS = ("话说", "話說", "却说", "卻說", "且说", "且說", "诗曰", "詩曰", "词曰", "詞曰")


@dataclass(frozen=True)
class ChapterSplit:
    """A book divided into chapters.

    Every character of the book that is not white space is in one of them or in one of `removed`, in order.

    Attributes:
        chapters: in order.
        removed: rules "table_of_contents", "front_matter", "volume_heading" (it is in `ChapterText.volume`),
            "heading_prefix" (正文, the name of the book), "heading_decoration" (【】, ===), "repeated_heading".
        findings: sentences about the numbering, its gaps, and decisions.
    """

    chapters: list[ChapterText]
    removed: list[Removed]
    findings: list[str]


def split_chapters(lines: Sequence[Line], part_characters: int = PART_CHARACTERS) -> ChapterSplit:
    """The chapters of a book, from its lines with their indents.

    A book without headings is cut at paragraph ends into parts of about `part_characters` characters. Long prose
    before the first heading is kept as a chapter without heading (`contents.first_line_of_prologue`).
    """
    texts = [text for _, text in lines]
    choice = choose_headings(texts)
    book = _BookSplitter(lines, texts, choice)
    book.remove(sorted(choice.contents), "table_of_contents")
    if choice.kind == "none":
        book.add_text(range(len(texts)))
    else:
        book.add_chapters()
    chapters = book.chapters(part_characters)
    if choice.kind == "none" and chapters:
        book.findings.append(f"no headings: cut at paragraph ends into {counted(len(chapters), 'part')}")
    volumes = {one.index for one in choice.volumes}
    numbered = [one for one in book.headings if one.number is not None and one.index not in volumes]
    book.findings += _describe_numbering(numbered, sorted(volumes))
    if choice.kind == "titles":
        book.findings.append("the headings have no numbers: told by their indent, or by the table of contents")
    if choice.entries:
        book.findings.append(f"a table of contents with {choice.entries} entries was left out")
    return ChapterSplit(chapters, sorted(book.removed, key=lambda removed: removed.number), book.findings)


class _BookSplitter:
    """Divides a book."""

    def __init__(self, lines: Sequence[Line], texts: Sequence[str], choice: HeadingChoice):
        self.lines, self.texts, self.choice = lines, texts, choice
        self.removed: list[Removed] = []
        self.findings: list[str] = []
        self.headings: list[HeadingCandidate] = []
        # Chapters without their text, and the lines of each; one without a heading may become several.
        self._drafts: list[tuple[ChapterText, list[str]]] = []
        self._gone: set[int] = set()

    def remove(self, indices: Iterable[int], rule: str) -> None:
        """Remove whole lines; blank ones are not recorded."""
        for index in indices:
            self._gone.add(index)
            if self.texts[index].strip():
                self.removed.append(Removed(self.lines[index].number, rule, self.texts[index]))

    def add_text(self, indices: Iterable[int]) -> None:
        """Add lines under no heading."""
        body = [self.texts[index] for index in indices if index not in self._gone]
        if any(text.strip() for text in body):
            self._drafts.append((ChapterText("", "", "", None, "", ""), body))

    def add_chapters(self) -> None:
        """Add all chapters, from heading to heading, and the text before the first."""
        chosen = sorted(self.choice.chapters + self.choice.volumes, key=lambda one: one.index)
        headings = self.headings = self._without_repeats(chosen)
        front = [index for index in range(headings[0].index) if index not in self._gone]
        prologue = first_line_of_prologue([self.texts[index] for index in front])
        self.remove(front[:prologue], "front_matter")
        self.add_text(front[prologue:])
        if front[prologue:]:
            self.findings.append("prose before the first heading is kept as a chapter without heading")
        volumes = {one.index for one in self.choice.volumes}
        titles = self._titles_below([one for one in headings if one.index not in volumes])
        segments = _usual_segments(headings)
        volume = ""
        empty = []
        for one, following in pairwise([*headings, None]):
            assert one is not None
            volume = one.heading if one.index in volumes else one.volume or volume
            end = following.index if following else len(self.texts)
            chapter, body = self._draft(one, end, titles.get(one.index), segments)
            has_text = any(text.strip() for text in body)
            if one.index not in volumes:
                self._drafts.append((replace(chapter, volume=volume), body))
                empty += [] if has_text else [chapter.heading]
            elif has_text:
                self._drafts.append((replace(chapter, volume=volume, number=None), body))
            else:
                self.removed.append(Removed(self.lines[one.index].number, "volume_heading", chapter.heading))
        if empty:
            self.findings.append(f"{counted(len(empty), 'chapter')} without text: {'; '.join(empty[:MAX_NAMED])}")

    def _without_repeats(self, headings: Sequence[HeadingCandidate]) -> list[HeadingCandidate]:
        """Of two headings with one number and no text between them, remove the one that the other includes."""
        kept: list[HeadingCandidate] = []
        for one in headings:
            between = range(kept[-1].index + 1, one.index) if kept else ()
            has_text = any(self.texts[index].strip() and index not in self._gone for index in between)
            if kept and kept[-1].number == one.number is not None and not has_text:
                if kept[-1].includes(one):
                    self.remove([one.index], "repeated_heading")
                    continue
                if one.includes(kept[-1]):
                    self.remove([kept.pop().index], "repeated_heading")
            kept.append(one)
        return kept

    def _titles_below(self, headings: Sequence[HeadingCandidate]) -> dict[int, int]:
        """Line of the heading -> line of its title, in books that write 第一章 and the title on two lines."""
        bare = [one for one in headings if one.number is not None and not one.title]
        if len(bare) < 2 or len(bare) < 0.8 * len(headings):
            return {}
        others = {one.index for one in self.headings}
        titles = {}
        for one in bare:
            for index in range(one.index + 1, min(one.index + 6, len(self.texts))):
                text = self.texts[index].strip()
                if text and index not in self._gone:
                    if not (index in others or _SECTION.fullmatch(text) or _NO_TITLE.fullmatch(text)):
                        titles[one.index] = index
                    break
        return titles if len(titles) >= 0.8 * len(bare) else {}

    def _draft(
        self, one: HeadingCandidate, end: int, title_line: int | None, segments: tuple[int, int]
    ) -> tuple[ChapterText, list[str]]:
        """A chapter without volume and text, and its lines; removes what does not belong to the heading on its line."""
        self.removed += [Removed(self.lines[one.index].number, rule, part) for rule, part in one.cut]
        title, prose = _cut_title(one, segments)
        heading = one.label + one.joint if not title else f"{one.label}{one.joint or ' '}{title}".strip()
        start = one.index + 1
        if title_line is not None:
            title = " ".join(self.texts[title_line].split())
            heading = f"{heading} {title}"
            start = title_line + 1
        indices = [index for index in range(start, end) if index not in self._gone]
        if not prose:
            indices = self._without_repeated_heading(indices, one, heading, title)
        body = [self.texts[index] for index in indices]
        if prose:
            # The prose continues on the next line if it stops in the middle of a sentence.
            first = next((place for place, text in enumerate(body) if text.strip()), None)
            body = (
                [prose, *body]
                if first is None or prose[-1] in "。！？…”」』"
                else [prose + body[first].lstrip(), *body[first + 1 :]]
            )
        return ChapterText(heading, one.label, title, one.number, "", ""), body

    def _without_repeated_heading(
        self, indices: Sequence[int], one: HeadingCandidate, heading: str, title: str
    ) -> list[int]:
        """The lines below a heading, without leading ones that repeat the heading or its title."""
        for place, index in enumerate(indices):
            text = without_blanks(self.texts[index])
            repeats = text.removeprefix("正文") == without_blanks(heading) or text == without_blanks(title)
            if text and not repeats and not one.repeats_line(self.texts[index].strip()):
                return list(indices[place:])
            if text:
                self.remove([index], "repeated_heading")
        return []

    def chapters(self, part_characters: int) -> list[ChapterText]:
        """The finished chapters: lines joined to paragraphs, text under no heading cut into parts."""
        widths = [wrap_width(body) for _, body in self._drafts]
        known = Counter(width for width in widths if width)
        usual = known.most_common(1)[0][0] if known.total() * 2 > len(widths) else None
        found = []
        wrapped, breaks = 0, 0
        for (chapter, body), width in zip(self._drafts, widths, strict=True):
            if usual and width is None and len(body) < 20 and fits_width(body, usual):
                width = usual
            paragraphs = join_lines(body, width)
            joined = sum(not text.isspace() for text in body if text) - len(paragraphs) if width else 0
            wrapped, breaks = wrapped + (joined > 0), breaks + max(0, joined)
            if chapter.heading:
                found.append(replace(chapter, text="\n".join([chapter.heading, *paragraphs])))
            else:
                parts = parts_of_about(paragraphs, part_characters)
                found += [replace(chapter, text="\n".join(part)) for part in parts]
        if known and breaks:
            where = f"{counted(known.most_common(1)[0][0], 'column')} in {counted(wrapped, 'chapter')}"
            self.findings.append(f"hard-wrapped at about {where}: {counted(breaks, 'line break')} joined")
        return found


def _usual_segments(headings: Sequence[HeadingCandidate]) -> tuple[int, int]:
    """The number of words, between blanks, of most titles, and the length that hardly any exceeds."""
    titles = [" ".join(_words_of_title(one)) for one in headings if one.title]
    titles = [title for title in titles if title and len(title) <= LONGEST_HEADING]
    if len(titles) < 5:
        return 0, LONGEST_HEADING
    segments, count = Counter(title.count(" ") + 1 for title in titles).most_common(1)[0]
    lengths = sorted(len(title) for title in titles)
    return (segments if count >= 0.6 * len(titles) else 0), lengths[int(0.95 * (len(lengths) - 1))] + 4


def _words_of_title(one: HeadingCandidate) -> list[str]:
    """The words after the label up to the first that reads as prose; all of them, if the line is only a heading."""
    words = one.title.split(" ")
    if one.fits_shape and not _PROSE.search(one.title):
        return words
    count = next(
        (place for place, word in enumerate(words) if len(word) > _LONGEST_WORD or _PROSE.search(word)), len(words)
    )
    return words[: max(1, count)] if len(words[0]) <= 40 else []


def _cut_title(one: HeadingCandidate, segments: tuple[int, int]) -> tuple[str, str]:
    """Title, and the prose after it on the line: "撕扇子作千金一笑 因麒麟伏白首双星 话说袭人见了…"."""
    usual, longest = segments
    words = one.title.split(" ")
    if usual and len(words) > usual and (len(one.title) > longest or words[usual].startswith(_PROSE_BEGINS)):
        return " ".join(words[:usual]), " ".join(words[usual:])
    count = len(_words_of_title(one))
    if len(one.heading) <= LONGEST_HEADING and (count in (0, len(words)) or not _PROSE.search(" ".join(words[1:]))):
        return one.title, ""
    title = " ".join(words[:count])
    return (title, " ".join(words[count:])) if len(words) > count and title else ("", one.title)


def _describe_numbering(headings: Sequence[HeadingCandidate], volumes: Sequence[int]) -> list[str]:
    """Gaps, repeats and steps back, as "chapter 20 is missing between 19 and 21".

    Args:
        headings: numbered ones, in order.
        volumes: line indices of the headings of volumes, in order; numbers may restart after each.
    """
    found = [f"the numbering begins at {one.first}" for one in headings[:1] if one.first > 1]
    for before, after in pairwise(headings):
        last, number = before.last, after.first
        new_volume = after.volume != before.volume or any(before.index < index < after.index for index in volumes)
        if number == last + 1 or (new_volume and number <= 1):
            continue
        in_parts = _PART_OF_TITLE.search(before.title) and _PART_OF_TITLE.search(after.title)
        sentences = (
            (number == last and in_parts, ""),
            (number == last, f"chapter {number} comes twice in a row"),
            (number == last + 2, f"chapter {last + 1} is missing between {last} and {number}"),
            (number > last, f"chapters {last + 1} to {number - 1} are missing between {last} and {number}"),
            (number <= 1, f"the numbering begins anew at {number} after {last}"),
            (True, f"the numbering goes back from {last} to {number}"),
        )
        found.append(next(sentence for applies, sentence in sentences if applies))
    found = [sentence for sentence in found if sentence]
    if len(found) > MAX_FINDINGS:
        found[MAX_FINDINGS:] = [f"the numbering is irregular at {len(found) - MAX_FINDINGS} more places"]
    return found
