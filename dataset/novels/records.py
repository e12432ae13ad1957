"""Records that the steps of preparing novels exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataset.mending import BadBytes
from novelgpt.settings.errors import UserError


class HostileFileError(UserError):
    """A file that would exhaust the memory; it is refused as a whole, while damage costs a page or a chapter."""


class Line(NamedTuple):
    """A line of a decoded text, without its line end."""

    number: int
    """From 1, in the decoded text of its source."""
    text: str


class Removed(NamedTuple):
    """Text that was removed: a whole line or a part of one."""

    number: int
    """Of its line, from 1."""
    rule: str
    """Name of the rule or step that removed it."""
    text: str
    """The removed text, unchanged."""


@dataclass(frozen=True)
class BookSection:
    """A chapter whose boundaries the source itself gives (epub, rows of a .jsonl file, one file per chapter).

    Attributes:
        title: its heading; "" if it has none.
        text: below the heading.
        rule: why all of it is left out, if it is not a chapter: "contents_page", for example.
    """

    title: str
    text: str
    rule: str = ""


@dataclass(frozen=True)
class RawBook:
    """One book as in its source, decoded, not cleaned.

    Attributes:
        name: the stem of the file or archive member, or the name in the rows; not empty.
        source: path relative to the folder of raw files, "/" as separator; "a.zip!b/c.txt" for a member of an archive.
        text: line ends are "\\n"; no byte-order mark. "" where `sections` are given.
        encoding: "utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "gb18030", "big5hkscs".
        bad_bytes: bytes that could not be decoded.
        sections: the chapters, if the source gives them; else None.
        findings: sentences about problems found while reading.
    """

    name: str
    source: str
    text: str
    encoding: str
    bad_bytes: tuple[BadBytes, ...] = ()
    sections: tuple[BookSection, ...] | None = None
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChapterText:
    """A chapter ready to train on.

    Attributes:
        heading: its line in the text, blanks normalised: "第一回 甄士隐梦幻识通灵"; "" if it has none.
        label: "第一回"; "" if it has none.
        title: the text after the label; "" if there are none.
        number: 1 for 第一回; None if it is not numbered.
        volume: heading of the 卷/部 it belongs to; "" if there is none.
        text: heading, if any, and paragraphs, one per line, without indents and blank lines.
    """

    heading: str
    label: str
    title: str
    number: int | None
    volume: str
    text: str


@dataclass
class BookRecord:
    """All facts about one book after all steps: a row of books.jsonl and of the report.

    Attributes:
        name: of the book.
        source: as in RawBook.
        encoding: as in RawBook.
        bad_bytes: [{"offset": 12, "hex": "ff"}], at most 20.
        bad_byte_count: of all bad bytes.
        characters_in: characters of the decoded text that are not white space.
        characters_kept: those of them in chapters.
        chapter_characters: characters of each chapter, in order.
        removed: rule -> {"lines": n, "characters": n}; characters without white space.
        findings: sentences about the source and the numbering: gaps, repeats, no headings.
        chinese_share: share of Chinese characters among those kept, in [0, 1].
        repetition: share of the book's 20-character windows that occur more than once, in [0, 1].
        script: "simplified", "traditional" or "none".
        refused: why the whole book was left out; "" if it was not.
        duplicate_chapters: chapters left out, as duplicates of others or because they overlap a held-out book.
        left_out: why all of it is in neither split, if it is not refused: "held_out_author", for example; else "".
        split: "train", "held_out", "left_out", or "refused".
        characters_out: characters (without white space) of its chapters that went into the shards.
    """

    name: str
    source: str
    encoding: str = ""
    bad_bytes: list[dict[str, Any]] = field(default_factory=list)
    bad_byte_count: int = 0
    characters_in: int = 0
    characters_kept: int = 0
    chapter_characters: list[int] = field(default_factory=list)
    removed: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    chinese_share: float = 0.0
    repetition: float = 0.0
    script: str = "none"
    refused: str = ""
    duplicate_chapters: int = 0
    left_out: str = ""
    split: str = "train"
    characters_out: int = 0


def count_removed(books: Iterable[BookRecord]) -> tuple[Counter[str], Counter[str]]:
    """Lines and characters that each rule removed from the books."""
    lines: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for book in books:
        for rule, counts in book.removed.items():
            lines[rule] += counts["lines"]
            characters[rule] += counts["characters"]
    return lines, characters
