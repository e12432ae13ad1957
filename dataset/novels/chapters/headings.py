"""Lines that may be headings: found in a whole book by two searches, then parsed."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dataset.novels.chapters.numerals import DASHES, DIGITS, to_numbers
from dataset.novels.normalized import NormalizedCopy

_B = r"[^\S\n]"
"""A blank within a line."""
_NUMBER = rf"(?:[{DIGITS}]{_B}{{0,3}}){{1,9}}"
_NUMBER_OR_DASH = rf"(?:[{DIGITS}{DASHES}]{_B}{{0,3}}){{1,19}}"
_DASHED = rf"[{DIGITS}{DASHES}]{{1,6}}(?<=[{DIGITS}].|.[{DIGITS}])"
_CHAPTER_UNITS = "章回节節话話"
_VOLUME_UNITS = "卷部集篇册冊幕折"
# 第二部分 is a volume; 第一回合, 第三章程, 第二节课, 第一集团军, 第三卷子 and the like are mostly prose.
_UNIT = r"(?:部分(?!人)|[章回节節话話卷部集篇册冊幕折])"
_WORD = re.compile(
    r"章程|回合|[节節][课課目日]|[话話][题題剧劇]|卷子|部[队隊门門]|集[团團合]|篇文章|[册冊]子|幕府|折[子扣]|部分人"
)
_LABEL = re.compile(
    rf"第{_B}{{0,3}}(?P<number>{_NUMBER_OR_DASH}(?:[~～至、]{_B}?第?{_NUMBER_OR_DASH}|第{_NUMBER})?)(?P<unit>{_UNIT})"
)
_SPECIAL = (
    "楔子|引子|序[章言幕曲篇]?|自序|代序|总序|總序|前言|前[记記]|引言|[缘緣]起首回|首[回章]|[缘緣]起|番外[篇卷]?|外[传傳]"
    "|尾[声聲]|后[记記]|後[记記]|终章|終章|终曲|最[终終][章回]|大[结結]局|[结結]局|[结結][语語]|跋|附[录錄]|完本感言"
)
_NAMED_VOLUME = rf"卷{_B}?[之第]?{_B}?(?:{_NUMBER}|[{DASHES}](?={_B}|\n|$))|[上中下](?:卷|部|[册冊]|篇|[编編])"
_ENGLISH = r"(?i:chapter)[^\S\n]*[0-9０-９]{1,4}"
_OPENERS = "【[［〔〖「『《〈<(（"
_CLOSERS = "】]］〕〗」』》〉>)）"
_SYMBOLS = "=＝*＊#＃—_~～·•●◆◇■□★☆※▲△-"
_DECORATION = rf"[{re.escape(_OPENERS + _SYMBOLS)}]"
# A newline first, so that the search visits only the beginnings of lines.
_LINE_START = re.compile(
    rf"\n(?:{_B}|{_DECORATION}){{0,40}}"
    rf"(?:(?P<special>{_SPECIAL})|(?P<volume>{_NAMED_VOLUME})|(?P<english>{_ENGLISH})"
    rf"|(?P<bare>[{DIGITS}{DASHES}]{{1,6}}[章回])(?![^\s:：、.]))"
)
_NUMBERED_LINE = re.compile(
    rf"\n{_B}{{0,40}}(?P<open>[（(【\[]?)(?P<number>[{DIGITS}]{{1,6}}|{_DASHED})"
    rf"(?P<close>[）)】\]]|[.．、:：]|(?={_B}|\n|$))"
)
_SEPARATOR = re.compile(r"[\s:：、.．·—-]*")
_KNOWN_PREFIX = re.compile(
    r"(?:正文卷?|(?:VIP|vip)?章[节節](?:目[录錄]|内容)?|作品正文|最新章[节節]|默[认認]卷|(?:免费|公众|公眾)[章卷][节節]?|VIP卷?)"
    r"[\s_:：、.—-]*"
)
_VOLUME_PREFIX = re.compile(
    rf"(?:第{_B}?{_NUMBER}(?:部分|[{_VOLUME_UNITS}])|{_NAMED_VOLUME})(?:{_B}.{{0,20}}|[:：].{{0,20}})?"
)
_ENDED = re.compile(r"[（(]?(?:完|终|終|[结結]束|本章完)[）)]?[。！]?")
_SIDES = {"上": 1, "中": 2, "下": 3}
_SIMPLIFIED = {"節": "节", "話": "话", "冊": "册", "編": "编"}
_CONTINUES = "的中里裡是也就才时時"
LONGEST_HEADING = 60
"""Characters of a heading line; a longer one is a heading followed by prose, or is prose."""


@dataclass(slots=True)
class HeadingCandidate:
    """A line that begins like a heading.

    Attributes:
        index: of its line in the book, from 0.
        indent: the blanks before it.
        unit: "章", "回", …; "序" for those without a number (楔子, 番外, …); "1." for numbers without a unit.
        number: first number of the label; None if it has none.
        last: last number of the label: 20 for 第19-20章; 0 if it has none.
        label: as written, without blanks.
        title: the text after it, blanks normalised.
        joint: punctuation between label and title: "：" in 第一章：雪; "" for blanks.
        separated: blanks or punctuation follow the label, or the end of the line.
        prefix: text before the label that is not a known prefix; the line is a heading if it is the book's name.
        volume: the volume named before the label on the same line: "第一卷 风雪".
        fits_shape: the line from the label on is short and not a sentence.
        shaped: looks like a heading by itself: it fits, and nothing else precedes the label.
        several: has two labels of a unit, as lines in tables of contents do.
        ended: states the end of a chapter: 第一章完.
        doubtful: text follows the label without a blank, as in prose: 第十一回里城囚西伯侯, 第二回合.
        cut: (rule, part) of parts of the line that do not belong to the heading.
    """

    index: int
    indent: str
    unit: str
    number: int | None
    last: int
    label: str
    title: str
    joint: str
    separated: bool
    prefix: str
    volume: str
    fits_shape: bool
    shaped: bool
    several: bool
    ended: bool
    doubtful: bool
    cut: tuple[tuple[str, str], ...]

    @property
    def first(self) -> int:
        """The first number of the label; 0 if it has none."""
        return self.number or 0

    def cut_prefix(self) -> None:
        """Treat the text before the label as the book's name: not part of the heading."""
        self.prefix = ""
        self.shaped = self.fits_shape and not self.several and not self.doubtful

    def includes(self, other: HeadingCandidate) -> bool:
        """Whether this heading includes `other`: its number, in any digits, and its title."""
        mine, its = NormalizedCopy.of(self.title).text, NormalizedCopy.of(other.title).text
        same_title = its in mine if unit_of(self) == unit_of(other) else bool(its) and its == mine
        return (self.number, self.last) == (other.number, other.last) and same_title

    def repeats_line(self, line: str) -> bool:
        """Whether a line repeats this heading: its number, in any digits, with the same title or without one."""
        if self.number is None or len(line) > LONGEST_HEADING:
            return False
        labelled = [one for one in find_candidates([line]) if one.number is not None and not one.several]
        return any(self.includes(one) and (one.title or not one.prefix) for one in labelled) or (
            bool(self.title) and any(self.includes(one) and one.title for one in find_numbered_lines([line]))
        )

    @property
    def heading(self) -> str:
        """The heading as a line of its chapter."""
        return f"{self.label}{self.joint or ' '}{self.title}" if self.title else self.label + self.joint


