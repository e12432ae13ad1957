"""Files of novels -> decoded books: .txt, .txt.gz, .zip of .txt, .epub, .jsonl.

Nothing is written to disk, and nothing is unpacked beyond the size of a novel: an archive cannot exhaust the memory.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, TypeAlias

from dataset.decode import decode_tolerant, likeliest_encoding, read_bytes
from dataset.novels.records import BookSection, HostileFileError, RawBook
from dataset.novels.sources.epub import read_epub
from dataset.novels.sources.series import PREVIEW_BYTES, Series, decode_references, find_series, join_series
from novelgpt.settings.errors import UserError

SUFFIXES = (".txt", ".gz", ".zip", ".epub", ".jsonl")
# Memory holds a member of an archive, a line of a .jsonl file, and the rows of one book as a whole.
MAX_BYTES = 512 * 2**20
# An archive may not unpack to more than this many times its own size, once that is more than FREE_BYTES.
MAX_RATIO, FREE_BYTES = 200, 64 * 2**20
_DAMAGE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_Stream: TypeAlias = IO[bytes] | gzip.GzipFile


def list_folder(folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """All files below `folder`, sorted: those that `read_books` can read, and (relative path, reason) of the others.

    Links are not followed: their target is either read where it is, or is not part of the folder.

    Raises:
        UserError: no such folder, or nothing in it that can be read.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}", "name the folder that holds the novels")
    files: list[Path] = []
    left_out: list[tuple[str, str]] = []
    for directory, names, file_names in os.walk(folder):
        here = Path(directory)
        closed = [name for name in names if _is_hidden(name) or (here / name).is_symlink()]
        names[:] = [name for name in names if name not in closed]
        for path in (here / name for name in [*file_names, *closed]):
            if reason := _reason_to_skip(path):
                left_out.append((path.relative_to(folder).as_posix(), reason))
            else:
                files.append(path)
    if not files:
        raise UserError(
            f"{folder} holds no file that can be read" + (f" ({len(left_out)} others)" if left_out else ""),
            f"put files there that end in {', '.join(SUFFIXES)}",
        )
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix()), sorted(left_out)


def read_books(path: Path, folder: Path, left_out: Callable[[str, str], None] | None = None) -> Iterator[RawBook]:
    """The books of a file, one at a time.

    Args:
        path: the file, below `folder`.
        left_out: is called with the source and the reason for members of a .zip that are not read. Without it a .txt
            member that cannot be used is an error, as it is for a file of its own; members of other kinds are skipped.

    Raises:
        UserError: missing, empty, damaged or encrypted file; undecodable bytes; invalid JSON, with the line; an
            archive without a book, or one that unpacks to far more than a novel.
    """
    source = path.relative_to(folder).as_posix()
    suffix = path.suffix.lower()
    if suffix == ".txt":
        yield _decoded(read_bytes(path), source, path.stem)
    elif suffix == ".gz":
        inner = Path(path.stem)
        with _opened(path, source) as raw, gzip.GzipFile(fileobj=raw) as stream:
            meter = _Meter(path.stat().st_size, source)
            if inner.suffix.lower() == ".jsonl":
                yield from _read_rows(meter.lines(stream), source, _clean_name(inner.stem, source))
            else:
                yield _decoded(meter.read(stream), source, inner.stem if inner.suffix.lower() == ".txt" else inner.name)
    elif suffix == ".zip":
        yield from _read_zip(path, source, left_out)
    elif suffix == ".epub":
        with _archive(path, source) as archive:
            meter = _Meter(path.stat().st_size, source)
            name = _clean_name(path.stem, source)
            book = read_epub(name, archive.namelist(), lambda member: meter.member(archive, member), source)
        yield book
    elif suffix == ".jsonl":
        with _opened(path, source) as stream:
            yield from _read_rows(_Meter(0, source, packed=False).lines(stream), source, _clean_name(path.stem, source))
    else:
        raise UserError(f"{source}: {suffix or 'a file without a suffix'} is not read", f"use {', '.join(SUFFIXES)}")


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) and name not in (".", "..") or name == "__MACOSX"


