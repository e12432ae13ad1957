"""Removes advertisements, notices and authors' notes from the text of novels, by the rules of rules.yaml."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import opencc

from dataset.novels.chapters.headings import find_candidates, find_numbered_lines
from dataset.novels.cleaning.rules import Rule, read_rules
from dataset.novels.normalized import SENTENCE_ENDS, NormalizedCopy, WordSearch, character_codes, folding_table
from dataset.novels.records import Line, Removed

_converter = functools.cache(opencc.OpenCC)
_EFFECTIVE = {field.name for field in fields(Rule)} - {"about", "removes", "keeps"}
_EDGE_LINES = 40
_FRONT_CHARACTERS = 600
_LINES_BELOW_HEADING, _LINES_ABOVE_HEADING = 4, 12
_BRACKETED = r"[\s　]*[（(【\[〔［《＜<「『〖][^（(【\[〔［《＜<「『〖]{1,80}[）)】\]〕］》＞>」』〗][\s　]*$"
_TAIL = re.compile(rf"{_BRACKETED}|[\s　]+(?=.*[0-9A-Za-z０-９Ａ-Ｚａ-ｚ])")
_LONGEST_WITH_TAIL = 140
_LABEL_LIKE = re.compile(
    r"(?i)^.{0,40}?(?:chapter|[第章回卷部篇编編册冊0-9０-９一二三四五六七八九十序子外声聲记記言曲局语語跋录錄])"
)
"""Every heading has one of these characters near its beginning."""
_OPENERS, _CLOSERS = "（([【［｛{〔<＜《〈", "）)]】］｝}〕>＞》〉”’」』"
_QUOTES = "\"'＂＇|｜"
"""Signs that open and close alike: around a part, they are removed with it."""
_CONTINUES = ("，", "、", "：", "；")
"""After a part these show that it is a fragment of a sentence."""
_KEPT_BARE = frozenset("“”‘’「」『』…—！？")
"""A line of punctuation with one of these may be a character's silence or surprise, and is kept."""
_HEADING = re.compile(
    r"[\s　]*(?:正文|VIP|[上中下]卷)?[\s　]*"
    r"(?:第[\s　]*[零〇一二三四五六七八九十百千万两0-9０-９—－―ー]{1,7}[\s　]*[章回节節卷集部篇]"
    r"|(?:楔子|序章|尾声|尾聲|番外|后记|後記)(?=$|[\s　：:])).{0,40}$"
)


class Cleaned(NamedTuple):
    """A text without what the rules remove."""

    lines: list[Line]
    """All lines in order, indents kept; "" where nothing is left. A line broken in two gives two with one number."""
    removed: list[Removed]
    """By line. Together with `lines` it has every character of the text that is not white space, once."""


@dataclass(frozen=True)
class Rules:
    """Rules in the order in which they are applied.

    Attributes:
        rules: blocks before lines before parts, else as in the files.
        digest: hex sha256 of the rules, without examples and explanations.
        search: finds the words that rules require, in a text as it is and in its normalised copy.
        requiring: the same words one by one, each with the indices in `rules` of the rules that require it.
        always: indices of the rules that require no word.
        markup: indices of the rules for tags and the like: parts of the text as it is.
        text: indices of the others.
        anywhere: indices of the rules whose part need not follow a sentence; they apply to headings, too.
    """

    rules: tuple[Rule, ...]
    digest: str
    search: tuple[WordSearch, WordSearch]
    requiring: tuple[dict[str, set[int]], dict[str, set[int]]]
    always: frozenset[int]
    markup: frozenset[int]
    text: frozenset[int]
    anywhere: frozenset[int]