def unit_of(candidate: HeadingCandidate) -> str:
    """Its unit, in simplified characters."""
    return _SIMPLIFIED.get(candidate.unit, candidate.unit)


def find_candidates(texts: Sequence[str]) -> list[HeadingCandidate]:
    """Lines with a label such as 第一章, 卷二, Chapter 3 or 楔子 near their beginning, in order."""
    joined, starts = _join(texts)
    labels: dict[int, list[re.Match[str]]] = {}
    for match in _LABEL.finditer(joined):
        index = bisect_right(starts, match.start()) - 1
        before = joined[starts[index] : match.start()]
        if _WORD.match(joined, match.start("unit")) and (index in labels or before.strip()):
            continue
        if index in labels or (len(before) <= LONGEST_HEADING and "，" not in before and "。" not in before):
            labels.setdefault(index, []).append(match)
    others = {}
    for match in _LINE_START.finditer(joined):
        index = bisect_right(starts, match.start() + 1) - 1
        if index not in labels or match["special"] is None:
            others[index] = match
    found = (
        _parse_labelled(index, texts[index], starts[index], labels[index])
        if index in labels
        else _parse_unlabelled(index, texts[index], starts[index], others[index])
        for index in sorted(labels.keys() | others.keys())
    )
    return [one for one in found if one is not None]


