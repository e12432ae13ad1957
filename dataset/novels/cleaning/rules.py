"""Reads the rules of cleaning: the project's own and those of the user's files, strictly."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dataset.novels.cleaning.disguises import WRITTEN
from dataset.novels.normalized import fold
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_yaml

RULES_FILE = Path(__file__).parent / "rules.yaml"

_ORDER = ("block", "line", "part")
_NEAR = ("anywhere", "edges", "front", "chapter_edges")
_AFTER = ("sentence", "anything")
_HOSTILE_LENGTH, _HOSTILE_SECONDS = 16_384, 0.2


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
        """The pattern, compiled. In one for the normalised copy, which has no blanks, blanks mean nothing."""
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
        """Whether a part that the pattern fits is written as the rule asks, and has its words.

        Args:
            part: as it stands in the line.
            normalized: as the pattern sees it.
        """
        if not WRITTEN[self.written](part):
            return False
        said = sum(len(match[0]) for match in self.counted.finditer(normalized)) if self.words else 0
        return 100 * said >= self.share * len(normalized)

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
                    raise UserError(
                        f"{place} cannot be switched off", "write {name: NAME OF A KNOWN RULE, disabled: true}"
                    )
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
    """The rows of a file, each with the words that name it in an error."""
    remedy = "write it in UTF-8, as dataset/novels/cleaning/rules.yaml"
    content = read_yaml(path, "name an existing file with --rules", remedy)
    rows = content.get("rules") if isinstance(content, dict) and set(content) == {"rules"} else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: no list of rules", 'begin it with "rules:" and write below: "- name: …", one a rule')
    entries = [(row, f"{path}: rule {row.get('name', '?')!r}") for row in rows]
    places = [place for _, place in entries]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} stands there twice", "give each rule a name of its own")
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
    choices = (
        ("where", rule.where, _ORDER),
        ("near", rule.near, _NEAR),
        ("after", rule.after, _AFTER),
        ("written", rule.written, tuple(WRITTEN)),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"{place}: {key} is {value!r}", f"take one of {', '.join(allowed)}")
    if not all(isinstance(word, str) and word for word in rule.contains):
        raise UserError(f"{place}: contains is {list(rule.contains)!r}", "write a list of words there")
    if bool(rule.words) != bool(rule.share) or (rule.where == "block" and (rule.words or rule.written != "anyhow")):
        raise UserError(f"{place}: words and share go together, and not with blocks", "give it both or none")
    block = rule.where == "block"
    if block != bool(rule.until) or (block and (rule.normalized or not rule.contains)):
        raise UserError(f"{place}: a block, and only a block, has until", "give it contains and until, not normalized")
    if rule.normalized and any("".join(map(fold, word)) != word for word in rule.contains):
        raise UserError(
            f"{place}: the normalised copy never contains one of {', '.join(rule.contains)}",
            "write them in lower case, half width, simplified, without blanks and punctuation",
        )
    try:
        _ = rule.search, rule.refuse, rule.last, rule.counted
    except re.error as error:
        raise UserError(f"{place}: {error} in its pattern", "mend the regular expression (Python's re)") from error
    return rule


def refuse_slow(rule: Rule, place: str) -> None:
    """Try the patterns on hostile lines that grow, as one that goes wrong is noticed before it takes long.

    Raises:
        UserError: a line of some length takes longer than any sound pattern would.
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
    """Try the rule's patterns on a line as cleaning does."""
    if rule.where == "block":
        rule.search.fullmatch(line)
        rule.last.fullmatch(line)
    elif rule.where == "line":
        rule.search.fullmatch(line[-rule.longest :])
    elif rule.normalized and rule.after == "sentence":
        for start in range(0, len(line), 50):
            rule.search.match(line, start)
    else:
        for _ in rule.search.finditer(line):
            pass
    if rule.refuse:
        rule.refuse.search(line[-rule.longest :])
    if rule.words:
        for _ in rule.counted.finditer(line[-rule.longest :]):
            pass
