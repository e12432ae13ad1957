"""The rules of cleaning: the project's own and those of the user's files, read and checked strictly."""

from __future__ import annotations

import functools
import re
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dataset.novels.normalized import NormalizedCopy, fold
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_yaml

RULES_FILE = Path(__file__).parent / "rules.yaml"

_ORDER = ("block", "line", "part")
_NEAR = ("anywhere", "edges", "front", "chapter_edges")
_AFTER = ("sentence", "anything")
_HOSTILE_LENGTH, _HOSTILE_SECONDS = 16_384, 0.2

DOMAINS = "com|net|org|info|xyz|top|vip|site|club|biz|name|pro|cc|cn|co|la|me|tv|so|io|us|tw|hk|im|in|pw|ws"
_DOMAIN = re.compile(rf"(?=({DOMAINS}))")
_NAME = re.compile(r"[a-z0-9]+$")
_MARKED = re.compile(r"https?|www|wap")
_AFTER_DOMAIN = re.compile(r"t{0,2}xt")
_DOTS = frozenset(".．")
"""Between the names of "m.abc.com"."""
_SCHEME = re.compile(r"[:：]\s*[/／]\s*[/／]")
_MAIL = re.compile("[@＠]")
_ORDINARY = frozenset("，。！？、；：,.!?;:…—-“”‘’\"'「」『』（）()《》〈〉【】[]·~～ \u3000\t")
_IN_ADDRESSES = frozenset("./:-_?=&%#+~．／：－＿。· \u3000")


def is_address(part: str) -> bool:
    """Whether the part contains a web address: a name, a dot or the like, a domain; English words do not count.

    "www.abc.com", "w w w . a b c . n e t", "ａｂｃ。ｃｏｍ" do; "Welcome", "it. Me too", "a@abc.com" do not.
    """
    copy = NormalizedCopy.of(part)
    if _MAIL.search(part):
        return False
    latin = next((place for place, character in enumerate(copy.text) if character.isascii()), len(copy.text))
    marked = _MARKED.match(copy.text, latin) is not None
    if marked and _SCHEME.search(part):
        return True
    return any(_ends_address(copy, *match.span(1), marked) for match in _DOMAIN.finditer(copy.text))


def _ends_address(copy: NormalizedCopy, begin: int, end: int, marked: bool) -> bool:
    """Whether copy.text[begin:end] is the domain of an address, by the characters between the letters in the line."""
    name = _NAME.search(copy.text, 0, begin)
    if name is None or len(name[0]) < 2:
        return False
    before, after = _gap(copy, begin), _gap(copy, end)
    if not before.strip():
        return False
    if end < len(copy.text) and copy.text[end].isascii() and not after.strip():
        spelled = all(_gap(copy, place) for place in range(begin + 1, end))
        if not (marked and (_AFTER_DOMAIN.match(copy.text, end) or (spelled and not after))):
            return False
    if marked:
        return True
    inside = [_gap(copy, place) for place in range(name.start() + 1, begin)]
    if not any(inside) or (before in _DOTS and all(gap in _DOTS for gap in inside if gap)):
        return not any(map(str.isspace, before))
    # Letters set apart, "a b c . n e t": another separator must precede the domain.
    return all(inside) and before.strip() not in {gap.strip() for gap in inside}


def _gap(copy: NormalizedCopy, place: int) -> str:
    """The text in the line before the character at `place` of the copy, without combining characters."""
    if not 0 < place < len(copy.text):
        return ""
    return "".join(
        character for character in _raw_gap(copy, place) if unicodedata.category(character) not in ("Mn", "Cf")
    )


def is_disguised(part: str) -> bool:
    """Whether the part is an address in unusual letters, to deceive filters: "wＷw.ａbc.ｃoＭ"."""
    if not is_address(part):
        return False
    copy = NormalizedCopy.of(part)
    letters = [
        copy.line[place]
        for place, character in zip(copy.places.tolist(), copy.text, strict=True)
        if character.isascii()
    ]
    narrow = [character for character in letters if not "！" <= character <= "～"]
    if 0 < len(narrow) < len(letters) or not all(map(str.isascii, narrow)):
        return True
    words = re.findall(rf"(?i)www|(?:{DOMAINS})(?![a-z])", unicodedata.normalize("NFKC", part))
    if any(word not in (word.lower(), word.upper(), word.capitalize()) for word in words):
        return True
    inside = [_raw_gap(copy, place) for place in range(1, len(copy.text)) if copy.text[place - 1 : place + 1].isascii()]
    return any(character not in _IN_ADDRESSES for gap in inside for character in gap)


