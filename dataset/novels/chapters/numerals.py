"""Numbers as headings write them: 12, １２, 十二, 一二〇, 壹佰贰拾, 十— with a dash for 一, ranges."""

from __future__ import annotations

import re
import unicodedata

DIGITS = "0-9０-９一二三四五六七八九十百千零〇○两兩廿卅卌壹贰貳叁參叄肆伍陆陸柒捌玖拾佰仟弌弍弎"
DASHES = r"\-－—―–‒‐‑─━﹣﹘−ーｰㄧ⼀"
"""Signs that stand for 一 in numbers: 第十—回. Between two numbers they mean a range: 第19—20章."""
_DASH = re.compile(rf"[{DASHES}]")
_ONES = "[一二两兩三四五六七八九壹贰貳叁參叄肆伍陆陸柒捌玖]"
_WELL_FORMED = re.compile(
    rf"(?:{_ONES}[千仟])?[零〇○]?(?:{_ONES}?[百佰])?[零〇○]?(?:{_ONES}?[十拾]|[廿卅卌])?{_ONES}?|[零〇○{_ONES[1:]}+"
)
_RANGE = re.compile(r"[~～至、]\s?第?|第")
_DIGIT_ROWS = ("零〇○", "一壹弌", "二两兩贰貳弍", "三叁參叄弎", "四肆", "五伍", "六陆陸", "七柒", "八捌", "九玖")
_VALUES = {character: digit for digit, row in enumerate(_DIGIT_ROWS) for character in row}
_MULTIPLES = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_TENS = {"廿": "二十", "卅": "三十", "卌": "四十"}


def to_number(text: str) -> int | None:
    """An Arabic, full-width or Chinese number: 12, １２, 十二, 一二零, 一百零一, 廿三, 壹佰贰拾; None for all else.

    >>> [to_number(text) for text in ("一百二十", "一一零", "廿三", "１２", "两千零一", "一十")]
    [120, 110, 23, 12, 2001, 10]
    """
    text = unicodedata.normalize("NFKC", "".join(text.split()))
    if text.isdecimal():
        return int(text)
    text = "".join(_TENS.get(character, character) for character in text)
    if not any(character in _MULTIPLES for character in text):
        digits = [_VALUES.get(character, int(character) if character.isdecimal() else None) for character in text]
        return None if not digits or None in digits else int("".join(map(str, digits)))
    total, digit = 0, 0
    for character in text:
        if character in _MULTIPLES:
            total += (digit or 1) * _MULTIPLES[character]
            digit = 0
        elif character in _VALUES:
            digit = _VALUES[character]
        elif character.isdecimal():
            digit = digit * 10 + int(character)
        else:
            return None
    return total + digit


def to_numbers(text: str) -> tuple[int, int] | None:
    """First and last number of a label: 19 and 20 for 19-20, twice 11 for 十—, whose dash is a misprint for 一.

    >>> [to_numbers(text) for text in ("19-20", "十—", "—百", "一百—十二", "十—十二", "—", "3")]
    [(19, 20), (11, 11), (100, 100), (112, 112), (10, 12), (1, 1), (3, 3)]
    """
    parts = _RANGE.split(text)
    if len(parts) == 2:
        begin, end = to_numbers(parts[0].rstrip(DASHES)), to_numbers(parts[1])
        return (begin[0], end[1]) if begin and end else None
    text = "".join(text.split())
    low, dash, high = re.fullmatch(rf"([^{DASHES}]*)([{DASHES}]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    first, last = to_number(low), to_number(high)
    if first is not None and last is not None and first < last:
        return first, last
    if dash and not any(map(str.isdecimal, text)) and _WELL_FORMED.fullmatch(written := _DASH.sub("一", text)):
        first = to_number(written)
    return None if first is None else (first, first)
