"""Takes advertisements, notices and authors' notes out of the text of novels, by the rules of rules.yaml."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.novels.chapters.headings import find_candidates, find_numbered_lines
from dataset.novels.cleaning.rules import Rule, read_rules
from dataset.novels.normalized import SENTENCE_ENDS, NormalizedCopy, WordSearch, character_codes, folding_table
from dataset.novels.records import Line, Removed

_DECIDING = {field.name for field in fields(Rule)} - {"about", "removes", "keeps"}
_EDGE_LINES = 40
_FRONT_CHARACTERS = 600
_LINES_BELOW_HEADING, _LINES_ABOVE_HEADING = 4, 12
_BRACKETED = r"[\s　]*[（(【\[〔［《＜<「『〖][^（(【\[〔［《＜<「『〖]{1,80}[）)】\]〕］》＞>」』〗][\s　]*$"
_TAIL = re.compile(rf"{_BRACKETED}|[\s　]+(?=.*[0-9A-Za-z０-９Ａ-Ｚａ-ｚ])")
_LONGEST_WITH_TAIL = 140
_LABEL_LIKE = re.compile(
    r"(?i)^.{0,40}?(?:chapter|[第章回卷部篇编編册冊0-9０-９一二三四五六七八九十序子外声聲记記言曲局语語跋录錄])"
)
"""Of these characters each heading has one in front."""
_OPENERS, _CLOSERS = "（([【［｛{〔<＜《〈", "）)]】］｝}〕>＞》〉”’」』"
_QUOTES = "\"'＂＇|｜"
"""Signs that open and close alike: around a part, they go with it."""
_GOES_ON = ("，", "、", "：", "；")
"""Behind a part these say that it is a piece of a sentence."""
_KEPT_BARE = frozenset("“”‘’「」『』…—！？")
"""A line of punctuation that has one of these may be somebody's silence or surprise: never junk."""
_HEADING = re.compile(
    r"[\s　]*(?:正文|VIP|[上中下]卷)?[\s　]*"
    r"(?:第[\s　]*[零〇一二三四五六七八九十百千万两0-9０-９—－―ー]{1,7}[\s　]*[章回节節卷集部篇]"
    r"|(?:楔子|序章|尾声|尾聲|番外|后记|後記)(?=$|[\s　：:])).{0,40}$"
)


class Cleaned(NamedTuple):
    """A text without what the rules take out."""

    lines: list[Line]
    """All lines in order, indents kept; "" where nothing is left. A line broken in two gives two with one number."""
    removed: list[Removed]
    """By line. With `lines` it has every character of the text that is not white space, once."""


@dataclass(frozen=True)
class Rules:
    """Rules in the order in which they are tried.

    Attributes:
        rules: blocks before lines before parts, else as in the files.
        digest: hex sha256 of what the rules say, examples and explanations left out.
        search: finds where words stand that rules ask for, in a text as it is and in its normalised copy.
        asking: the same words one by one, each with the places in `rules` of the rules that ask for it.
        always: places of the rules that ask for no word.
    """

    rules: tuple[Rule, ...]
    digest: str
    search: tuple[WordSearch, WordSearch]
    asking: tuple[dict[str, set[int]], dict[str, set[int]]]
    always: frozenset[int]


def load_rules(extra: Sequence[Path] = ()) -> Rules:
    """The project's rules, and those of the files `extra`, later ones winning.

    Raises:
        UserError: a file that cannot be read, an unknown key, a pattern that is wrong or too slow; names file and rule.
    """
    rules = read_rules(extra)
    said = [{key: value for key, value in vars(rule).items() if key in _DECIDING} for rule in rules]
    asking: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})
    for place, rule in enumerate(rules):
        for word in rule.contains:
            asking[rule.normalized].setdefault(word, set()).add(place)
    return Rules(
        rules=rules,
        digest=hashlib.sha256(json.dumps(said, ensure_ascii=False).encode("utf-8")).hexdigest(),
        search=(WordSearch(list(asking[False])), WordSearch(list(asking[True]))),
        asking=asking,
        always=frozenset(place for place, rule in enumerate(rules) if not rule.contains),
    )


def clean(text: str, rules: Rules) -> Cleaned:
    """Take out what the rules name; nothing else changes but blanks at the ends of lines.

    Every character of `text` that is no white space is in one of the lines, or in one of what was removed, in order;
    only what a rule puts in place of what it takes (`becomes`: the character that an entity such as "&ldquo;" means)
    is there besides.

    Args:
        text: line ends "\\n".
        rules: from `load_rules`.
    """
    texts = list(map(str.rstrip, text.split("\n")))
    left: dict[int, str] = {}  # by index of the line, where something was taken
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
        lines = [Line(number, piece.rstrip()) for number, kept in lines for piece in kept.split("\n")]
    return Cleaned(lines, removed)


