"""Folders and archives with one file per chapter: which files are one book, in which order, and that book."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html.entities import html5
from itertools import pairwise
from pathlib import Path, PurePath
from statistics import median
from typing import NamedTuple

from dataset.decode import decode_tolerant, read_bytes
from dataset.mending import BadBytes
from dataset.novels.chapters.headings import HeadingCandidate, first_heading
from dataset.novels.chapters.numerals import DIGITS, to_number
from dataset.novels.records import BookSection, HostileFileError, RawBook
from novelgpt.settings.errors import UserError

MIN_FILES = 3
MAX_MISSING, MAX_TWICE = 0.5, 0.2
"""Relative to the number of files: numbers between the first and the last one that may be missing, and files that may
have a number that another one has (1.txt, 01.txt)."""
MAX_CHAPTER, MEDIAN_CHAPTER = 200_000, 60_000
"""Max bytes of the longest file, and of the median one, if no file has a chapter heading."""
PREVIEW_BYTES = 4096
"""Bytes at the beginning of a file that are read to find its heading."""
_STEM = re.compile(
    r"(?P<before>.*?)(?P<number>[0-9０-９]{1,6}"
    r"|(?:(?<=第)|(?<!.)(?=[零〇○一二三四五六七八九十百千两]+$))[零〇○一二三四五六七八九十百千两]{1,7})(?P<after>\D*)"
)
_VOLUME = re.compile(
    rf"(?:第?\s*(?P<number>[{DIGITS}]{{1,6}})\s*[卷部集册冊篇]"
    rf"|(?:卷|[Vv]ol(?:ume)?[ ._]?)\s*(?P<named>[{DIGITS}]{{1,6}})"
    r"|(?P<side>[上中下])[卷部册冊篇])(?:[\s　_:：.-].{0,40})?"
)
_SIDES = {"上": 1, "中": 2, "下": 3}
_JOINTS = " \t\u3000_-—.．、:：()（）[]【】第章回节節话話卷"
# Character references. With their semicolon: without it, "&copy" may be a part of an address.
_REFERENCE = re.compile(
    r"&(?:#(?P<decimal>[0-9]{1,8})|#[xX](?P<hexadecimal>[0-9a-fA-F]{1,7})|(?P<name>[A-Za-z][A-Za-z0-9]{1,31}));"
)


class Series(NamedTuple):
    """The files of a book, one per chapter.

    Attributes:
        name: of the book: that of the folder, or the text before the number in all names.
        members: paths relative to the folder of raw files, or in the archive, in the order of their numbers.
    """

    name: str
    members: tuple[str, ...]

    @property
    def source(self) -> str:
        """The source of the book in its record: the first file, and the name of the last."""
        return f"{self.members[0]}…{self.members[-1].rpartition('/')[2]}"


class _NumberedFile(NamedTuple):
    """A file whose name has a number, with the text before and after it."""

    path: PurePath
    before: str
    number: int
    title: str


def preview(path: PurePath) -> tuple[bytes, int]:
    """The beginning of a file on disk, and its size in bytes; empty if it cannot be read: reported when it is read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(PREVIEW_BYTES), Path(path).stat().st_size
    except OSError:
        return b"", 0


def find_series(
    files: Iterable[PurePath], folder: PurePath, name: str, preview: Callable[[PurePath], tuple[bytes, int]] = preview
) -> list[Series]:
    """The books among the .txt files below `folder` that have one file per chapter.

    Their names differ by numbers with few gaps. Where the files begin with numbered headings, these increase from file
    to file: novels, each of which counts from 1, are books of their own, however their files are numbered. Where they
    have no headings, no file is longer than a chapter can be.

    Args:
        files: on disk or in an archive.
        folder: that contains them.
        name: of a book whose files lie in `folder` itself.
        preview: beginning and size of a file that may be a chapter, as the function of this name.
    """
    groups: dict[tuple[PurePath, str], list[_NumberedFile]] = {}
    for path in files:
        if path.suffix.lower() == ".txt" and (part := _part(path)) is not None:
            groups.setdefault((path.parent, part.before), []).append(part)
    books: dict[tuple[PurePath, str], list[tuple[int, list[_NumberedFile]]]] = {}
    for (parent, before), parts in sorted(groups.items()):
        parts.sort(key=lambda part: (part.number, part.path.name))
        if _are_chapters(parts, preview):
            # The volume is named by the folder, or in the file names before the number: 第一卷/1.txt, 1-1.txt.
            in_folder = None if before or parent == folder else _volume_number(parent.name, bare=False)
            volume = _volume_number(before) if in_folder is None else in_folder
            key = (parent if in_folder is None else parent.parent, before if volume is None else "")
            books.setdefault(key, []).append((volume or 0, parts))
    found = []
    for (parent, before), volumes in sorted(books.items()):
        called = before or (parent.name if parent != folder else name)
        parts = [part for _, members in sorted(volumes, key=lambda one: one[0]) for part in members]
        found.append(Series(called, tuple(part.path.relative_to(folder).as_posix() for part in parts)))
    return found