def _raw_gap(copy: NormalizedCopy, place: int) -> str:
    return copy.line[int(copy.places[place - 1]) + 1 : int(copy.places[place])]


def is_scattered(part: str) -> bool:
    """Whether meaningless symbols separate most characters: "最⊥新⊥小⊥说"."""
    copy = NormalizedCopy.of(part)
    gaps = [_raw_gap(copy, place) for place in range(1, len(copy.text))]
    marked = sum(any(character not in _ORDINARY for character in gap) for gap in gaps)
    return marked >= 3 and 2 * marked >= len(gaps)


WRITTEN: dict[str, Callable[[str], bool]] = {
    "anyhow": lambda part: True,
    "address": is_address,
    "disguised": is_disguised,
    "scattered": is_scattered,
}
"""Tests of a matched part that a rule may require, by their names in rules.yaml."""


@dataclass(frozen=True)
class Rule:
    """One rule, as the head of rules.yaml explains its keys."""

    name: str
    pattern: str
    about: str = ""
    where: str = "line"
    contains: tuple[str, ...] = ()
    normalized: bool = False
    unless: str = ""
    after: str = "sentence"
    near: str = "anywhere"
    longest: int = 120
    written: str = "anyhow"
    words: str = ""
    share: int = 0
    becomes: str = ""
    until: str = ""
    most_lines: int = 20
    removes: tuple[Any, ...] = ()
    keeps: tuple[str, ...] = ()

    @functools.cached_property
    def search(self) -> re.Pattern[str]:
        """The pattern, compiled. In one for the normalised copy, which has no blanks, blanks are ignored."""
        return re.compile(self.pattern, re.VERBOSE if self.normalized else 0)

    @functools.cached_property
    def refuse(self) -> re.Pattern[str] | None:
        """`unless`, compiled."""
        return re.compile(self.unless) if self.unless else None

    @functools.cached_property
    def counted(self) -> re.Pattern[str]:
        """`words`, compiled."""
        return re.compile(self.words, re.VERBOSE)

    def suits(self, part: str, normalized: str) -> bool:
        """Whether a part that the pattern matches is written as the rule requires, and contains its words.

        Args:
            part: of the line.
            normalized: the same as the pattern sees it.
        """
        said = sum(len(match[0]) for match in self.counted.finditer(normalized)) if self.words else 0
        return WRITTEN[self.written](part) and 100 * said >= self.share * len(normalized)

    @functools.cached_property
    def last(self) -> re.Pattern[str]:
        """`until`, compiled."""
        return re.compile(self.until)


def read_rules(extra: Sequence[Path] = ()) -> tuple[Rule, ...]:
    """The project's rules and those of the files `extra`, later ones winning; blocks before lines before parts.

    Raises:
        UserError: a file that cannot be read, an unknown key, a pattern that is wrong or too slow; names file and rule.
    """
    known = {rule.name: rule for rule in _built_in()}
    for path in map(Path, extra):
        for entry, place in _entries(path):
            if "disabled" in entry:
                if set(entry) != {"name", "disabled"} or entry["disabled"] is not True or entry["name"] not in known:
                    raise UserError(f"{place} cannot be disabled", "write {name: NAME OF A KNOWN RULE, disabled: true}")
                del known[entry["name"]]
            else:
                rule = _make_rule(entry, place)
                refuse_slow(rule, place)
                known[rule.name] = rule
    return tuple(sorted(known.values(), key=lambda rule: _ORDER.index(rule.where)))


@functools.cache
def _built_in() -> tuple[Rule, ...]:
    return tuple(_make_rule(entry, place) for entry, place in _entries(RULES_FILE))