def to_simplified(text: str) -> str:
    """Traditional characters as simplified ones, by OpenCC's t2s (characters and phrases); others stay as they are.

    Where one simplified character stands for several traditional ones their difference is lost; where a traditional
    character is a simplified one too, OpenCC decides by phrases (乾 in 乾隆 and 著 in 名著 stay).
    """
    return _converter().convert(text)


@functools.cache
def _converter() -> Any:
    import opencc  # on request only: it loads its dictionaries

    return opencc.OpenCC("t2s")


# ---- which lines to look at


def _suspicious(text: str, count: int, rules: Rules) -> Iterator[int]:
    """Indices, in order, of the lines that have a word some rule asks for."""
    if rules.always:
        return iter(range(count))
    plain, folded = rules.search
    table = folding_table()
    found: list[np.ndarray] = []
    lines_before, begin = 0, 0
    while begin < len(text):  # in pieces, so that memory stays flat; they end at line ends, as no word has one
        end = text.find("\n", begin + (1 << 20)) + 1 or len(text)
        codes = character_codes(text[begin:end])
        line_ends = np.flatnonzero(codes == 10)
        copy = table[codes]
        kept = np.flatnonzero(copy)
        places = np.concatenate([plain.find(codes), kept[folded.find(copy[kept])]])
        found.append(np.unique(np.searchsorted(line_ends, places)) + lines_before)
        lines_before, begin = lines_before + len(line_ends), end
    return iter(np.unique(np.concatenate(found)).tolist() if found else ())


# ---- what a rule takes


def _clean_line(rules: Rules, texts: list[str], index: int) -> tuple[str, list[tuple[str, str]]]:
    """What is left of a line, and (rule, part) of what is taken. Tags go first: they can break a line in two."""
    taken: list[tuple[str, str]] = []
    pieces = [texts[index]]
    for markup in (True, False):
        for number, piece in enumerate(pieces):
            if not markup and _is_heading(piece):
                piece, parts = _clean_heading(rules, texts, index, piece)
                taken += parts
                pieces[number] = _clean_piece(rules, texts, index, piece, taken, lambda rule: rule.after == "anything")
            else:
                is_of_pass = functools.partial(_is_markup, markup)
                pieces[number] = _clean_piece(rules, texts, index, piece, taken, is_of_pass)
        pieces = "\n".join(pieces).split("\n")
    return "\n".join(pieces).rstrip(), taken


def _is_markup(markup: bool, rule: Rule) -> bool:
    return markup == (rule.where == "part" and not rule.normalized)


def _clean_piece(
    rules: Rules,
    texts: list[str],
    index: int,
    piece: str,
    taken: list[tuple[str, str]],
    tried: Callable[[Rule], bool],
) -> str:
    """What the rules that are `tried` leave of a piece of a line; what they take goes to `taken`."""
    copy = NormalizedCopy.of(piece)
    for place in sorted(_asked(rules, copy)):
        rule = rules.rules[place]
        if rule.where != "block" and piece and tried(rule):
            copy = copy if copy.line is piece else NormalizedCopy.of(piece)
            piece, parts = _apply(rule, piece, copy, texts, index)
            taken += [(rule.name, part) for part in parts]
    return piece


def _is_heading(line: str) -> bool:
    """Whether a line is a heading, with or without something in brackets behind it."""
    if len(line.strip()) > _LONGEST_WITH_TAIL or not _LABEL_LIKE.search(line):
        return False
    bracketed = re.search(_BRACKETED, line)
    front = line[: bracketed.start()] if bracketed else line
    fronts = (front, line) if front.strip() else (line,)
    found = [one for text in fronts for one in find_candidates([text])]
    if any(one.shaped or one.doubtful for one in found):
        return True
    return front is not line and any(one.shaped and one.title for one in find_numbered_lines([front]))


def _clean_heading(rules: Rules, texts: list[str], index: int, line: str) -> tuple[str, list[tuple[str, str]]]:
    """A heading without what stands behind it, in brackets or behind a blank, and is nothing but junk."""
    for match in _TAIL.finditer(line):
        head, tail = line[: match.start()], line[match.start() :]
        if not head.strip() or not (_is_heading(head) or find_numbered_lines([head])):
            continue
        parts: list[tuple[str, str]] = []
        if not _clean_piece(rules, texts, index, tail, parts, lambda rule: True).strip():
            return head, parts
    return line, []


def _asked(rules: Rules, copy: NormalizedCopy) -> set[int]:
    """Places of the rules that ask for a word which the line has, or for none."""
    texts = (copy.line, copy.text)
    asked = zip(rules.search, rules.asking, texts, strict=True)
    found = [asking[word] for search, asking, text in asked for word in search.within(text)]
    return set(rules.always).union(*found)


