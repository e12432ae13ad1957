"""Repairs damaged Chinese text by its likeliest reading: one lost byte makes all later double bytes pair up wrongly."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Frequent characters of both scripts and their punctuation: the right decoding of Chinese prose is full of them.
_FREQUENT = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方"
    "多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日者意无力它与长把机十此已使情明性知全三"
    "又关点正业外将两高间由问很最重并物手应战向头文体美见被什二等产或新己身果加月话合回代内信老给位次度门任常先声比解水名真处"
    "走义各入几口认条气题活更别打女四神总何电少才听白却眼像难风吗呢吧啊笑哪死爱"
    "這個們來爲為國說時會對於著過發後裏裡種經麼學現當沒動還進樣開從實無與長機點業將兩間問應戰頭體見話內給門聲處義幾認條氣題"
    "別總電聽卻難風嗎愛曰吾汝乎矣哉哥嘅喺咗唔佢啲"
    "，。、：；？！“”‘’「」『』（）《》…—　\n"
)
_BAD_RUN, _BAD_BYTE, _CUT_END = -12.0, -8.0, -12.0
# GB18030 gives many pairs of bytes to private use: a stretch that is paired up wrongly has one in about 7 characters.
_PRIVATE_PAIR = re.compile("[\ue000-\uf8ff][^\n]{0,15}[\ue000-\uf8ff]")
_NEAR_BEFORE, _NEAR_BEHIND = 40, 160  # characters around such a pair that are read again
_SURELY_BETTER = 40.0  # min log-likelihood ratio of another reading of a line


class BadBytes(NamedTuple):
    """Bytes that form no character of the encoding and are left out of the text."""

    offset: int
    """Of the first of them, from 0, in the file (in the unpacked member, where the file is an archive)."""
    data: bytes


class Reading(NamedTuple):
    """How a stretch of bytes reads.

    Attributes:
        text: its characters.
        bad_bytes: bytes that are in none of them, offsets from the beginning of the stretch.
        size: how many bytes were read.
        log_probability: natural logarithm, of characters and bad bytes.
    """

    text: str
    bad_bytes: tuple[BadBytes, ...]
    size: int
    log_probability: float


def common_characters() -> str:
    """The first level of GB 2312 and that of Big5: the characters in daily use, about 6,500 of both scripts."""
    simplified = bytes(byte for lead in range(0xB0, 0xD8) for trail in range(0xA1, 0xFF) for byte in (lead, trail))
    trails = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
    traditional = bytes(byte for lead in range(0xA4, 0xC7) for trail in trails for byte in (lead, trail))
    return simplified.decode("gb2312", "ignore") + traditional.decode("big5", "ignore")


class _LogProbabilities(dict[str, float]):
    """Of a character in Chinese text, roughly: a class of characters shares its part of all text evenly."""

    def __init__(self) -> None:
        self.update((character, -10.0) for character in common_characters() if character >= "\u4e00")
        self.update(dict.fromkeys(map(chr, range(32, 127)), -7.0))
        self.update(dict.fromkeys(_FREQUENT, -6.2))
        self.update({"\r": -6.2, "\t": -7.0, "\ufffd": -20.0})

    def __missing__(self, character: str) -> float:
        code = ord(character)
        in_use = code < 0x250 or 0x2010 <= code < 0x2030 or 0x3000 <= code < 0x3100 or 0xFF00 <= code < 0xFFF0
        is_chinese = 0x3400 <= code < 0xA000 or 0x20000 <= code < 0x33480
        value = -22.0 if code < 0xA0 else -12.0 if in_use else -15.2 if is_chinese else -17.5
        self[character] = value
        return value


_LOG_PROBABILITY = _LogProbabilities()


def log_probability(text: str) -> float:
    """Natural logarithm of the probability of `text` as Chinese prose, character by character."""
    return sum(map(_LOG_PROBABILITY.__getitem__, text))


def mend(stretch: bytes, codec: str, fixed: bool, last: bool) -> Reading:
    """The likeliest reading of `stretch`: characters and bad bytes in any order (a shortest path over the bytes).

    Takes 2 to 3 microseconds a byte.

    Args:
        stretch: starts with a character, or with a bad byte.
        codec: "gb18030", "big5hkscs", "utf-16-le" or "utf-16-be".
        fixed: a character ends where `stretch` does; else the last one may reach beyond it.
        last: the file ends where `stretch` does, perhaps within a character.
    """
    size = len(stretch)
    best = [0.0] + [-math.inf] * size
    steps: list[tuple[int, str]] = [(0, "")] * (size + 1)  # length in bytes, text: "" for bad bytes
    for at in range(size):
        offers = [(length, text, log_probability(text)) for length, text in _characters_at(stretch, at, codec)]
        offers += [(length, "", _BAD_RUN + _BAD_BYTE * length) for length in range(1, min(4, size - at) + 1)]
        if last and size - at < 4 and _is_cut(stretch[at:], codec):
            offers.append((size - at, "", _CUT_END))
        for length, text, value in offers:
            if best[at] + value > best[at + length]:
                best[at + length] = best[at] + value
                steps[at + length] = (length, text)
    read = size if fixed else max(range(max(1, size - 3), size + 1), key=lambda place: best[place] + 5.0 * place)
    texts: list[str] = []
    bad: list[BadBytes] = []
    at = read
    while at:
        length, text = steps[at]
        at -= length
        if text:
            texts.append(text)
        else:
            bad.append(BadBytes(at, stretch[at : at + length]))
    return Reading("".join(reversed(texts)), tuple(reversed(bad)), read, best[read])


def _is_cut(end: bytes, codec: str) -> bool:
    """Whether `end` is the beginning of a character, and no more."""
    try:
        return not codecs.getincrementaldecoder(codec)().decode(end)
    except UnicodeDecodeError:
        return False


def find_shifted(text: str) -> Iterator[tuple[int, str, str]]:
    """Lines of `text` that became valid nonsense where GB18030 lost or gained a byte, with what they most likely said.

    Yields the number of each line, from 1, the line (of a long one, what surrounds the first evidence), and its
    likeliest reading.

    Such bytes decode without an error, so decoding leaves them as they are; files that others made UTF-8 have them too.
    Stretches of about 20 characters and more are found. A line is reported only where the other reading is e^40 times
    likelier, so that rare characters do not count.
    """
    number, counted, position = 1, 0, 0
    while match := _PRIVATE_PAIR.search(text, position):
        begin = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        end = len(text) if end < 0 else end
        number += text.count("\n", counted, begin)
        counted, position = begin, end
        # The surroundings of the pair suffice, and lines may be long.
        near = text[max(begin, match.start() - _NEAR_BEFORE) : min(end, match.end() + _NEAR_BEHIND)]
        reading = mend(near.encode("gb18030", "ignore"), "gb18030", fixed=True, last=False)
        if reading.log_probability > log_probability(near) + _SURELY_BETTER:
            yield number, near, reading.text


def _characters_at(data: bytes, at: int, codec: str) -> Iterator[tuple[int, str]]:
    """Lengths in bytes and texts of what can be read at `at`."""
    wide = codec.startswith("utf-16")
    if not wide and data[at] < 0x80:
        yield 1, chr(data[at])
        return
    for length in (2, 4) if wide or codec == "gb18030" else (2,):
        try:
            text = data[at : at + length].decode(codec)
        except UnicodeDecodeError:
            continue
        # Big5-HKSCS has double bytes of two code points; four bytes may also be two characters.
        if len(data) - at >= length and (length == 2 or len(text) == 1):
            yield length, text
