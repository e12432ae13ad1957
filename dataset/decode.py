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
    text = None
    failures: dict[str, UnicodeDecodeError] = {}
    for encoding in (marked,) if marked else ("utf-8",):
        text = _try(data, encoding, failures)
    if text is None and not marked:
        # Strict GBK and Big5 fail on most real files of these names; their supersets do not.
        candidates = [_try(data, encoding, failures) for encoding in ("gb18030", "big5hkscs")]
        text = max((c for c in candidates if c is not None), key=_share_of_frequent, default=None)
    if text is None:
        encoding, failure = max(failures.items(), key=lambda item: item[1].start)
        raise UserError(
            f"{source}: byte {data[failure.start]:#04x} at offset {failure.start} fits no encoding "
            f"(tried {', '.join(failures)}; {encoding} came farthest)",
            "mend or remove that byte, or save the file as UTF-8",
        )
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


def _share_of_frequent(text: str) -> float:
    sample = text[:100_000]
    return sum(character in _FREQUENT for character in sample) / max(1, len(sample))
