"""A normalised copy of a text, in which disguised words are restored, and a fast search for many words at once."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SENTENCE_ENDS = "。！？!?…”’」』）)】］]》>～~—.;；"
_ENDS = re.compile(f"[{re.escape(SENTENCE_ENDS)}]")
# Letters that look like others, and traditional characters that are frequent in appeals to readers.
_LOOK_ALIKE = dict(
    zip(
        "αβεικνορτυχωηавсԁеһіјкмноԛрѕтухѵшѡԝոօꓪꓳꓚꓟꓐꓢꓔ",
        "abeiknoptuxwnabcdehijkmhoqpstyxvwwwnowocmbst",
        strict=True,
    )
)
_SIMPLIFIED = dict(
    zip(
        "請讀閱網頁說説書載點擊訪問記機戶瀏覽節時間數聲權題發錄續補給謝賞轉註優質費彈無廣們壹還訂購買後"
        "電腦閣館學庫齋壇論掃對製鏈連熱門這處動員盡",
        "请读阅网页说说书载点击访问记机户浏览节时间数声权题发录续补给谢赏转注优质费弹无广们一还订购买后"
        "电脑阁馆学库斋坛论扫对制链连热门这处动员尽",
        strict=True,
    )
)
# Styled letters and letters of other shapes without a compatibility form: ᴡ, 🅦, 🇼.
_STYLED = re.compile(
    r"(?:LATIN|MODIFIER LETTER|NEGATIVE|SQUARED|CIRCLED|REGIONAL INDICATOR|MATHEMATICAL)\b.* ([A-Z])(?: WITH .*)?"
)
_BEYOND = range(0x10000, 0x20000)


class WordSearch:
    """Finds literal words in a text by their first three characters, all words at once."""

    def __init__(self, words: Sequence[str]) -> None:
        self.by_first: dict[str, list[str]] = {}
        for word in words:
            self.by_first.setdefault(word[0], []).append(word)
        self.tables = [np.zeros(0x10000, np.uint16) for _ in range(3)]
        # 16 groups, one bit each; words shorter than three have groups of their own, as they match any third character.
        ordered = sorted(set(words), key=lambda word: (min(len(word), 3), word))
        for rank, word in enumerate(ordered):
            bit = np.uint16(1 << (len(word) - 1 if len(word) < 3 else 2 + rank * 14 // len(ordered)))
            for place, table in enumerate(self.tables):
                if place < len(word):
                    table[min(ord(word[place]), 0xFFFF)] |= bit
                else:
                    table |= bit

    def within(self, text: str) -> set[str]:
        """Those of the words that the text contains."""
        found: set[str] = set()
        for place in self.find(character_codes(text)).tolist():
            found.update(word for word in self.by_first.get(text[place], ()) if text.startswith(word, place))
        return found

    def find(self, codes: np.ndarray) -> np.ndarray:
        """Positions in `codes` (characters) where one of the words may start; none is missed."""
        first, second, third = self.tables
        padded = np.concatenate([codes, np.zeros(2, codes.dtype)])
        places = np.flatnonzero(first[codes] & second[padded[1:-1]])
        return places[(first[padded[places]] & second[padded[places + 1]] & third[padded[places + 2]]) != 0]


def without_blanks(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def character_codes(text: str) -> np.ndarray:
    """(len(text),) uint16: characters; of those outside the basic plane styled letters as plain ones, others 0xFFFF."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    found = np.minimum(codes, 0xFFFF).astype(np.uint16)
    beyond = np.flatnonzero(found == 0xFFFF)
    if beyond.size:
        found[beyond] = _styled_letters()[np.minimum(codes[beyond], _BEYOND.stop) - np.uint32(0xFFFF)]
    return found


@functools.cache
def _styled_letters() -> np.ndarray:
    """(0x10002,) uint16: the plain letter of each character from 0xFFFF to 0x20000, 0xFFFF where it is none."""
    letters = np.full(len(_BEYOND) + 2, 0xFFFF, np.uint16)
    for code in (*range(0x1D400, 0x1D800), *range(0x1F100, 0x1F200)):
        folded = fold(chr(code))
        if folded.isascii() and folded:
            letters[code - 0xFFFF] = ord(folded)
    return letters


@functools.cache
def folding_table() -> np.ndarray:
    """(0x10000,) uint16: the first character of each character's normalised form, 0 where it has none."""
    table = np.arange(0x10000, dtype=np.uint16)
    for code in itertools.chain(range(0x3400), range(0xA000, 0xAC00), range(0xF900, 0xFFFF)):
        folded = fold(chr(code))
        table[code] = min(ord(folded), 0xFFFF) if folded else 0
    for character in _SIMPLIFIED:
        table[ord(character)] = ord(fold(character))
    table[10] = 10  # keeps lines apart
    table[0xD800:0xE000] = 0xFFFF  # surrogates are not characters
    return table


@functools.cache
def fold(character: str) -> str:
    """A character's normalised form: half width, lower case, plain, simplified, the first of several; "" if none."""
    folded = next(filter(str.isalnum, unicodedata.normalize("NFKC", character).lower()), "")
    if not folded.isascii() or not folded:
        styled = _STYLED.fullmatch(unicodedata.name(folded or character, ""))
        folded = styled[1].lower() if styled else folded
    return _LOOK_ALIKE.get(folded, _SIMPLIFIED.get(folded, folded))


@dataclass(frozen=True)
class NormalizedCopy:
    """The normalised copy of a line.

    Attributes:
        text: the copy, one character for each letter, digit or Chinese character of the line.
        places: (len(text),) position of each in the line.
        line: the line.
    """

    text: str
    places: np.ndarray
    line: str

    @classmethod
    def of(cls, line: str) -> NormalizedCopy:
        """The copy of `line`."""
        copy = folding_table()[character_codes(line)]
        places = np.flatnonzero(copy)
        return cls(copy[places].tobytes().decode("utf-16-le"), places, line)

    @functools.cached_property
    def starts(self) -> list[int]:
        """Positions in `text` where a sentence may start: at its beginning, and after sentence ends."""
        ends = np.fromiter((match.start() for match in _ENDS.finditer(self.line)), np.int64)
        starts = np.unique(np.searchsorted(self.places, ends))
        return [0, *starts[(starts > 0) & (starts < len(self.text))].tolist()]

    def starts_before(self, words: Sequence[str], reach: int) -> list[int]:
        """Those of `starts` that are followed by one of the words, if there are any, within `reach` characters."""
        if len(self.text) <= reach or not words:
            return self.starts
        found = sorted(match.start() for word in words for match in re.finditer(re.escape(word), self.text))
        return [start for start in self.starts if bisect_left(found, start) < bisect_right(found, start + reach)]
