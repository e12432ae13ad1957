"""Whether a part of a line is written as a web address, in odd letters, or with marks between its characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from dataset.novels.normalized import NormalizedCopy

DOMAINS = "com|net|org|info|xyz|top|vip|site|club|biz|name|pro|cc|cn|co|la|me|tv|so|io|us|tw|hk|im|in|pw|ws"
_DOMAIN = re.compile(rf"(?=({DOMAINS}))")
_NAME = re.compile(r"[a-z0-9]+$")
_MARKED = re.compile(r"https?|www|wap")
_BEHIND_DOMAIN = re.compile(r"t{0,2}xt")
_DOTS = frozenset(".．")
"""Between the names of "m.abc.com"."""
_SCHEME = re.compile(r"[:：]\s*[/／]\s*[/／]")
_MAIL = re.compile("[@＠]")
_ORDINARY = frozenset("，。！？、；：,.!?;:…—-“”‘’\"'「」『』（）()《》〈〉【】[]·~～ \u3000\t")
_IN_ADDRESSES = frozenset("./:-_?=&%#+~．／：－＿。· \u3000")


def is_address(part: str) -> bool:
    """Whether a web address stands in the part: a name, a point or the like, a domain; English words have none.

    "www.abc.com", "w w w . a b c . n e t", "ａｂｃ。ｃｏｍ" are; "Welcome", "it. Me too", "a@abc.com" are not.
    """
    copy = NormalizedCopy.of(part)
    if _MAIL.search(part):
        return False
    marked = _MARKED.match(copy.text[_first_latin(copy.text) :]) is not None
    if marked and _SCHEME.search(part):
        return True
    return any(_ends_address(copy, *match.span(1), marked) for match in _DOMAIN.finditer(copy.text))


def _first_latin(text: str) -> int:
    return next((place for place, character in enumerate(text) if character.isascii()), len(text))


def _ends_address(copy: NormalizedCopy, begin: int, end: int, marked: bool) -> bool:
    """Whether copy.text[begin:end] is the domain of an address, by what stands between the letters in the line."""
    name = _NAME.search(copy.text, 0, begin)
    if name is None or len(name[0]) < 2:
        return False
    before, behind = _gap(copy, begin), _gap(copy, end)
    if not before.strip():
        return False
    letter_behind = end < len(copy.text) and copy.text[end].isascii()
    if letter_behind and not behind.strip():
        spelled = all(_gap(copy, place) for place in range(begin + 1, end))
        if not (marked and (_BEHIND_DOMAIN.match(copy.text, end) or (spelled and not behind))):
            return False
    if marked:
        return True
    inside = [_gap(copy, place) for place in range(name.start() + 1, begin)]
    if not any(inside) or (before in _DOTS and all(gap in _DOTS for gap in inside if gap)):
        return not any(map(str.isspace, before))
    # Letters set apart, "a b c . n e t": something else must stand before the domain.
    return all(inside) and before.strip() not in {gap.strip() for gap in inside}


def _gap(copy: NormalizedCopy, place: int) -> str:
    """What stands in the line before the character at `place` of the copy, marks over letters left out."""
    if not 0 < place < len(copy.text):
        return ""
    between = copy.line[int(copy.places[place - 1]) + 1 : int(copy.places[place])]
    return "".join(character for character in between if unicodedata.category(character) not in ("Mn", "Cf"))


def is_disguised(part: str) -> bool:
    """Whether the part is an address in letters that nobody writes one with, to deceive filters: "wＷw.ａbc.ｃoＭ"."""
    if not is_address(part):
        return False
    copy = NormalizedCopy.of(part)
    letters = [
        copy.line[place]
        for place, character in zip(copy.places.tolist(), copy.text, strict=True)
        if character.isascii()
    ]
    wide = sum("！" <= character <= "～" for character in letters)
    if 0 < wide < len(letters) or any(
        not character.isascii() for character in letters if not "！" <= character <= "～"
    ):
        return True
    plain = unicodedata.normalize("NFKC", part)
    words = re.findall(rf"(?i)www|(?:{DOMAINS})(?![a-z])", plain)
    if any(word not in (word.lower(), word.upper(), word.capitalize()) for word in words):
        return True
    inside = [_raw_gap(copy, place) for place in range(1, len(copy.text)) if copy.text[place - 1 : place + 1].isascii()]
    return any(character not in _IN_ADDRESSES for gap in inside for character in gap)


def _raw_gap(copy: NormalizedCopy, place: int) -> str:
    return copy.line[int(copy.places[place - 1]) + 1 : int(copy.places[place])]


def is_scattered(part: str) -> bool:
    """Whether marks that no sentence needs stand between most characters: "最⊥新⊥小⊥说"."""
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
"""What a rule may ask of the part that its pattern fits, by the name that rules.yaml gives it."""