def _reason_to_skip(path: Path) -> str:
    name = path.name.lower()
    reasons = (
        (path.is_symlink(), "a link"),
        (_is_hidden(path.name), "hidden"),
        (not path.is_file(), "no regular file"),
        (
            name.endswith(".tar.gz") or not name.endswith(SUFFIXES),
            f"{path.suffix or 'a file without a suffix'} is not read",
        ),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _clean_name(stem: str, source: str) -> str:
    return " ".join(stem.split()) or source


def _decoded(data: bytes, source: str, stem: str) -> RawBook:
    text, encoding, bad = decode_tolerant(data, source)
    return RawBook(_clean_name(stem, source), source, decode_references(text), encoding, bad)


def _opened(path: Path, source: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}", "check the path and its rights") from error


@contextmanager
def _naming_damage(source: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn the errors of damaged packed data, and `errors`, into a UserError."""
    try:
        yield
    except _DAMAGE + errors as error:
        raise UserError(f"{source} is damaged: {error}", "fetch it again, or unpack it with another program") from error


def _archive(path: Path, source: str) -> zipfile.ZipFile:
    _opened(path, source).close()
    with _naming_damage(source, NotImplementedError, OSError, ValueError):
        return zipfile.ZipFile(path)


class _Meter:
    """Reads packed data, and stops if it grows out of proportion.

    Args:
        size: of the packed file, in bytes.
        source: to name in errors.
        packed: whether the ratio is limited.
    """

    def __init__(self, size: int, source: str, packed: bool = True) -> None:
        self._source = source
        self._left = max(FREE_BYTES, MAX_RATIO * size) if packed else None

    def member(self, archive: zipfile.ZipFile, name: str) -> bytes:
        """The bytes of a member; a UserError if missing, encrypted, damaged, packed in an unknown way, or too large."""
        source = f"{self._source}!{name}"
        try:
            info = archive.getinfo(name)
        except KeyError as error:
            raise UserError(f"{self._source} is damaged: it has no {name}", "fetch it again") from error
        if info.flag_bits & 1:
            raise UserError(f"{source} is encrypted", "unpack it with its password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            raise UserError(f"{source} is packed by method {info.compress_type}", "unpack it by another program")
        with _naming_damage(source, NotImplementedError, RuntimeError, OSError), archive.open(info) as stream:
            return self.read(stream, source)

    def read(self, stream: _Stream, source: str = "") -> bytes:
        """All bytes of `stream`.

        Raises:
            UserError: damaged, or too many.
        """
        chunks: list[bytes] = []
        size = 0
        with _naming_damage(source or self._source):
            while chunk := stream.read(2**20):
                chunks.append(chunk)
                size += len(chunk)
                self._count(len(chunk), size, source or self._source)
        return b"".join(chunks)

    def lines(self, stream: _Stream) -> Iterator[bytes]:
        """Lines of `stream` with their ends.

        Raises:
            UserError: damaged, too many bytes, or a line that is too long.
        """
        with _naming_damage(self._source):
            while line := stream.readline(MAX_BYTES + 1):
                self._count(len(line), len(line), self._source)
                yield line

    def _count(self, more: int, size: int, source: str) -> None:
        if self._left is not None:
            self._left -= more
        if size > MAX_BYTES or (self._left is not None and self._left < 0):
            raise HostileFileError(
                f"{source} unpacks to more than "
                + (f"{MAX_BYTES >> 20} MiB" if size > MAX_BYTES else f"{MAX_RATIO} times its size"),
                "leave it out, or unpack it by hand if you trust it",
            )


def _read_zip(path: Path, source: str, left_out: Callable[[str, str], None] | None) -> Iterator[RawBook]:
    found = False
    with _archive(path, source) as archive:
        meter = _Meter(path.stat().st_size, source)
        names = _member_names(archive)
        stored_as = {name: stored for stored, name in names.items()}
        series_of = _series_in(archive, stored_as, path.stem)
        for stored, name in sorted(names.items(), key=lambda item: item[1]):
            if series := series_of.get(name):
                if name == series.members[0]:
                    found = True
                    inside = f"{source}!{series.source}"
                    yield join_series(series, inside, lambda member: meter.member(archive, stored_as[member]))
                continue
            member, inner = f"{source}!{name}", PurePosixPath(name)
            if any(map(_is_hidden, inner.parts)) or inner.suffix.lower() != ".txt":
                if left_out is not None:
                    left_out(member, "only .txt is read in a .zip, and nothing hidden")
                continue
            try:
                book = _decoded(meter.member(archive, stored), member, inner.stem)
            except UserError as error:
                if left_out is None or isinstance(error, HostileFileError):
                    raise
                left_out(member, error.cause)
                continue
            found = True
            yield book
    if not found:
        raise UserError(f"{source} holds no .txt that can be used", "unpack it, or leave it out")


def _series_in(archive: zipfile.ZipFile, stored_as: dict[str, str], stem: str) -> dict[str, Series]:
    """The books of an archive that have one file per chapter, by each of their members.

    Args:
        archive: to search.
        stored_as: the name by which each of its files is stored, by the name that was meant.
        stem: of the archive's name.
    """

    def preview(path: PurePath) -> tuple[bytes, int]:
        info = archive.getinfo(stored_as[str(path)])
        try:
            with archive.open(info) as stream:
                return stream.read(PREVIEW_BYTES), info.file_size
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError):
            return b"", 0  # reported when it is read

    # Names that are not plain paths, such as those that lead out of the archive, are not chapters.
    plain = [PurePosixPath(name) for name in stored_as if str(PurePosixPath(name)) == name]
    usable = [path for path in plain if not any(part == ".." or _is_hidden(part) for part in path.parts)]
    found = find_series(usable, PurePosixPath(), stem, preview)
    return {member: series for series in found for member in series.members}


def _member_names(archive: zipfile.ZipFile) -> dict[str, str]:
    """For each file in `archive` the name by which it is stored, and the name that was meant.

    Without a flag for UTF-8, names are in the code page of the machine that packed them, and zipfile reads them as
    cp437.
    """
    names = {info.filename: info.filename for info in archive.infolist() if not info.is_dir()}
    old = [info.filename for info in archive.infolist() if not info.flag_bits & 0x800 and not info.filename.isascii()]
    raw = {name: name.encode("cp437") for name in old}
    encoding = likeliest_encoding(b"\n".join(raw.values()), ("utf-8", "gb18030", "big5hkscs"))
    names |= {name: data.decode(encoding, "backslashreplace") for name, data in raw.items() if name in names}
    return {stored: name.replace("\\", "/") for stored, name in names.items()}


def _read_rows(lines: Iterator[bytes], source: str, stem: str) -> Iterator[RawBook]:
    """Books of JSON rows {"text", "book", "chapter", "title"}, all but the text optional.

    Adjacent rows of one book become one book with sections. A row that names neither book, chapter nor title is a book
    of its own, called after the file and the line.
    """
    is_empty = True
    for name, rows in itertools.groupby(_rows(lines, source, stem), key=lambda row: row[0]):
        is_empty = False
        sections, size, first, encoding = list[BookSection](), 0, "", ""
        for _, where, encoding_of_row, section in rows:
            first, encoding = first or where, encoding_of_row
            sections.append(section)
            size += len(section.text)
            if size > MAX_BYTES:
                raise UserError(f"{first}: the rows of {name!r} are too many for one book", "split the book")
        is_text = len(sections) == 1 and not sections[0].title
        text, chapters = (sections[0].text, None) if is_text else ("", tuple(sections))
        yield RawBook(name, first, text, encoding, sections=chapters)
    if is_empty:
        raise UserError(f"{source} is empty", "name a file with content, or leave this one out")


def _rows(lines: Iterator[bytes], source: str, stem: str) -> Iterator[tuple[str, str, str, BookSection]]:
    """(name of its book, file and line, encoding, section) of each row."""
    encoding = ""
    for number, raw in enumerate(lines, start=1):
        if number == 1 and raw.startswith(codecs.BOM_UTF8):
            encoding, raw = "utf-8-sig", raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        encoding = encoding or likeliest_encoding(raw)
        if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or encoding.startswith("utf-16"):
            raise UserError(f"{source} is in UTF-16", "save it as UTF-8")
        where = f"{source}:{number}"
        text, book, chapter, title = _row_fields(raw, encoding.removesuffix("-sig"), where)
        name = _clean_name(book, stem) if book or chapter or title else f"{stem}-{number}"
        heading = title if title.startswith(chapter) else chapter if chapter.endswith(title) else f"{chapter} {title}"
        yield name, where, encoding, BookSection(heading, text)


def _row_fields(raw: bytes, encoding: str, where: str) -> tuple[str, str, str, str]:
    """Text, book, chapter and title of a row."""
    try:
        record: Any = json.loads(raw.decode(encoding))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {raw[error.start]:#04x} at byte {error.start} of the line is not {encoding}",
            "save the file as UTF-8",
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON: {error}", "write one JSON object per line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
        raise UserError(f"{where}: no text in field 'text'", 'write rows like {"text": "…", "book": "…"}')
    if _LONE_SURROGATE.search(record["text"]):
        raise UserError(f"{where}: the text holds half a character (\\ud800 to \\udfff)", "write the row again")
    text = decode_references(record["text"].replace("\r\n", "\n").replace("\r", "\n"))
    extra = (record.get(key) for key in ("book", "chapter", "title"))
    book, chapter, title = ("" if value is None else str(value).strip() for value in extra)
    return text, book, chapter, title
