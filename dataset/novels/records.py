"""What the steps of preparing novels hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataset.mending import BadBytes
from novelgpt.settings.errors import UserError


class HostileFileError(UserError):
    """A file that would fill the memory: no damage that may cost a page or a chapter, the whole file is refused."""


class Line(NamedTuple):
    """A line of a decoded text, without its line end."""

    number: int
    """From 1, in the decoded text of its source."""
    text: str


class Removed(NamedTuple):
    """Text that was taken out, whole line or a part of one."""

    number: int
    """Of the line it stood in, from 1."""
    rule: str
    """Name of the rule or step that took it out."""
    text: str
    """What was taken out, as it stood there."""


@dataclass(frozen=True)
class Section:
    """A chapter whose borders the source itself gives (epub, rows of a .jsonl file, a file a chapter).

    Attributes:
        title: its heading; "" where it has none.
        text: what stands below.
        rule: why all of it is left out, where it is no chapter: "contents_page", for example.
    """

    title: str
    text: str
    rule: str = ""


@dataclass(frozen=True)
class RawBook:
    """One book as its source has it, decoded; nothing cleaned yet.

    Attributes:
        name: the stem of the file or archive member, or what the rows say; not empty.
        source: path relative to the folder of raw files, "/" as separator; "a.zip!b/c.txt" for a member of an archive.
        text: line ends are "\\n"; no byte-order mark. "" where `sections` are given.
        encoding: "utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "gb18030", "big5hkscs".
        bad_bytes: what could not be decoded.
        sections: the chapters, where the source gives them; else None.
        findings: sentences about what was met while it was read.
    """

    name: str
    source: str
    text: str
    encoding: str
    bad_bytes: tuple[BadBytes, ...] = ()
    sections: tuple[Section, ...] | None = None
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChapterText:
    """A chapter ready to train on.

    Attributes:
        heading: its line in the text, blanks made regular: "第一回 甄士隐梦幻识通灵"; "" where it has none.
        label: "第一回"; "" where it has none.
        title: the words behind the label; "" where there are none.
        number: 1 for 第一回, where it is numbered.
        volume: heading of the 卷/部 it belongs to; "" where there is none.
        text: heading and paragraphs, one a line, without indents and blank lines; the heading only where it has one.
    """

    heading: str
    label: str
    title: str
    number: int | None
    volume: str
    text: str


@dataclass
class BookRecord:
    """What is known of one book after all steps: a row of books.jsonl, of the manifest, of the report.

    Attributes:
        name: of the book.
        source: as in RawBook.
        encoding: as in RawBook.
        bad_bytes: [{"offset": 12, "hex": "ff"}], at most 20 of them.
        bad_byte_count: all of them.
        characters_in: characters of the decoded text that are not white space.
        characters_kept: those of them in chapters.
        chapter_characters: characters of each chapter, in order.
        removed: rule -> {"lines": n, "characters": n}; characters without white space.
        findings: sentences about the source and the numbering: gaps, repeats, no headings.
        chinese_share: share of Chinese characters among those kept, in [0, 1].
        repetition: share of the book's 20-character windows that it has more than once, in [0, 1].
        script: "simplified", "traditional" or "none".
        refused: why the whole book was left out; "" if it was not.
        duplicate_chapters: chapters left out because others say the same.
        split: "train", "held_out", or "refused".
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
    split: str = "train"
    characters_out: int = 0