def first_heading(texts: Sequence[str]) -> HeadingCandidate | None:
    """The first line that looks like a heading by itself."""
    return next((one for one in find_candidates(texts) if one.shaped), None)


def find_numbered_lines(texts: Sequence[str]) -> list[HeadingCandidate]:
    """Lines that begin with a number without a unit: "12. 雪", "001 雪", "十二、雪", "（三）", "7"; in order.

    Their `unit` names the way of numbering: "1.", "一、", "（一）", "1".
    """
    found = []
    joined, starts = _join(texts)
    for match in _NUMBERED_LINE.finditer(joined):
        index = bisect_right(starts, match.start() + 1) - 1
        line = texts[index]
        begin, end = match.start("open") - starts[index], match.end() - starts[index]
        numbers = to_numbers(match["number"])
        number = numbers[0] if numbers and numbers[0] == numbers[1] else None
        bracketed = match["close"] in tuple("）)】]")
        if number is None or line[end : end + 1].isdecimal() or bracketed != bool(match["open"]):
            continue
        kind = match["open"] + ("1" if match["number"].isdecimal() else "一") + match["close"]
        candidate = _parse(index, line, begin, end, kind, number)
        candidate.shaped = candidate.shaped and candidate.title[-1:] not in tuple("。！？…”")
        found.append(candidate)
    return found


def _join(texts: Sequence[str]) -> tuple[str, list[int]]:
    """One string in which every line follows a "\\n", and the offset of each line in it."""
    lengths = map(len, texts)
    return "\n" + "\n".join(texts), list(accumulate(lengths, lambda start, length: start + length + 1, initial=1))


def _parse_labelled(index: int, line: str, start: int, matches: list[re.Match[str]]) -> HeadingCandidate | None:
    """A line with 第N章 or the like in it."""
    match, several, outer = matches[0], False, ""
    for later in matches[1:]:
        if later["unit"] == match["unit"]:
            several = several or to_numbers(later["number"]) != to_numbers(match["number"])
        elif match["unit"][0] in _VOLUME_UNITS and later["unit"][0] in _CHAPTER_UNITS:
            match = later
        elif match["unit"] == "章" and later["unit"] in "节節" and match.string[match.end() : later.start()].isspace():
            outer, match = match[0], later
    numbers = to_numbers(match["number"])
    if numbers is None:
        return None
    begin, end = match.start() - start, match.end() - start
    candidate = _parse(index, line, begin, end, match["unit"], numbers[0], outer)
    candidate.last, candidate.several = numbers[1], several
    candidate.shaped = candidate.shaped and not several
    return candidate


def _parse_unlabelled(index: int, line: str, start: int, match: re.Match[str]) -> HeadingCandidate | None:
    """A line that begins with 楔子, 卷二, 上卷, Chapter 3, or 十二章."""
    kind = str(match.lastgroup)
    begin, end = match.start(kind) - start, match.end(kind) - start
    label = match[kind].rstrip()
    end = begin + len(label)
    if kind == "special":
        part = re.match(rf"{_B}?[（(]?[{DIGITS}上中下]{{1,4}}[)）]?(?=[\s:：、]|$)", line[end:])
        end += part.end() if part else 0
        candidate = _parse(index, line, begin, end, "序", None)
        free = candidate.separated or label.endswith("首回") or (label[:2] == "番外" and candidate.title[:1] == "之")
        candidate.shaped = candidate.shaped and free and len(candidate.title) <= 30
        return candidate
    if kind == "volume":
        side = _SIDES.get(label[0])
        number = side if side else (to_numbers(re.sub(r"[卷之第\s]", "", label)) or (None,))[0]
        candidate = _parse(index, line, begin, end, label[-1] if side else "卷", number)
        candidate.shaped = candidate.shaped and candidate.separated
        return candidate
    numbers = to_numbers(re.sub(r"(?i)chapter|[章回]", "", label).strip())
    if numbers is None:
        return None
    candidate = _parse(index, line, begin, end, "chapter" if kind == "english" else label[-1], numbers[0])
    candidate.shaped = candidate.shaped and kind == "english"
    return candidate


