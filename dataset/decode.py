"""Bytes of a text file to characters, for the encodings that Chinese text comes in."""

from __future__ import annotations

import codecs
from pathlib import Path

from novelgpt.settings.errors import UserError

# The most frequent characters of both scripts: the right decoding of Chinese prose is full of them, a wrong one is not.
_FREQUENT = frozenset("的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之"
                      "這個們來爲為國說時會對於著")  # fmt: skip
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def decode_text(data: bytes, source: str) -> str:
    """Characters of `data` with line ends made "\\n": UTF-8 or UTF-16 by their mark, UTF-8, GB18030 or Big5-HKSCS.

    Nothing is ever replaced: bytes that fit no encoding are an error.

    Raises:
        UserError: no encoding fits; names the offset of the first bad byte.
    """
    marked = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    encoding = marked or "utf-8"
    failures: dict[str, UnicodeDecodeError] = {}
    text = _try(data, encoding, failures)
    if text is None and not marked:
        # Strict GBK and Big5 fail on most real files of these names; their supersets do not.
        texts = {name: _try(data, name, failures) for name in ("gb18030", "big5hkscs")}
        # The one that reads best was meant, even where it fails: damaged UTF-8 can pass for GB18030.
        encoding = max(("utf-8", *texts), key=lambda name: (_count_frequent(data, name), name not in failures))
        text = texts.get(encoding)
    if text is None:
        failure = failures[encoding]
        offset = failure.start + len(data) - len(failure.object)  # utf-8-sig counts from behind its mark
        raise UserError(
            f"{source}: byte {data[offset]:#04x} at offset {offset} fits no encoding "
            f"(tried {', '.join(failures)}; {encoding} reads best)",
            "mend or remove that byte, or save the file as UTF-8",
        )
    if not text.strip():
        raise UserError(f"{source} is empty", "name a file with content, or leave this one out")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: missing, unreadable or empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "check the path; relative ones start where you type") from error
    if not data.strip():
        raise UserError(f"{path} is empty", "name a file with content, or leave this one out")
    return data


def _try(data: bytes, encoding: str, failures: dict[str, UnicodeDecodeError]) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        failures[encoding] = error
        return None


def _count_frequent(data: bytes, encoding: str) -> int:
    """Frequent characters in what can be read of the beginning."""
    return sum(character in _FREQUENT for character in data[:200_000].decode(encoding, errors="ignore"))
