"""Bytes of a text file to characters, for the encodings that Chinese text comes in.

`likeliest_encoding` tells the encoding from samples; `decode_text` then takes no bad byte, `decode_tolerant` takes a
few, leaves them out and says where they were.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.mending import BadBytes, log_probability, mend
from novelgpt.settings.errors import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NARROW = ("utf-8", "gb18030", "big5hkscs")
_UNMARKED = (*_NARROW, "utf-16-le", "utf-16-be")
# Natural logarithm of how likely an encoding is before a byte is read: settles texts of a few characters only.
_PRIOR = {"utf-8": 2.0, "gb18030": 1.0, "big5hkscs": 0.0, "utf-16-le": -9.0, "utf-16-be": -10.0}
_WINDOW, _WINDOWS = 512, 5
_HIGH_BYTES = bytes(range(128, 256))
_NON_ASCII = re.compile(rb"[\x80-\xff]")
_LETTER = re.compile(rb"[A-Za-z]")
_CONTROL_BYTE = re.compile(rb"[\x00-\x08\x0e-\x19\x1c-\x1f\x7f]")
_CONTROL = re.compile(_CONTROL_BYTE.pattern.decode())
_RUN = re.compile(rb"(.{1,16}?)\1{23,}", re.DOTALL)
# Blanks, digits and signs behind one another are likelier than each among hanzi, as a logarithm: else many of them
# would pass for UTF-16. There two of them are one character, and hardly one of those is in use.
_SIGNS = re.compile(r"[\t\n\r -@]{2,}")
_IN_SIGNS = 2.4
# A character of two bytes, the second one ASCII, that stands alone between two of ASCII: in Latin-1 or damaged English.
_ALONE = re.compile(rb"[\t\n\r -~][\x81-\xfe][\x40-\x7e](?=[\t\n\r -~])")
_RARE, _ALONE_AND_RARE = -12.0, -12.0
_SURELY_UTF_8 = 24
"""So many bytes that are not ASCII are never valid UTF-8 by chance: in GB18030, once in 10^17 texts."""
_TELLING = 256
"""In so many bytes of UTF-16 there are control characters of ASCII: one in nine hanzi has one, "\\n" has one."""
_NEVER_INSIDE = re.compile(rb"[\x00-\x2f]")
"""Such a byte is a character of its own in UTF-8, GB18030 and Big5: reading can start anew behind it."""
_BLOCK, _LONGEST_BLOCK = 16_384, 262_144


class Decoded(NamedTuple):
    """A decoded file.

    Attributes:
        text: line ends are "\\n"; no NUL and no byte-order mark, also where files with marks were joined.
        encoding: "utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "gb18030" or "big5hkscs".
        bad_bytes: what is left out of `text`, in order, neighbours joined: bytes that fit no character, and NUL.
    """

    text: str
    encoding: str
    bad_bytes: tuple[BadBytes, ...] = ()


def decode_text(data: bytes, source: str) -> str:
    """Characters of `data` with line ends made "\\n": UTF-8 or UTF-16 by their mark, UTF-8, GB18030 or Big5-HKSCS.

    Nothing is ever replaced: bytes that fit no encoding are an error.

    Raises:
        UserError: no encoding fits; names the offset of the first bad byte.
    """
    mark, encoding = _mark_of(data)
    try:
        text = _strict(data, len(mark), len(data), encoding)
    except UnicodeDecodeError:
        # The one that reads best was meant, even where it fails: damaged UTF-8 can pass for GB18030.
        # Strict GBK and Big5 fail on most real files of these names; their supersets do not.
        tried = (encoding,) if mark else _NARROW
        encoding = encoding if mark else likeliest_encoding(data, tried)
        try:
            text = _strict(data, len(mark), len(data), encoding)
        except UnicodeDecodeError as error:
            raise _no_fit(data, source, len(mark) + error.start, tried, encoding) from None
    if not text.strip():
        raise UserError(f"{source} is empty", "name a file with content, or leave this one out")
    return _with_line_feeds(text)


def decode_tolerant(data: bytes, source: str) -> Decoded:
    """Characters of `data`, all but a few bytes: what fits no character is left out and named, never replaced.

    As `decode_text`, and UTF-16 without a mark. Bytes that decode strictly are never touched. Bad bytes may be a
    thousandth of the file; in a short file up to 8, as two damaged characters have at most, and an eighth of it. NUL is
    a bad byte too; NULs at the end, which a full disk or a broken download leaves, count as one.
    Where a byte is lost, all double bytes behind it would pair up wrongly: there the likeliest reading is taken.

    Raises:
        UserError: empty, no text, or more bad bytes than that; names the offset of the first one.
    """
    mark, encoding = _mark_of(data)
    if not mark:
        encoding = likeliest_encoding(data)
        _refuse_binary(data, source, encoding)
    end = _end_of_text(data, len(mark), encoding)
    bad: list[BadBytes] = []
    try:
        text = _strict(data, len(mark), end, encoding)
    except UnicodeDecodeError:
        text = _around_bad_bytes(data, len(mark), end, encoding, source, bad)
    if "\0" in text:
        bad = sorted(bad + _nuls(data, len(mark), end, encoding, text.count("\0"), source))
        text = text.replace("\0", "")
        _refuse_too_many(data, source, encoding, bad[0].offset, sum(len(run.data) for run in bad))
    if end < len(data):
        bad.append(BadBytes(end, data[end:]))
    text = text.replace("\ufeff", "")
    if not text or text.isspace():
        what = "holds nothing but NUL bytes" if bad else "is empty"
        raise UserError(f"{source} {what}", "name a file with content, or leave this one out")
    return Decoded(_with_line_feeds(text), encoding, tuple(_join(bad)))


def likeliest_encoding(data: bytes, candidates: Sequence[str] = _UNMARKED) -> str:
    """The encoding, of `candidates`, in which samples of `data` are the most likely Chinese (or plain) text.

    The strictest comes first: what is valid UTF-8 from end to end is UTF-8, unless it is so short that this may be
    chance, and no text in UTF-16 is. Else all candidates read the same bytes, so the probabilities of what they read
    can be compared. Long runs and NULs at the end say nothing.
    """
    data = _without_padding(data)
    if "utf-8" in candidates and _is_valid_utf_8(data):
        if len(data) - len(data.translate(None, _HIGH_BYTES)) >= _SURELY_UTF_8:
            return "utf-8"
        if not _CONTROL_BYTE.search(data):
            if data.isascii():
                return "utf-8"
            candidates = [encoding for encoding in candidates if encoding in _NARROW]
    sampled = b"".join(_RUN.sub(_shorten, sample) for sample in _samples(data, "utf-8"))
    if len(sampled) >= _TELLING and not _CONTROL_BYTE.search(sampled):
        candidates = [encoding for encoding in candidates if encoding in _NARROW] or candidates
    return max(candidates, key=lambda encoding: _likelihood(data, encoding))


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


def _without_padding(data: bytes) -> bytes:
    """`data` without the NULs at its end, all but the half of a last character in UTF-16."""
    text = data.rstrip(b"\0")
    return text + data[len(text) : len(text) + len(text) % 2]


def _is_valid_utf_8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _mark_of(data: bytes) -> tuple[bytes, str]:
    return next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "utf-8"))


def _strict(data: bytes, start: int, end: int, encoding: str) -> str:
    return str(memoryview(data)[start:end], encoding.removesuffix("-sig"))


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _no_fit(data: bytes, source: str, offset: int, tried: Sequence[str], encoding: str, more: str = "") -> UserError:
    return UserError(
        f"{source}: byte {data[offset]:#04x} at offset {offset} fits no encoding "
        f"(tried {', '.join(tried)}; {encoding} reads best){more}",
        "mend or remove that byte, or save the file as UTF-8",
    )


def _samples(data: bytes, encoding: str) -> Iterator[bytes]:
    """Stretches of `data` that begin with a character: from the first byte that is not ASCII, and from later places."""
    if len(data) <= _WINDOW * _WINDOWS:
        yield data
        return
    first = _NON_ASCII.search(data)
    begin = first.start() if first else 0
    for index in range(_WINDOWS):
        at = begin + (len(data) - begin - _WINDOW) * index // _WINDOWS
        if index:
            anew = _NEVER_INSIDE.search(data, at, at + _BLOCK)
            if anew is None:
                continue
            at = anew.end()
        if encoding not in _NARROW:
            at -= at % 2
        yield data[at : at + _WINDOW]


def _likelihood(data: bytes, encoding: str) -> float:
    """Logarithm of the probability of the samples, for the mean number of bytes that samples have."""
    total, sampled = 0.0, 0
    valid, high, letters = encoding == "utf-8", 0, 0
    for sample in _samples(data, encoding):
        sample = _RUN.sub(_shorten, sample)
        total += _log_probability(sample, encoding)
        sampled += len(sample)
        if valid:
            valid = "\ufffd" not in sample.decode(encoding, "replace")[:-1]
            high += len(sample) - len(sample.translate(None, _HIGH_BYTES))
            letters += len(_LETTER.findall(sample))
    if valid:
        # Bytes of another encoding are seldom valid UTF-8; text in Latin letters has few others, and they say little.
        total += high * (10.0 if letters >= high else 1.0)
    return total * min(1.0, len(data) / max(1, sampled)) + _PRIOR[encoding]


def _log_probability(sample: bytes, encoding: str) -> float:
    """Logarithm of the probability of what a sample reads, what stands next to each other considered."""
    text = sample.decode(encoding, "replace")
    value = log_probability(text)
    if encoding in _NARROW:
        value += _IN_SIGNS * sum(match.end() - match.start() - 1 for match in _SIGNS.finditer(text))
    if encoding in ("gb18030", "big5hkscs"):
        alone = (match[0][1:].decode(encoding, "ignore") for match in _ALONE.finditer(b"\n" + sample))
        value += _ALONE_AND_RARE * sum(log_probability(character) < _RARE for character in alone)
    return value


def _shorten(run: re.Match[bytes]) -> bytes:
    """A long run, which says nothing about the encoding, by as many bytes as keep all characters in step."""
    step = 12 * len(run[1])  # characters have 1 to 4 bytes
    return run[0][: step + len(run[0]) % step]


def _refuse_binary(data: bytes, source: str, encoding: str) -> None:
    """Raise where samples are no text: control characters, or nothing but characters that hardly occur."""
    text = "".join(sample.decode(encoding, "replace") for sample in _samples(data, encoding)).rstrip("\0")
    controls = len(_CONTROL.findall(text))
    mean = log_probability(text) / max(1, len(text))
    lowest = -13.0 if encoding.startswith("utf-16") else -15.5
    if controls > max(3, len(text) // 50):
        where = next(offset for offset, byte in enumerate(data) if byte < 32 and byte not in b"\t\n\v\f\r\x1a\x1b")
        reason = f"{controls} control characters among {len(text)}, the first at offset {where}"
    elif encoding != "utf-8" and mean < lowest:
        bad = _NON_ASCII.search(data)
        offset = bad.start() if bad else 0
        reason = f"read as Chinese in no encoding, from byte {data[offset]:#04x} at offset {offset} on"
    else:
        return
    raise UserError(
        f"{source} is no text: {reason} (tried {', '.join(_UNMARKED)}; {encoding} reads best)",
        "leave this file out, or save it as UTF-8 text",
    )


def _refuse_too_many(data: bytes, source: str, encoding: str, first: int, count: int) -> None:
    if count > max(len(data) // 1000, min(8, len(data) // 8)):
        marked = _mark_of(data)[0]
        tried = (encoding,) if marked else _UNMARKED
        raise _no_fit(data, source, first, tried, encoding, f", and {count - 1} or more after it")


def _end_of_text(data: bytes, start: int, encoding: str) -> int:
    """Where the NULs at the end begin."""
    end = max(start, len(data.rstrip(b"\0")))
    if encoding.startswith("utf-16") and end < len(data):
        end += (end - start) % 2  # half of the last character
    return end


def _nuls(data: bytes, start: int, end: int, encoding: str, count: int, source: str) -> list[BadBytes]:
    if not encoding.startswith("utf-16"):
        return [BadBytes(found.start(), found[0]) for found in re.finditer(rb"\0+", data[:end])]
    nuls = [BadBytes(at, b"\0\0") for at in range(start, end - 1, 2) if data[at : at + 2] == b"\0\0"]
    if len(nuls) != count:
        raise _no_fit(data, source, data.find(b"\0\0"), (encoding,), encoding)
    return nuls


def _join(bad: Sequence[BadBytes]) -> list[BadBytes]:
    joined: list[BadBytes] = []
    for run in bad:
        if joined and joined[-1].offset + len(joined[-1].data) == run.offset:
            joined[-1] = BadBytes(joined[-1].offset, joined[-1].data + run.data)
        else:
            joined.append(run)
    return joined


def _around_bad_bytes(data: bytes, start: int, end: int, encoding: str, source: str, bad: list[BadBytes]) -> str:
    """The text without its bad bytes, which go to `bad`; in blocks, so that time is linear in the size."""
    codec = encoding.removesuffix("-sig")
    texts: list[str] = []
    position, count = start, 0
    while position < end:
        stop = _block_end(data, position, end, codec)
        try:
            texts.append(_strict(data, position, stop, codec))
            position = stop
            continue
        except UnicodeDecodeError as error:
            first, behind = position + error.start, position + error.end
        if stop < end and stop - first < 4 and first > position:  # the block may have cut a character
            texts.append(_strict(data, position, first, codec))
            position = first
            continue
        if codec == "utf-8":
            texts.append(_strict(data, position, first, codec))
            runs = [BadBytes(first, data[first:behind])]
            position = behind
        else:
            low, high, fixed = _damaged(data, position, first, end, codec)
            texts.append(_strict(data, position, low, codec))
            reading = mend(data[low:high], codec, fixed, high == end)
            texts.append(reading.text)
            runs = [BadBytes(low + run.offset, run.data) for run in reading.bad_bytes]
            position = low + reading.size
        count += sum(len(run.data) for run in runs)
        bad += runs
        _refuse_too_many(data, source, encoding, bad[0].offset if bad else first, count)
    return "".join(texts)


def _block_end(data: bytes, position: int, end: int, codec: str) -> int:
    if codec.startswith("utf-16"):
        return min(end, position + _BLOCK)
    anew = _NEVER_INSIDE.search(data, position + _BLOCK, position + _LONGEST_BLOCK)
    return min(end, anew.end() if anew else position + _LONGEST_BLOCK)


def _damaged(data: bytes, position: int, first: int, end: int, codec: str) -> tuple[int, int, bool]:
    """Where the stretch around the error at `first` begins and ends, and whether a character is sure to end there."""
    if codec.startswith("utf-16"):
        low = max(position, first - 512)
        high = min(end, first + 512)
        return low - (low - position) % 2, high, high == end
    low = max(position, *(data.rfind(byte, position, first) + 1 for byte in (b"\n", b"\r", b" ", b"\0")))
    anew = _NEVER_INSIDE.search(data, first + 1, first + 512)
    high = anew.start() if anew else min(end, first + 512)
    return low, high, anew is not None or high == end