def _parse(
    index: int, line: str, begin: int, end: int, unit: str, number: int | None, outer: str = ""
) -> HeadingCandidate:
    """Parse `line` around its label, which is `line[begin:end]`."""
    indent = line[: len(line) - len(line.lstrip())]
    cut: list[tuple[str, str]] = []
    prefix, after = line[len(indent) : begin], line[end:].rstrip()
    opened = re.match(rf"(?:{_DECORATION}|\s)*", prefix)[0]  # type: ignore[index]
    if any(_CLOSERS[_OPENERS.index(mark)] in prefix for mark in opened if mark in _OPENERS):
        opened = ""  # "《雪》第一章": the brackets belong to the prefix
    prefix = prefix[len(opened) :].rstrip()
    if opened.strip():
        cut.append(("heading_decoration", opened.strip()))
    known = _KNOWN_PREFIX.match(prefix)
    if known and known[0]:
        cut.append(("heading_prefix", known[0].strip()))
        prefix = prefix[known.end() :]
    volume = " ".join(outer.split())
    if outer:
        prefix = prefix.removesuffix(outer.rstrip()).rstrip()
    if prefix and _VOLUME_PREFIX.fullmatch(prefix):
        volume = " ".join(f"{prefix} {volume}".split())
        prefix = ""
    cut += [("heading_prefix", prefix)] * bool(prefix) + [("volume_heading", volume)] * bool(volume)
    closed, after = _close(opened, after)
    cut += closed
    separator = _SEPARATOR.match(after)[0]  # type: ignore[index]
    title = " ".join(after[len(separator) :].split())
    separated = bool(separator) or not title or any(text in _CLOSERS for _, text in closed)
    ended = _ENDED.fullmatch(title) is not None
    fits = (
        len(line) - len(indent) <= LONGEST_HEADING
        and "。" not in title
        and title[-1:] not in tuple("，、；：,;:（(“「『《")
        and title[:1] not in tuple("，。、；！？”」』》）)]】")
        and not ended
        and (separated or not prefix or title[0] not in _CONTINUES)
    )
    label = line[begin:end]
    blank = " " if label[:1].isascii() and label[:1].isalpha() else ""  # 第　一　回 is 第一回; Chapter 3 stays
    in_prose = not separated and (title[0] in _CONTINUES or _WORD.match(line, max(begin, end - len(unit))) is not None)
    return HeadingCandidate(
        index=index, indent=indent, unit=unit, number=number, last=number or 0, label=blank.join(label.split()),
        title=title, joint="".join(separator.split()), separated=separated, prefix=prefix, volume=volume,
        fits_shape=fits, shaped=fits and not prefix and not in_prose, several=False, ended=ended,
        doubtful=fits and not prefix and in_prose, cut=tuple(cut),
    )  # fmt: skip


def _close(opened: str, after: str) -> tuple[list[tuple[str, str]], str]:
    """Remove what closes `opened`: "】" for "【", after the label or at the end of the line; "===" for "==="."""
    closed = []
    for mark in dict.fromkeys("".join(opened.split())):
        is_bracket = mark in _OPENERS
        closer = _CLOSERS[_OPENERS.index(mark)] if is_bracket else mark
        if is_bracket and after[:1] == closer:
            closed.append(("heading_decoration", closer))
            after = after[1:]
        elif after.endswith(closer):
            rest = after[:-1] if is_bracket else after.rstrip(closer)
            closed.append(("heading_decoration", after[len(rest) :]))
            after = rest.rstrip()
    return closed, after