def _volume_number(name: str, bare: bool = True) -> int | None:
    """The number in a volume's name, None if there is none; with `bare` a number alone is a volume."""
    if bare and name.isdecimal():
        return int(name)
    found = _VOLUME.fullmatch(name.strip())
    if found is None:
        return None
    return _SIDES.get(found["side"] or "") or to_number(found["number"] or found["named"] or "")


def read_series(series: Series, folder: Path) -> RawBook:
    """The book of a series: its texts concatenated, or, where they have no headings, one section per file.

    A file that cannot be read or decoded costs only its own text, and is named in the findings.

    Raises:
        UserError: none of the files can be used.
    """

    def read(member: str) -> bytes:
        try:
            return read_bytes(folder / member)
        except UserError as error:
            raise UserError(error.cause.replace(str(folder / member), member), error.remedy) from error

    return join_series(series, series.source, read)


def join_series(series: Series, source: str, read: Callable[[str], bytes]) -> RawBook:
    """As `read_series`, with a function that reads the files.

    Args:
        series: of the book.
        source: of the book.
        read: bytes of a member; raises UserError where it cannot be read.
    """
    texts: dict[str, str] = {}
    encodings: list[str] = []
    bad: list[BadBytes] = []
    lost: list[str] = []
    for member in series.members:
        try:
            text, encoding, more = decode_tolerant(read(member), member)
        except UserError as error:
            if isinstance(error, HostileFileError) or len(lost) + 1 == len(series.members):
                raise
            lost.append(f"a chapter is lost: {error.cause}")
            continue
        texts[member] = decode_references(text)
        encodings.append(encoding)
        bad += more
    names = [member.rpartition("/")[2] for member in texts]
    finding = f"made of {len(names)} files, one per chapter, in the order of their numbers: {names[0]} to {names[-1]}"
    encoding = Counter(encodings).most_common(1)[0][0]
    if 2 * sum(_first_heading(text) is not None for text in texts.values()) >= len(texts):
        text = "\n\n".join(texts.values())
        return RawBook(series.name, source, text, encoding, tuple(bad), findings=(finding, *lost))
    sections = []
    for member, text in texts.items():
        part = _part(Path(member))
        sections.append(BookSection(part.title if part else "", text.strip("\n")))
    return RawBook(series.name, source, "", encoding, tuple(bad), tuple(sections), (finding, *lost))


def _part(path: PurePath) -> _NumberedFile | None:
    found = _STEM.fullmatch(path.stem)
    if found is None:
        return None
    value = to_number(found["number"])
    before = found["before"].strip(_JOINTS)
    return (
        None if value is None else _NumberedFile(path, before, value, " ".join(found["after"].strip(_JOINTS).split()))
    )


def _are_chapters(parts: Sequence[_NumberedFile], preview: Callable[[PurePath], tuple[bytes, int]]) -> bool:
    """Whether files are the chapters of one book: their numbers have few gaps, and their headings increase."""
    distinct = len({part.number for part in parts})
    twice = len(parts) - distinct
    missing = parts[-1].number - parts[0].number + 1 - distinct
    if distinct < MIN_FILES or twice > MAX_TWICE * len(parts) or missing > MAX_MISSING * len(parts):
        return False
    sizes: list[int] = []
    numbers: list[tuple[int, int]] = []
    for part in parts:
        head, size = preview(part.path)
        sizes.append(size)
        try:
            heading = _first_heading(decode_tolerant(head, "").text)
        except UserError:
            continue  # its damage is reported when it is read
        if heading is not None and heading.number is not None:
            numbers.append((part.number, heading.number))
    if 2 * len(numbers) >= len(parts):
        return all(first[1] < second[1] or first[0] == second[0] for first, second in pairwise(numbers))
    return not numbers and max(sizes) <= MAX_CHAPTER and median(sizes) <= MEDIAN_CHAPTER


def _first_heading(text: str) -> HeadingCandidate | None:
    """The heading among the first lines of a text."""
    return first_heading([line for line in text.split("\n")[:40] if line.strip()][:5])


def decode_references(text: str) -> str:
    """The text with each numeric and named reference replaced by its character.

    The result is not decoded again: "&amp;#39;" gives "&#39;". References to line ends give blanks, as in HTML; those
    to control characters, lone surrogates and unknown names are kept.

    >>> decode_references("&#x4f60;&#22909;&hellip; &amp;lt; &nosuch;")
    '你好… &lt; &nosuch;'
    """
    return _REFERENCE.sub(_decoded, text) if "&" in text else text


def _decoded(found: re.Match[str]) -> str:
    if found["name"]:
        character = html5.get(f"{found['name']};")
    else:
        number = int(found["decimal"] or found["hexadecimal"], 10 if found["decimal"] else 16)
        character = chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else None
    if character in ("\n", "\r", "\t"):
        return " "
    if character is None or (len(character) == 1 and not (" " <= character < "\x7f" or character >= "\xa0")):
        return found[0]
    return character
