"""Folders and archives with one file a chapter: which files are one book, in which order, and the book they make."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from statistics import median
from typing import NamedTuple

from dataset.decode import decode_tolerant, read_bytes
from dataset.mending import BadBytes
from dataset.novels.chapters.headings import HeadingCandidate, find_candidates
from dataset.novels.chapters.numerals import DIGITS, to_number
from dataset.novels.records import HostileFileError, RawBook, Section
from dataset.novels.sources.references import decode_references
from novelgpt.settings.errors import UserError

LEAST_FILES = 3
MOST_MISSING = 0.5
"""Of the files there are: how many numbers between the first and the last one may be missing."""
MOST_TWICE = 0.2
"""Of the files: how many may have a number that another one has (1.txt, 01.txt)."""
LONGEST_CHAPTER, USUAL_CHAPTER = 200_000, 60_000
"""Bytes of the longest file, and of the usual one, that may be a chapter that does not say so."""
LOOKED_AT = 4096
"""Bytes at the beginning of a file, for its heading."""
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


class Series(NamedTuple):
    """The files of a book, one a chapter.

    Attributes:
        name: of the book: that of the folder, or what stands before the number in all names.
        members: paths relative to the folder of raw files, or in the archive, in the order of their numbers.
    """

    name: str
    members: tuple[str, ...]

    @property
    def source(self) -> str:
        """As a record names it: the first file, and the name of the last."""
        return f"{self.members[0]}…{self.members[-1].rpartition('/')[2]}"


class _NumberedFile(NamedTuple):
    """A file whose name has a number: words before and behind it."""

    path: PurePath
    before: str
    number: int
    title: str


class FilePreview(NamedTuple):
    """What is looked at of a file before it is read: its first bytes, and how many it has."""

    begin: bytes
    size: int


def glance_at(path: PurePath) -> FilePreview:
    """Of a file on disk; nothing of one that cannot be read, which is told where it is read."""
    try:
        with Path(path).open("rb") as file:
            return FilePreview(file.read(LOOKED_AT), Path(path).stat().st_size)
    except OSError:
        return FilePreview(b"", 0)


def find_series(
    files: Iterable[PurePath], folder: PurePath, name: str, look: Callable[[PurePath], FilePreview] = glance_at
) -> list[Series]:
    """The books among the .txt files below `folder` that have a file a chapter.

    Their names differ by numbers that hardly leave one out. Where the files begin with numbered headings, these count
    upwards from file to file: novels, which count from 1 each, are books of their own, however their files are
    numbered. Where they have no headings, no file is longer than a chapter can be.

    Args:
        files: on disk or in an archive.
        folder: above them.
        name: of a book whose files lie in `folder` itself.
        look: at a file that may be a chapter.
    """
    groups: dict[tuple[PurePath, str], list[_NumberedFile]] = {}
    for path in files:
        if path.suffix.lower() == ".txt" and (part := _part(path)) is not None:
            groups.setdefault((path.parent, part.before), []).append(part)
    books: dict[tuple[PurePath, str], list[tuple[int, list[_NumberedFile]]]] = {}
    for (parent, before), parts in sorted(groups.items()):
        parts.sort(key=lambda part: (part.number, part.path.name))
        if _is_counted(parts) and _are_chapters(parts, look):
            place, volume = _volume(parent, before) if parent != folder else (parent, _volume_number(before))
            key = (place, before if volume is None else "")
            books.setdefault(key, []).append((volume or 0, parts))
    found = []
    for (parent, before), volumes in sorted(books.items()):
        called = before or (parent.name if parent != folder else name)
        parts = [part for _, members in sorted(volumes, key=lambda one: one[0]) for part in members]
        found.append(Series(called, tuple(part.path.relative_to(folder).as_posix() for part in parts)))
    return found


def _volume(parent: PurePath, before: str) -> tuple[PurePath, int | None]:
    """The folder of the book that files of a volume belong to, and the volume's number; None where it is none.

    The volume is named by the folder of the files, or in their names before the number: 第一卷/1.txt, 1-1.txt.
    """
    number = None if before else _volume_number(parent.name, bare=False)
    return (parent, _volume_number(before)) if number is None else (parent.parent, number)


def _volume_number(name: str, bare: bool = True) -> int | None:
    """The number that a volume's name says; with `bare` a number alone is one."""
    if bare and name.isdecimal():
        return int(name)
    found = _VOLUME.fullmatch(name.strip())
    if found is None:
        return None
    return _SIDES.get(found["side"] or "") or to_number(found["number"] or found["named"] or "")