def load_rules(extra: Sequence[Path] = ()) -> Rules:
    """The project's rules, and those of the files `extra`, later ones winning.

    Raises:
        UserError: a file that cannot be read, an unknown key, a pattern that is wrong or too slow; names file and rule.
    """
    rules = read_rules(extra)
    keys = [{key: value for key, value in vars(rule).items() if key in _EFFECTIVE} for rule in rules]
    requiring: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})
    for index, rule in enumerate(rules):
        for word in rule.contains:
            requiring[rule.normalized].setdefault(word, set()).add(index)
    markup = frozenset(i for i, rule in enumerate(rules) if rule.where == "part" and not rule.normalized)
    return Rules(
        rules=rules,
        digest=hashlib.sha256(json.dumps(keys, ensure_ascii=False).encode("utf-8")).hexdigest(),
        search=(WordSearch(list(requiring[False])), WordSearch(list(requiring[True]))),
        requiring=requiring,
        always=frozenset(index for index, rule in enumerate(rules) if not rule.contains),
        markup=markup,
        text=frozenset(range(len(rules))) - markup,
        anywhere=frozenset(index for index, rule in enumerate(rules) if rule.after == "anything"),
    )


def clean(text: str, rules: Rules) -> Cleaned:
    """Remove what the rules match; nothing else changes but blanks at the ends of lines.

    Every character of `text` that is not white space is in one of the lines or of the removed parts, in order; the only
    additions are what rules insert in place of removed text (`becomes`: the character of an entity such as "&ldquo;").

    Args:
        text: line ends "\\n".
        rules: from `load_rules`.
    """
    texts = list(map(str.rstrip, text.split("\n")))
    left: dict[int, str] = {}  # by index of the line, where something was removed
    removed: list[Removed] = []
    blocked = -1
    for index in _suspicious(text, len(texts), rules):
        if index <= blocked or not texts[index]:
            continue
        rule, last = _block(rules, texts, index)
        if rule:
            blocked = last
            for number in range(index, blocked + 1):
                if texts[number]:
                    removed.append(Removed(number + 1, rule.name, texts[number].strip()))
                left[number] = ""
            continue
        kept, parts = _clean_line(rules, texts, index)
        removed.extend(Removed(index + 1, *part) for part in parts)
        if kept != texts[index]:
            left[index] = kept
    lines = list(map(Line, range(1, len(texts) + 1), texts))
    for index, kept in left.items():
        lines[index] = Line(index + 1, kept)
    if any("\n" in kept for kept in left.values()):
        lines = [Line(number, segment.rstrip()) for number, kept in lines for segment in kept.split("\n")]
    return Cleaned(lines, removed)


def to_simplified(text: str) -> str:
    """Convert traditional characters to simplified ones by OpenCC's t2s (characters and phrases).

    Where several traditional characters have one simplified form, their difference is lost; where a traditional
    character is a simplified one too, OpenCC decides by phrases (乾 in 乾隆 and 著 in 名著 stay).
    """
    return str(_converter("t2s").convert(text))


def _suspicious(text: str, count: int, rules: Rules) -> Sequence[int]:
    """Indices, in order, of the lines that contain a word that some rule requires."""
    if rules.always:
        return range(count)
    plain, folded = rules.search
    table = folding_table()
    found: list[np.ndarray] = []
    lines_before, begin = 0, 0
    while begin < len(text):  # in blocks of lines, so that memory is bounded; no word contains a line end
        end = text.find("\n", begin + (1 << 20)) + 1 or len(text)
        codes = character_codes(text[begin:end])
        line_ends = np.flatnonzero(codes == 10)
        copy = table[codes]
        kept = np.flatnonzero(copy)
        places = np.concatenate([plain.find(codes), kept[folded.find(copy[kept])]])
        found.append(np.unique(np.searchsorted(line_ends, places)) + lines_before)
        lines_before, begin = lines_before + len(line_ends), end
    return np.unique(np.concatenate(found)).tolist() if found else []


def _clean_line(rules: Rules, texts: list[str], index: int) -> tuple[str, list[tuple[str, str]]]:
    """What is left of a line, and (rule, part) of what is removed. Tags go first: they can break a line in two."""
    taken: list[tuple[str, str]] = []
    segments = [texts[index]]
    for markup in (True, False):
        for number, segment in enumerate(segments):
            if not markup and _is_heading(segment):
                segment, parts = _clean_heading(rules, texts, index, segment)
                taken += parts
                applied = rules.anywhere
            else:
                applied = rules.markup if markup else rules.text
            segments[number] = _clean_segment(rules, texts, index, segment, taken, applied)
        segments = "\n".join(segments).split("\n")
    return "\n".join(segments).rstrip(), taken