def _entries(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The rows of a file, each with its description for errors."""
    content = read_yaml(
        path, "name an existing file with --rules", "write it in UTF-8, as dataset/novels/cleaning/rules.yaml"
    )
    rows = content.get("rules") if isinstance(content, dict) and set(content) == {"rules"} else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path}: no list of rules", 'begin it with "rules:" and write below: "- name: …", one per rule'
        )
    entries = [(row, f"{path}: rule {row.get('name', '?')!r}") for row in rows]
    for place, count in Counter(place for _, place in entries).items():
        if count > 1:
            raise UserError(f"{place} is defined twice", "give each rule a name of its own")
    return entries


def _make_rule(entry: dict[str, Any], place: str) -> Rule:
    """A rule from a row of a file.

    Raises:
        UserError: unknown or missing keys, values of a wrong kind, wrong patterns.
    """
    kinds = {field.name: field.type for field in fields(Rule)}
    for key, value in entry.items():
        if key not in kinds:
            raise UserError(f"{place}: unknown key {key!r}", f"take some of {', '.join(kinds)}")
        kind = {"str": str, "bool": bool, "int": int}.get(str(kinds[key]), list)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{place}: {key} is {value!r}", f"write a {kind.__name__} there")
    if not entry.get("name") or not entry.get("pattern"):
        raise UserError(f"{place} has no name or no pattern", "give it both")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    rule = Rule(**values)
    for key, value, allowed in (
        ("where", rule.where, _ORDER),
        ("near", rule.near, _NEAR),
        ("after", rule.after, _AFTER),
        ("written", rule.written, tuple(WRITTEN)),
    ):
        if value not in allowed:
            raise UserError(f"{place}: {key} is {value!r}", f"take one of {', '.join(allowed)}")
    words = [word for word in rule.contains if isinstance(word, str) and word]
    block = rule.where == "block"
    for wrong, cause, remedy in (
        (len(words) < len(rule.contains), f"contains is {list(rule.contains)!r}", "write a list of words there"),
        (
            bool(rule.words) != bool(rule.share) or (block and (rule.words or rule.written != "anyhow")),
            "words and share go together, and not with blocks",
            "give it both or none",
        ),
        (
            block != bool(rule.until) or (block and (rule.normalized or not rule.contains)),
            "a block, and only a block, has until",
            "give it contains and until, not normalized",
        ),
        (
            rule.normalized and any("".join(map(fold, word)) != word for word in words),
            f"the normalised copy never contains one of {', '.join(words)}",
            "write them in lower case, half width, simplified, without blanks and punctuation",
        ),
    ):
        if wrong:
            raise UserError(f"{place}: {cause}", remedy)
    try:
        _ = rule.search, rule.refuse, rule.last, rule.counted
    except re.error as error:
        raise UserError(f"{place}: {error} in its pattern", "correct the regular expression (Python's re)") from error
    return rule


def refuse_slow(rule: Rule, place: str) -> None:
    """Run the patterns on hostile lines of growing length, so that a slow one is noticed before it takes long.

    Raises:
        UserError: a line takes longer than with any well-written pattern.
    """
    examples = [example if isinstance(example, str) else example[0] for example in rule.removes]
    letters = set(re.sub(r"\\.|[][(){}?*+|^$.]", "", rule.pattern + rule.unless + rule.until))
    units = {*sorted(letters)[:60], *rule.contains[:20], *examples[:10], "a", "0", "一", " ", ".", "aaab", "ab"}
    for unit in sorted(units):
        for length in (*range(12, 64, 2), *(_HOSTILE_LENGTH >> halvings for halvings in range(8, -1, -1))):
            line = (unit * length)[:length] + "\x00"
            started = time.process_time()
            _use(rule, line)
            if time.process_time() - started > _HOSTILE_SECONDS:
                raise UserError(
                    f"{place}: a pattern takes too long on a line of {unit!r} again and again",
                    "write no + or * inside what is repeated itself, and bounds such as {0,40} instead of *",
                )


def _use(rule: Rule, line: str) -> None:
    """Run the rule's patterns on a line as cleaning does."""
    if rule.where == "block":
        rule.search.fullmatch(line)
        rule.last.fullmatch(line)
    elif rule.where == "line":
        rule.search.fullmatch(line[-rule.longest :])
    elif rule.normalized and rule.after == "sentence":
        for start in range(0, len(line), 50):
            rule.search.match(line, start)
    else:
        deque(rule.search.finditer(line), maxlen=0)
    if rule.refuse:
        rule.refuse.search(line[-rule.longest :])
    if rule.words:
        deque(rule.counted.finditer(line[-rule.longest :]), maxlen=0)
