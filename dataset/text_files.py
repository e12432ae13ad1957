"""Text files that are read in blocks: all bytes of one are checked before any of its text is passed on."""

from __future__ import annotations

import codecs
import io
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow

from dataset.decode import NARROW, find_mark, likeliest_of_samples, no_fit, read_bytes, unreadable
from novelgpt.settings.errors import UserError

BLOCK = 1 << 18  # bytes
# The beginning of a character of UTF-8 that may go on behind the last three bytes of a block.
_CUT_CHARACTER = re.compile(rb"[\xc0-\xff][\x80-\xbf]{0,2}\Z")


@dataclass(frozen=True)
class TextFile:
    """A file all of whose bytes are text, which may be read as often as wanted; see `open_text`.

    Attributes:
        path: of the file.
        status: of the file when it was checked.
        data: its bytes, if it cannot be read twice, as a pipe.
        encoding: as `Decoded` names it.
        begin: number of bytes of its byte-order mark.
        block_size: bytes that are read at once.
    """

    path: Path
    status: os.stat_result
    data: bytes | None
    encoding: str
    begin: int
    block_size: int

    @property
    def codec(self) -> str:
        """The name under which Python decodes it."""
        return self.encoding.removesuffix("-sig")

    def open(self) -> BinaryIO:
        """The bytes, from their beginning.

        Raises:
            UserError: another program has changed the file.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise unreadable(self.path, error) from error
        if _version(os.fstat(file.fileno())) != _version(self.status):
            file.close()
            raise self._changed()
        return file

    def blocks(self) -> Iterator[str]:
        """The text, in stretches of any length above 0; line ends are "\\n".

        Raises:
            UserError: another program has changed the file.
        """
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(self.codec)(), translate=True)
        with self.open() as file:
            file.seek(self.begin)
            left = (self.status.st_size if self.data is None else len(self.data)) - self.begin
            while left:
                block = file.read(min(self.block_size, left))
                left -= len(block)
                try:
                    text = decoder.decode(block, final=not left)
                except UnicodeDecodeError:
                    raise self._changed() from None
                if left and not block:
                    raise self._changed()
                if text:
                    yield text

    def lines(self) -> Iterator[str]:
        """The lines, without their ends, as `split("\\n")` returns them: the last one is "" after a last line end."""
        begin: list[str] = []  # of a line whose end has not come yet
        for block in self.blocks():
            lines = block.split("\n")
            begin.append(lines[0])
            if len(lines) > 1:
                lines[0] = "".join(begin)
                begin = [lines.pop()]
                yield from lines
        yield "".join(begin)

    def _changed(self) -> UserError:
        return UserError(f"{self.path} changed while it was read", "start again when no program writes to it")


def open_text(path: Path, block_size: int = BLOCK) -> TextFile:
    """Check all bytes of a file; its text is what `decode_text` makes of them.

    Memory does not grow with the file, unless it is a pipe.

    Args:
        path: of the file.
        block_size: bytes to read at once.

    Raises:
        UserError: missing, unreadable or empty, or bytes that fit no encoding; names the offset of the first one.
    """
    try:
        status = path.stat()
        is_file = stat.S_ISREG(status.st_mode) and status.st_size > 0
        data = None if is_file else read_bytes(path)
        file = TextFile(path, status, data, "utf-8", 0, block_size)
        with file.open() as opened:
            mark, encoding = find_mark(opened.read(4))
        file = replace(file, encoding=encoding or "utf-8", begin=len(mark))
        invalid = _find_invalid_utf_8(file) if file.codec == "utf-8" else _find_invalid(file)
        if invalid is not None and not mark:
            file = replace(file, encoding=_likeliest_encoding(file))
            invalid = invalid if file.encoding == "utf-8" else _find_invalid(file)
        if invalid is not None:
            with file.open() as opened:
                opened.seek(invalid)
                (byte,) = opened.read(1)
            raise no_fit(byte, str(path), invalid, (file.encoding,) if mark else NARROW, file.encoding)
    except OSError as error:
        raise unreadable(path, error) from error
    if all(map(str.isspace, file.blocks())):
        raise UserError(f"{path} is empty", "name a file with content, or leave this one out")
    return file


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _find_invalid(file: TextFile) -> int | None:
    """Offset of the first byte that is part of no character."""
    decoder = codecs.getincrementaldecoder(file.codec)()
    with file.open() as opened:
        offset = opened.seek(file.begin)
        while True:
            block = opened.read(file.block_size)
            pending, _ = decoder.getstate()
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return offset - len(pending) + error.start
            if not block:
                return None
            offset += len(block)


def _find_invalid_utf_8(file: TextFile) -> int | None:
    """As `_find_invalid`, for UTF-8: Arrow checks it several times as fast as Python decodes it."""
    with file.open() as opened:
        offset, rest = opened.seek(file.begin), b""
        while True:
            read = opened.read(file.block_size)
            block = rest + read
            cut = _CUT_CHARACTER.search(block, len(block) - 3) if read else None
            size = cut.start() if cut else len(block)
            bounds = pyarrow.py_buffer(struct.pack("=ii", 0, size))
            try:
                text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, bounds, pyarrow.py_buffer(block)])
                text.validate(full=True)
            except pyarrow.ArrowInvalid:
                try:
                    block[:size].decode()
                except UnicodeDecodeError as error:
                    return offset + error.start
            if not read:
                return None
            offset, rest = offset + size, block[size:]


def _likeliest_encoding(file: TextFile) -> str:
    """The encoding that samples of a file that is no UTF-8 speak for; of the file, only those are loaded."""
    if file.data is not None:
        return likeliest_of_samples(memoryview(file.data), NARROW)
    with (
        file.open() as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        return likeliest_of_samples(view, NARROW)