def _clean_segment(
    rules: Rules,
    texts: list[str],
    index: int,
    segment: str,
    taken: list[tuple[str, str]],
    applied: frozenset[int],
) -> str:
    """What the applied rules leave of a segment of a line; what they remove is added to `taken`."""
    copy = NormalizedCopy.of(segment)
    words = zip(rules.search, rules.requiring, (copy.line, copy.text), strict=True)
    required = [requiring[word] for search, requiring, text in words for word in search.within(text)]
    for number in sorted(applied.intersection(rules.always.union(*required))):
        rule = rules.rules[number]
        if rule.where != "block" and segment:
            copy = copy if copy.line is segment else NormalizedCopy.of(segment)
            segment, parts = _apply(rule, segment, copy, texts, index)
            taken += [(rule.name, part) for part in parts]
    return segment


def _is_heading(line: str) -> bool:
    """Whether a line is a heading, with or without something in brackets after it."""
    if len(line.strip()) > _LONGEST_WITH_TAIL or not _LABEL_LIKE.search(line):
        return False
    bracketed = re.search(_BRACKETED, line)
    front = line[: bracketed.start()] if bracketed else line
    found = [one for text in (front, line) if text.strip() for one in find_candidates([text])]
    if any(one.shaped or one.doubtful for one in found):
        return True
    return front is not line and any(one.shaped and one.title for one in find_numbered_lines([front]))


def _clean_heading(rules: Rules, texts: list[str], index: int, line: str) -> tuple[str, list[tuple[str, str]]]:
    """A heading without the text after it, in brackets or after a blank, if that is nothing but junk."""
    for match in _TAIL.finditer(line):
        head, tail = line[: match.start()], line[match.start() :]
        if not head.strip() or not (_is_heading(head) or find_numbered_lines([head])):
            continue
        parts: list[tuple[str, str]] = []
        if not _clean_segment(rules, texts, index, tail, parts, rules.text | rules.markup).strip():
            return head, parts
    return line, []


def _apply(rule: Rule, line: str, copy: NormalizedCopy, texts: list[str], index: int) -> tuple[str, list[str]]:
    """What a rule for lines or parts leaves of the line, and the parts that it removes."""
    if rule.where == "part":
        return _take_parts(rule, line, copy) if _is_near(rule, texts, index) else (line, [])
    bare = line.strip()
    seen = copy.text if rule.normalized else bare
    matches = (
        len(bare) <= rule.longest
        and rule.search.fullmatch(seen)
        and not (rule.refuse and rule.refuse.search(line))
        and _is_near(rule, texts, index)
        and rule.suits(bare, seen)
    )
    return ("", [bare]) if matches else (line, [])


def _take_parts(rule: Rule, line: str, copy: NormalizedCopy) -> tuple[str, list[str]]:
    parts: list[str] = []
    kept = ""
    done = 0
    for begin, end in _spans(rule, line, copy):
        part = line[begin:end]
        if begin >= done and len(part) <= rule.longest and not (rule.refuse and rule.refuse.search(part)):
            kept += line[done:begin] + rule.becomes
            parts.append(part.strip())
            done = end
    kept += line[done:]
    if parts and rule.normalized and not any(map(str.isalnum, kept)) and not _KEPT_BARE.intersection(kept):
        return "", [line.strip()]  # the rest is the advertisement's own punctuation
    return kept, parts