def read_series(series: Series, folder: Path) -> RawBook:
    """The book of a series: its texts end to end, or, where they have no headings, a section a file.

    A file that cannot be read or decoded costs its own text alone, and is named in the findings.

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
    """As `read_series`, of files that `read` gives the bytes of.

    Args:
        series: of the book.
        source: of the book.
        read: bytes of a member; raises UserError where it cannot be read.
    """
    texts, encodings, bad, members, lost = [], [], list[BadBytes](), [], list[str]()
    for member in series.members:
        try:
            text, encoding, more = decode_tolerant(read(member), member)
        except UserError as error:
            if isinstance(error, HostileFileError) or len(lost) + 1 == len(series.members):
                raise
            lost.append(f"a chapter is lost: {error.cause}")
            continue
        members.append(member)
        texts.append(decode_references(text))
        encodings.append(encoding)
        bad += more
    names = [member.rpartition("/")[2] for member in members]
    finding = f"made of {len(names)} files, one a chapter, in the order of their numbers: {names[0]} to {names[-1]}"
    encoding = Counter(encodings).most_common(1)[0][0]
    if 2 * sum(_first_heading(text) is not None for text in texts) >= len(texts):
        return RawBook(series.name, source, "\n\n".join(texts), encoding, tuple(bad), findings=(finding, *lost))
    sections = []
    for member, text in zip(members, texts, strict=True):
        part = _part(Path(member))
        sections.append(Section(part.title if part else "", text.strip("\n")))
    return RawBook(series.name, source, "", encoding, tuple(bad), tuple(sections), (finding, *lost))


def _part(path: PurePath) -> _NumberedFile | None:
    found = _STEM.fullmatch(path.stem)
    if found is None:
        return None
    number = found["number"]
    value = int(number) if number.isdecimal() else to_number(number)
    before = found["before"].strip(_JOINTS)
    return (
        None if value is None else _NumberedFile(path, before, value, " ".join(found["after"].strip(_JOINTS).split()))
    )


def _is_counted(parts: Sequence[_NumberedFile]) -> bool:
    numbers = [part.number for part in parts]
    missing = numbers[-1] - numbers[0] + 1 - len(set(numbers))
    twice = len(numbers) - len(set(numbers))
    return (
        len(numbers) - twice >= LEAST_FILES
        and twice <= MOST_TWICE * len(numbers)
        and missing <= MOST_MISSING * len(numbers)
    )


def _are_chapters(parts: Sequence[_NumberedFile], look: Callable[[PurePath], FilePreview]) -> bool:
    """Whether files that are numbered without gaps are the chapters of one book."""
    glances = [look(part.path) for part in parts]
    headings = [_first_heading(_decoded(glance.begin)) for glance in glances]
    numbers = [
        (part.number, heading.number)
        for part, heading in zip(parts, headings, strict=True)
        if heading is not None and heading.number is not None
    ]
    if 2 * len(numbers) >= len(parts):
        return all(first[1] < second[1] or first[0] == second[0] for first, second in pairwise(numbers))
    sizes = [glance.size for glance in glances]
    return not numbers and max(sizes) <= LONGEST_CHAPTER and median(sizes) <= USUAL_CHAPTER


def _decoded(begin: bytes) -> str:
    try:
        return decode_tolerant(begin, "").text
    except UserError:
        return ""  # what is wrong with it is told where it is read


def _first_heading(text: str) -> HeadingCandidate | None:
    """The heading among the first lines of a text."""
    lines = [line for line in text.split("\n")[:40] if line.strip()][:5]
    return next((candidate for candidate in find_candidates(lines) if candidate.shaped), None)
