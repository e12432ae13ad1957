"""Decode text files in the encodings that Chinese text comes in.

`likeliest_encoding` detects the encoding from samples. `decode_text` accepts no invalid byte; `decode_tolerant` accepts
a few, leaves them out and reports where they were.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.mending import BadBytes, log_probability, mend
from novelgpt.settings.errors import UserError

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
NARROW = ("utf-8", "gb18030", "big5hkscs")
_UNMARKED = (*NARROW, "utf-16-le", "utf-16-be")
# Natural logarithm of the prior probability of each encoding; it only decides texts of a few characters.
_PRIOR = {"utf-8": 2.0, "gb18030": 1.0, "big5hkscs": 0.0, "utf-16-le": -9.0, "utf-16-be": -10.0}
_WINDOW, _WINDOWS = 512, 5  # bytes and number of samples
_HIGH_BYTES = bytes(range(128, 256))
_NON_ASCII = re.compile(rb"[\x80-\xff]")
_LETTER = re.compile(rb"[A-Za-z]")
_CONTROL_BYTE = re.compile(rb"[\x00-\x08\x0e-\x19\x1c-\x1f\x7f]")
_CONTROL = re.compile(_CONTROL_BYTE.pattern.decode())
_REPEATED = re.compile(rb"(.{1,16}?)\1{23,}", re.DOTALL)
# Spaces, digits and punctuation are likelier after one another than among hanzi, by this logarithm each: else many of
# them would pass for UTF-16, in which two of them are one character, and hardly one that is in use.
_PUNCTUATION = re.compile(r"[\t\n\r -@]{2,}")
_PUNCTUATION_BONUS = 2.4
# A two-byte character whose second byte is ASCII, alone between ASCII characters: found in Latin-1 or damaged English.
_ISOLATED = re.compile(rb"[\t\n\r -~][\x81-\xfe][\x40-\x7e](?=[\t\n\r -~])")
_RARE, _RARE_PENALTY = -12.0, -12.0  # log-probability of a character, and of an isolated one being rare
_SURELY_UTF_8 = 24
"""So many non-ASCII bytes are never valid UTF-8 by chance: in GB18030, once in 10^17 texts."""
_ENOUGH_FOR_UTF_16 = 256
"""So many bytes of UTF-16 include ASCII control characters: one in nine hanzi has one, "\\n" has one."""
_BOUNDARY_BYTE = re.compile(rb"[\x00-\x2f]")
"""A byte that is always a whole character in UTF-8, GB18030 and Big5, so decoding can resynchronise after it."""
_BLOCK, _LONGEST_BLOCK = 16_384, 262_144  # bytes


class Decoded(NamedTuple):
    """A decoded file.

    Attributes:
        text: with "\n" line ends; no NUL and no byte-order mark, even inside concatenated files.
        encoding: "utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "gb18030" or "big5hkscs".
        bad_bytes: what is left out of `text`, in order, neighbours merged: invalid bytes and NUL.
    """

    text: str
    encoding: str
    bad_bytes: tuple[BadBytes, ...] = ()


def decode_text(data: bytes, source: str) -> str:
    """Decode `data` strictly, with "\n" line ends: UTF-8 or UTF-16 by byte-order mark, else UTF-8, GB18030, Big5-HKSCS.

    Nothing is ever replaced: bytes that fit no encoding are an error.

    Raises:
        UserError: no encoding fits; names the offset of the first invalid byte.
    """
    mark, encoding = find_mark(data[:4])
    encoding = encoding or "utf-8"
    body = memoryview(data)[len(mark) :]
    try:
        text = str(body, encoding.removesuffix("-sig"))
    except UnicodeDecodeError:
        # The most plausible encoding was meant, even where it fails: damaged UTF-8 can pass for GB18030.
        # Strict GBK and Big5 fail on most real files of these names; their supersets do not.
        tried = (encoding,) if mark else NARROW
        encoding = encoding if mark else likeliest_encoding(data, tried)
        try:
            text = str(body, encoding.removesuffix("-sig"))
        except UnicodeDecodeError as error:
            offset = len(mark) + error.start
            raise no_fit(data[offset], source, offset, tried, encoding) from None
    if not text.strip():
        raise UserError(f"{source} is empty", "name a file with content, or leave this one out")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode_tolerant(data: bytes, source: str) -> Decoded:
    """Decode `data`, leaving out and reporting a few invalid bytes; they are never replaced.

    As `decode_text`, and UTF-16 without a byte-order mark. Bytes that decode strictly are never touched. Up to a
    thousandth of the file may be invalid; in a short file up to 8 bytes, as many as two damaged characters have, and an
    eighth of it. NUL counts as invalid; NULs at the end, which a full disk or a broken download leaves, count as one.
    After a lost byte, all double bytes would pair up wrongly: there the likeliest reading is used.

    Raises:
        UserError: empty, not text, or more invalid bytes than that; names the offset of the first one.
    """
    mark, encoding = find_mark(data[:4])
    if not mark:
        encoding = likeliest_encoding(data)
        _refuse_binary(data, source, encoding)
    start, end = len(mark), max(len(mark), len(data.rstrip(b"\0")))
    if encoding.startswith("utf-16") and end < len(data):
        end += (end - start) % 2  # the second byte of the last character
    bad: list[BadBytes] = []
    try:
        text = str(memoryview(data)[start:end], encoding.removesuffix("-sig"))
    except UnicodeDecodeError:
        text = _around_bad_bytes(data, start, end, encoding, source, bad)
    if "\0" in text:
        bad = sorted(bad + _nuls(data, start, end, encoding, text.count("\0"), source))
        text = text.replace("\0", "")
        _refuse_too_many(data, source, encoding, bad[0].offset, sum(len(run.data) for run in bad))
    if end < len(data):
        bad.append(BadBytes(end, data[end:]))
    text = text.replace("\ufeff", "")
    if not text or text.isspace():
        what = "holds nothing but NUL bytes" if bad else "is empty"
        raise UserError(f"{source} {what}", "name a file with content, or leave this one out")
    merged: list[BadBytes] = []
    for run in bad:
        if merged and merged[-1].offset + len(merged[-1].data) == run.offset:
            run = BadBytes(merged[-1].offset, merged.pop().data + run.data)
        merged.append(run)
    return Decoded(text.replace("\r\n", "\n").replace("\r", "\n"), encoding, tuple(merged))


def likeliest_encoding(data: bytes, candidates: Sequence[str] = _UNMARKED) -> str:
    """The candidate in which samples of `data` are the most likely Chinese (or plain) text.

    The strictest comes first: what is valid UTF-8 from end to end is UTF-8, unless it is so short that this may be
    chance, and no text in UTF-16 is. Otherwise all candidates decode the same bytes, so the probabilities of their
    texts can be compared. Long repetitions and NULs at the end carry no information.
    """
    stripped = data.rstrip(b"\0")
    data = stripped + data[len(stripped) : len(stripped) + len(stripped) % 2]  # the last character of UTF-16
    if "utf-8" in candidates:
        with contextlib.suppress(UnicodeDecodeError):
            data.decode("utf-8")
            if len(data) - len(data.translate(None, _HIGH_BYTES)) >= _SURELY_UTF_8:
                return "utf-8"
            if not _CONTROL_BYTE.search(data):
                if data.isascii():
                    return "utf-8"
                candidates = [encoding for encoding in candidates if encoding in NARROW]
    return likeliest_of_samples(memoryview(data), candidates)


def likeliest_of_samples(data: memoryview, candidates: Sequence[str]) -> str:
    """The candidate that `likeliest_encoding` chooses where it is not settled that `data` is UTF-8.

    Args:
        data: of a file, or of a mapped one, of which little more than the samples is loaded.
        candidates: encodings.
    """
    data = _without_last_nuls(data)
    sampled = b"".join(_REPEATED.sub(_shorten, sample) for sample in _samples(data, "utf-8"))
    if len(sampled) >= _ENOUGH_FOR_UTF_16 and not _CONTROL_BYTE.search(sampled):
        candidates = [encoding for encoding in candidates if encoding in NARROW] or candidates
    return max(candidates, key=lambda encoding: _likelihood(data, encoding))


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: missing, unreadable or empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if not data.strip():
        raise UserError(f"{path} is empty", "name a file with content, or leave this one out")
    return data


def find_mark(data: bytes) -> tuple[bytes, str]:
    """The byte-order mark with which a file begins and the encoding that it stands for; of each, nothing without one.

    Args:
        data: at least the first three bytes.
    """
    return next((known for known in _BYTE_ORDER_MARKS if data.startswith(known[0])), (b"", ""))


def unreadable(path: Path, error: OSError) -> UserError:
    """The error that says why a file cannot be read."""
    return UserError(f"{path}: {error.strerror}", "check the path; relative ones start where you type")


def no_fit(byte: int, source: str, offset: int, tried: Sequence[str], encoding: str, more: str = "") -> UserError:
    """The error that names the first byte of a file that is part of no character."""
    return UserError(
        f"{source}: byte {byte:#04x} at offset {offset} fits no encoding "
        f"(tried {', '.join(tried)}; {encoding} reads best){more}",
        "fix or remove that byte, or save the file as UTF-8",
    )


def _without_last_nuls(data: memoryview) -> memoryview:
    """All but the NULs at the end; one stays that may be the second byte of the last character in UTF-16."""
    end = len(data)
    while end >= _BLOCK and not any(data[end - _BLOCK : end]):
        end -= _BLOCK
    last = bytes(data[max(0, end - _BLOCK) : end])
    end -= len(last) - len(last.rstrip(b"\0"))
    return data[: end + end % 2]


def _samples(data: bytes | memoryview, encoding: str) -> Iterator[bytes]:
    """Windows of `data` that start at a character: at the first non-ASCII byte, and spread over the rest."""
    if len(data) <= _WINDOW * _WINDOWS:
        yield bytes(data)
        return
    first = _NON_ASCII.search(data)
    begin = first.start() if first else 0
    for index in range(_WINDOWS):
        at = begin + (len(data) - begin - _WINDOW) * index // _WINDOWS
        if index:
            boundary = _BOUNDARY_BYTE.search(data, at, at + _BLOCK)
            if boundary is None:
                continue
            at = boundary.end()
        if encoding not in NARROW:
            at -= at % 2
        yield bytes(data[at : at + _WINDOW])


def _likelihood(data: memoryview, encoding: str) -> float:
    """Logarithm of the probability of the samples, for the mean number of bytes that samples have."""
    total, sampled = 0.0, 0
    valid, high, letters = encoding == "utf-8", 0, 0
    for sample in _samples(data, encoding):
        sample = _REPEATED.sub(_shorten, sample)
        total += _log_probability(sample, encoding)
        sampled += len(sample)
        if valid:
            valid = "\ufffd" not in sample.decode(encoding, "replace")[:-1]
            high += len(sample) - len(sample.translate(None, _HIGH_BYTES))
            letters += len(_LETTER.findall(sample))
    if valid:
        # Other encodings are seldom valid UTF-8. Text in Latin letters has few non-ASCII bytes, which say little.
        total += high * (10.0 if letters >= high else 1.0)
    return total * min(1.0, len(data) / max(1, sampled)) + _PRIOR[encoding]


def _log_probability(sample: bytes, encoding: str) -> float:
    """Log-probability of a decoded sample, taking neighbouring characters into account."""
    text = sample.decode(encoding, "replace")
    value = log_probability(text)
    if encoding in NARROW:
        value += _PUNCTUATION_BONUS * sum(match.end() - match.start() - 1 for match in _PUNCTUATION.finditer(text))
    if encoding in ("gb18030", "big5hkscs"):
        isolated = (match[0][1:].decode(encoding, "ignore") for match in _ISOLATED.finditer(b"\n" + sample))
        value += _RARE_PENALTY * sum(log_probability(character) < _RARE for character in isolated)
    return value


def _shorten(run: re.Match[bytes]) -> bytes:
    """Shorten a long repetition, which says nothing about the encoding, without breaking its characters."""
    step = 12 * len(run[1])  # a multiple of every length of a character, 1 to 4 bytes
    return run[0][: step + len(run[0]) % step]


def _refuse_binary(data: bytes, source: str, encoding: str) -> None:
    """Raise a UserError where samples are not text: control characters, or only characters that hardly occur."""
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
        f"{source} is not text: {reason} (tried {', '.join(_UNMARKED)}; {encoding} reads best)",
        "leave this file out, or save it as UTF-8 text",
    )


def _refuse_too_many(data: bytes, source: str, encoding: str, first: int, count: int) -> None:
    if count > max(len(data) // 1000, min(8, len(data) // 8)):
        tried = (encoding,) if find_mark(data)[0] else _UNMARKED
        raise no_fit(data[first], source, first, tried, encoding, f", and {count - 1} or more after it")


def _nuls(data: bytes, start: int, end: int, encoding: str, count: int, source: str) -> list[BadBytes]:
    if not encoding.startswith("utf-16"):
        return [BadBytes(found.start(), found[0]) for found in re.finditer(rb"\0+", data[:end])]
    nuls = [BadBytes(at, b"\0\0") for at in range(start, end - 1, 2) if data[at : at + 2] == b"\0\0"]
    if len(nuls) != count:
        raise no_fit(0, source, data.find(b"\0\0"), (encoding,), encoding)
    return nuls


def _around_bad_bytes(data: bytes, start: int, end: int, encoding: str, source: str, bad: list[BadBytes]) -> str:
    """The text without its invalid bytes, which are added to `bad`; in blocks, so that time is linear in the size."""
    codec = encoding.removesuffix("-sig")
    texts: list[str] = []
    position, count = start, 0
    while position < end:
        stop = position + _BLOCK
        if not codec.startswith("utf-16"):
            boundary = _BOUNDARY_BYTE.search(data, stop, position + _LONGEST_BLOCK)
            stop = boundary.end() if boundary else position + _LONGEST_BLOCK
        stop = min(end, stop)
        try:
            texts.append(data[position:stop].decode(codec))
            position = stop
            continue
        except UnicodeDecodeError as error:
            first, after = position + error.start, position + error.end
        if stop < end and stop - first < 4 and first > position:  # the block may have cut a character
            texts.append(data[position:first].decode(codec))
            position = first
            continue
        if codec == "utf-8":
            texts.append(data[position:first].decode(codec))
            runs = [BadBytes(first, data[first:after])]
            position = after
        else:
            low, high, fixed = _damaged(data, position, first, end, codec)
            texts.append(data[position:low].decode(codec))
            reading = mend(data[low:high], codec, fixed, high == end)
            texts.append(reading.text)
            runs = [BadBytes(low + run.offset, run.data) for run in reading.bad_bytes]
            position = low + reading.size
        count += sum(len(run.data) for run in runs)
        bad += runs
        _refuse_too_many(data, source, encoding, bad[0].offset if bad else first, count)
    return "".join(texts)


def _damaged(data: bytes, position: int, first: int, end: int, codec: str) -> tuple[int, int, bool]:
    """Bounds of the bytes to re-read around the error at `first`, and whether a character surely ends with them."""
    if codec.startswith("utf-16"):
        low = max(position, first - 512)
        high = min(end, first + 512)
        return low - (low - position) % 2, high, high == end
    low = max(position, *(data.rfind(byte, position, first) + 1 for byte in (b"\n", b"\r", b" ", b"\0")))
    boundary = _BOUNDARY_BYTE.search(data, first + 1, first + 512)
    high = boundary.start() if boundary else min(end, first + 512)
    return low, high, boundary is not None or high == end