def _apply(rule: Rule, line: str, copy: NormalizedCopy, texts: list[str], index: int) -> tuple[str, list[str]]:
    """What a rule of lines or parts leaves of the line, and the parts it takes."""
    bare = line.strip()
    if rule.where == "part":
        return _take_parts(rule, line, copy) if _is_near(rule, texts, index) else (line, [])
    if len(bare) > rule.longest or not rule.search.fullmatch(copy.text if rule.normalized else bare):
        return line, []
    if (rule.refuse and rule.refuse.search(line)) or not _is_near(rule, texts, index):
        return line, []
    return ("", [bare]) if rule.suits(bare, copy.text if rule.normalized else bare) else (line, [])


def _take_parts(rule: Rule, line: str, copy: NormalizedCopy) -> tuple[str, list[str]]:
    parts: list[str] = []
    pieces: list[str] = []
    done = 0
    for begin, end in _spans(rule, line, copy):
        part = line[begin:end]
        if begin < done or len(part) > rule.longest or (rule.refuse and rule.refuse.search(part)):
            continue
        pieces += [line[done:begin], rule.becomes]
        parts.append(part.strip())
        done = end
    if not parts:
        return line, []
    kept = "".join([*pieces, line[done:]])
    if rule.normalized and not any(map(str.isalnum, kept)) and not _KEPT_BARE.intersection(kept):
        return "", [line.strip()]  # the rest is the advertisement's own punctuation
    return kept, parts


def _spans(rule: Rule, line: str, copy: NormalizedCopy) -> Iterator[tuple[int, int]]:
    """Where in the line the pattern of a rule of parts fits."""
    if not rule.normalized:
        yield from (match.span() for match in rule.search.finditer(line) if match.group())
        return
    anywhere = rule.after == "anything"
    if anywhere:
        matches: Iterator[re.Match[str] | None] = rule.search.finditer(copy.text)
    else:
        matches = _latest(rule, copy)
    for match in matches:
        if match and match.group():
            begin, end = int(copy.places[match.start()]), int(copy.places[match.end() - 1]) + 1
            if not rule.suits(line[begin:end], match.group()) or line[end : end + 1] in _GOES_ON:
                continue
            begin, end = _widen(line, begin, end)
            if _is_balanced(line[begin:end]) and (
                anywhere or (_ends_sentence(line[:begin]) and _is_closed(line[:begin]))
            ):
                yield begin, end


def _latest(rule: Rule, copy: NormalizedCopy) -> Iterator[re.Match[str]]:
    """What the pattern fits from the beginnings of sentences on, without sentences in front that have none of the
    rule's words: a pattern that begins with any characters would take these along.
    """
    starts = copy.starts_before(rule.contains, rule.longest)
    found = [match for match in (rule.search.match(copy.text, start) for start in starts) if match and match.group()]
    for number, match in enumerate(found):
        later = (other for other in found[number + 1 :] if other.end() == match.end())
        fronts = (copy.text[match.start() : other.start()] for other in later)
        if not any(all(word not in front for word in rule.contains) for front in fronts):
            yield match


def _widen(line: str, begin: int, end: int) -> tuple[int, int]:
    """Take along the brackets around a match, and punctuation behind it that ends the line."""
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


def _ends_sentence(front: str) -> bool:
    last = front[-80:].rstrip()[-1:]
    return last in SENTENCE_ENDS  # "" too: nothing stands in front


def _is_balanced(part: str) -> bool:
    """Whether the part closes no quotation mark that it does not open."""
    depth = 0
    for character in part:
        depth += (character in "“「『") - (character in "”」』")
        if depth < 0:
            return False
    return True


def _is_closed(front: str) -> bool:
    """Whether no quotation is open at the end of this, so that what follows is nobody's speech."""
    return front.rfind("“") <= front.rfind("”") and front.rfind("「") <= front.rfind("」")


def _is_near(rule: Rule, texts: list[str], index: int) -> bool:
    if rule.near == "anywhere":
        return True
    if rule.near == "front":
        above = texts[:index] if index < _EDGE_LINES else []
        prose = sum(map(len, above))
        return index < _EDGE_LINES and prose < _FRONT_CHARACTERS and not any(map(_HEADING.match, above))
    if rule.near == "edges":
        return index < _EDGE_LINES or index >= len(texts) - _EDGE_LINES
    heads = itertools.islice(filter(None, reversed(texts[max(0, index - 30) : index])), _LINES_BELOW_HEADING)
    below = list(itertools.islice(filter(None, texts[index + 1 : index + 60]), _LINES_ABOVE_HEADING))
    return len(below) < _LINES_ABOVE_HEADING or any(map(_HEADING.match, itertools.chain(heads, below)))


def _block(rules: Rules, texts: list[str], index: int) -> tuple[Rule | None, int]:
    """The rule of blocks of which one begins with this line and has an end, and the index of the block's last line."""
    line = texts[index].strip()
    for rule in rules.rules:
        if rule.where != "block" or not any(word in line for word in rule.contains):
            continue
        if not rule.search.fullmatch(line) or not _is_near(rule, texts, index):
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