def _spans(rule: Rule, line: str, copy: NormalizedCopy) -> Iterator[tuple[int, int]]:
    """Spans of the line that the pattern of a rule for parts matches."""
    if not rule.normalized:
        yield from (match.span() for match in rule.search.finditer(line) if match.group())
        return
    anywhere = rule.after == "anything"
    for match in rule.search.finditer(copy.text) if anywhere else _latest(rule, copy):
        if match.group():
            begin, end = int(copy.places[match.start()]), int(copy.places[match.end() - 1]) + 1
            if not rule.suits(line[begin:end], match.group()) or line[end : end + 1] in _CONTINUES:
                continue
            begin, end = _widen(line, begin, end)
            # "" ends a sentence, too: nothing precedes the part.
            front = line[:begin]
            # No quotation is open, so that the part is not direct speech.
            closed = all(front.rfind(opener) <= front.rfind(closer) for opener, closer in ("“”", "「」"))
            after_sentence = closed and front[-80:].rstrip()[-1:] in SENTENCE_ENDS
            if _is_balanced(line[begin:end]) and (anywhere or after_sentence):
                yield begin, end


def _latest(rule: Rule, copy: NormalizedCopy) -> Iterator[re.Match[str]]:
    """Matches of the pattern at the beginnings of sentences, without leading sentences that have none of the rule's
    words: a pattern that begins with any characters would include these.
    """
    starts = copy.starts_before(rule.contains, rule.longest)
    found = [match for match in (rule.search.match(copy.text, start) for start in starts) if match and match.group()]
    for number, match in enumerate(found):
        later = (other for other in found[number + 1 :] if other.end() == match.end())
        fronts = (copy.text[match.start() : other.start()] for other in later)
        if not any(all(word not in front for word in rule.contains) for front in fronts):
            yield match


def _widen(line: str, begin: int, end: int) -> tuple[int, int]:
    """Extend a match to the brackets around it, and to punctuation after it that ends the line."""
    while begin and (line[begin - 1].isspace() or line[begin - 1] in _OPENERS):
        begin -= 1
    rest = line[end:]
    if not any(map(str.isalnum, rest)) and _is_balanced(line[begin:]):
        while begin and line[begin - 1] in _QUOTES and line[begin - 1] in rest:
            begin -= 1
        return begin, len(line)
    if begin and line[begin - 1] in _QUOTES and line[end : end + 1] == line[begin - 1]:
        return begin - 1, end + 1
    while end < len(line) and line[end] in _CLOSERS and _is_balanced(line[begin : end + 1]):
        end += 1
    return begin, end


def _is_balanced(part: str) -> bool:
    """Whether the part closes no quotation mark that it does not open."""
    depth = 0
    for character in part:
        depth += (character in "“「『") - (character in "”」』")
        if depth < 0:
            return False
    return True


def _is_near(rule: Rule, texts: list[str], index: int) -> bool:
    if rule.near == "anywhere":
        return True
    if rule.near == "front":
        above = texts[:index] if index < _EDGE_LINES else []
        prose = sum(map(len, above))
        return index < _EDGE_LINES and prose < _FRONT_CHARACTERS and not any(map(_HEADING.match, above))
    if rule.near == "edges":
        return index < _EDGE_LINES or index >= len(texts) - _EDGE_LINES
    above = list(itertools.islice(filter(None, reversed(texts[max(0, index - 30) : index])), _LINES_BELOW_HEADING))
    below = list(itertools.islice(filter(None, texts[index + 1 : index + 60]), _LINES_ABOVE_HEADING))
    return len(below) < _LINES_ABOVE_HEADING or any(map(_HEADING.match, above + below))


def _block(rules: Rules, texts: list[str], index: int) -> tuple[Rule | None, int]:
    """The rule for blocks one of which starts with this line and has an end, and the index of the block's last line."""
    line = texts[index].strip()
    for rule in rules.rules:
        starts = rule.where == "block" and any(word in line for word in rule.contains) and rule.search.fullmatch(line)
        if not starts or not _is_near(rule, texts, index):
            continue
        lines = 1
        for number in range(index + 1, len(texts)):
            if rule.last.fullmatch(texts[number].strip()):
                return rule, number - 1
            if _HEADING.match(texts[number]):
                break
            lines += bool(texts[number])
            if lines > rule.most_lines:
                break
    return None, index
