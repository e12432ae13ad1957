"""Chooses the headings among the candidates: by the features that most of them share, and by their numbers."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from dataset.novels.chapters.contents import find_contents
from dataset.novels.chapters.headings import HeadingCandidate, find_candidates, find_numbered_lines, unit_of

_DEEP = frozenset(("章", "回", "话", "chapter"))
_SHALLOW = ("部", "部分", "卷", "编", "集", "册", "篇", "幕", "折")
"""Units of volumes, the largest first; of chapters in books that have no smaller ones."""
_SENTENCE_MARKS = frozenset("。！？!?…”」』")
_NAME = re.compile(r"[\w《》·]{1,16}")
_LATE = 0.25
"""A numbering that begins after this share of the book belongs to one story, if other titles divide the whole book."""


@dataclass
class HeadingChoice:
    """The headings of a book.

    Attributes:
        chapters: headings of chapters, in order; 楔子, 番外 and the like among them.
        volumes: lines that are headings of volumes only.
        contents: line indices of tables of contents.
        entries: number of lines of those that name a chapter.
        kind: "numbered", "titles" (without numbers) or "none".
    """

    chapters: list[HeadingCandidate] = field(default_factory=list)
    volumes: list[HeadingCandidate] = field(default_factory=list)
    contents: set[int] = field(default_factory=set)
    entries: int = 0
    kind: str = "none"


def choose_headings(texts: Sequence[str]) -> HeadingChoice:
    """The headings among the lines of a book.

    A line is a heading by its shape (short, not a sentence, a label at its beginning) and by the features that most
    such lines of this book share: unit, indent, blanks after the label, length, punctuation. A line that differs is one
    only where its number fills a gap; a line whose number breaks the sequence is prose if it differs in any feature.
    """
    candidates = find_candidates(texts)
    # A prefix that the book repeats, such as its name, does not make a line less of a heading.
    fitting = [one for one in candidates if one.number is not None and one.fits_shape]
    prefixes = Counter(one.prefix for one in fitting)
    for candidate in candidates:
        if candidate.prefix and prefixes[candidate.prefix] >= max(3, 0.3 * len(fitting)):
            candidate.cut_prefix()
    choice = HeadingChoice()
    choice.contents, choice.entries = find_contents(texts, candidates)
    candidates = [candidate for candidate in candidates if candidate.index not in choice.contents]
    unit = _chapter_unit(candidates)
    chapters = _numbered(texts, candidates, unit) if unit else []
    if not chapters:
        chapters = _numbered_lines(texts, candidates, choice)
    before = _characters(texts[: chapters[0].index]) / max(1, _characters(texts)) if chapters else 1.0
    if before > _LATE:
        titles = _outdented_titles(texts)
        if not chapters and not titles:
            titles = _titles_in_contents(texts, choice.contents)
        if titles and (not chapters or titles[0].index < chapters[0].index):
            choice.chapters, choice.kind = titles, "titles"
            return choice
    if not chapters:
        return choice
    choice.kind = "numbered"
    taken = {chapter.index for chapter in chapters}
    rest = [candidate for candidate in candidates if candidate.index not in taken and candidate.shaped]
    choice.volumes = _volumes(texts, rest, chapters)
    indent = Counter(_columns(chapter.indent) for chapter in chapters).most_common(1)[0][0]
    specials = [one for one in rest if one.unit == "序" and abs(_columns(one.indent) - indent) < 2]
    choice.chapters = sorted(chapters + specials, key=lambda chapter: chapter.index)
    return choice


def _steps(numbers: Sequence[int]) -> int:
    """How many of them follow the one before, or restart the numbering."""
    return sum(after == before + 1 or after in (0, 1) for before, after in pairwise((0, *numbers)))


def _chapter_unit(candidates: Iterable[HeadingCandidate]) -> str:
    """The unit of chapters; "" if none is likely."""
    numbers = _numbers_by_unit(one for one in candidates if one.shaped)
    if not numbers:
        # Headings that all have their chapter's text after them on the line.
        numbers = _numbers_by_unit(one for one in candidates if not one.prefix and _may_fill(one))
        return next((unit for unit, found in numbers.items() if _steps(found) >= max(3, 0.8 * len(found))), "")
    steps = {unit: _steps(found) for unit, found in numbers.items()}
    units = [unit for unit in steps if unit in _DEEP]
    deep = max(units, key=lambda unit: (steps[unit], len(numbers[unit])), default="")
    if "节" in steps:
        # 第一节 of each 章 is a section of it; sections numbered through the whole book are its chapters.
        restarts = sum(number in (0, 1) for number in numbers["节"])
        through = restarts <= 0.2 * len(numbers["节"]) or restarts == 1
        if not deep or (through and steps["节"] >= 2 * steps[deep]):
            deep = "节"
    units = [unit for unit in steps if unit in _SHALLOW]
    shallow = max(units, key=lambda unit: (steps[unit], _SHALLOW.index(unit)), default="")
    return shallow if not deep or (shallow and steps[shallow] >= 3 * max(1, steps[deep])) else deep


def _numbers_by_unit(candidates: Iterable[HeadingCandidate]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for one in candidates:
        if one.number is not None:
            numbers.setdefault(unit_of(one), []).append(one.number)
    return numbers


def _may_fill(candidate: HeadingCandidate) -> bool:
    """Whether a line that is not a heading by its shape may be one because its number is missing."""
    named = not candidate.prefix or (candidate.fits_shape and _NAME.fullmatch(candidate.prefix))
    return bool(candidate.separated and named) and not (candidate.several or candidate.joint or candidate.ended)


def _numbered(texts: Sequence[str], candidates: Iterable[HeadingCandidate], unit: str) -> list[HeadingCandidate]:
    """Numbered headings of a unit, without false ones, and with those that fill the gaps between them."""
    numbered = [candidate for candidate in candidates if candidate.number is not None]
    of_unit = [one for one in numbered if unit_of(one) == unit]
    own = [one for one in of_unit if one.shaped]
    if not own:
        own = [one for one in of_unit if not one.prefix and _may_fill(one)]
    else:
        # Headings that are none by their shape because text follows them, if most are like that.
        behind = [one for one in of_unit if not (one.shaped or one.prefix or one.doubtful) and _may_fill(one)]
        together = sorted([*own, *behind], key=lambda one: one.index)
        if len(behind) >= max(2, len(own)) and _steps([one.first for one in together]) >= 0.8 * len(together):
            own = together
    differences = _differences(texts, own)
    kept = [one for one in own if differences(one) <= 1]
    kept = [one for place, one in enumerate(kept) if not differences(one) or not _breaks(kept, place)]
    if len(kept) <= 2:
        kept = _few(texts, kept)
    taken = {one.index for one in kept}
    units = _DEEP | {unit, "节"}
    others = [one for one in numbered if unit_of(one) in units and one.index not in taken and _may_fill(one)]
    if sum(not one.separated for one in kept) >= 0.9 * len(kept) and len(kept) > 1:
        columns = {_columns(one.indent) for one in kept}
        others += [one for one in of_unit if one.doubtful and not differences(one) and _columns(one.indent) in columns]
        others.sort(key=lambda one: one.index)
    apart = any(one.doubtful for one in others) and _stand_apart(texts, kept)

    def alike(one: HeadingCandidate) -> bool:
        return (one.shaped or (one.doubtful and apart)) and unit_of(one) == unit and differences(one) <= 2

    return _fill_gaps(kept, others, alike)


def _stand_apart(texts: Sequence[str], kept: Sequence[HeadingCandidate]) -> bool:
    """Whether the indent of the headings distinguishes them from other lines."""
    columns = {_columns(one.indent) for one in kept}
    lines = [text for text in texts if text and not text.isspace()]
    alike = sum(_columns(text[: len(text) - len(text.lstrip())]) in columns for text in lines)
    return alike < 2 * len(kept) + 0.1 * len(lines)


def _differences(texts: Sequence[str], own: Sequence[HeadingCandidate]) -> Callable[[HeadingCandidate], int]:
    """Counts the features in which a heading differs from nearly all of `own`."""
    if len(own) < 5:
        return lambda candidate: 0

    def common(feature: Callable[[HeadingCandidate], object], share: float) -> Callable[[HeadingCandidate], bool]:
        value, count = Counter(map(feature, own)).most_common(1)[0]
        return (lambda one: feature(one) != value) if count >= share * len(own) else (lambda one: False)

    longest = 1.6 * median(len(one.heading) for one in own) + 10
    tests = [
        common(lambda one: one.separated, 0.9),
        common(lambda one: bool(one.title), 0.9),
        common(lambda one: "，" in one.title or "," in one.title, 0.9),
        common(lambda one: one.title[-1:] in _SENTENCE_MARKS and one.title != "", 0.9),
        common(lambda one: one.index == 0 or not texts[one.index - 1].strip(), 0.95),
        lambda one: len(one.heading) > longest,
    ]
    indent, count = Counter(_columns(one.indent) for one in own).most_common(1)[0]
    if count >= 0.8 * len(own):
        tests.append(lambda one: abs(_columns(one.indent) - indent) > 1)
    return lambda one: sum(test(one) for test in tests)


def _breaks(headings: Sequence[HeadingCandidate], place: int) -> bool:
    """Whether the numbers around this heading continue without it, or its own goes back."""
    before = headings[place - 1].last if place else 0
    number = headings[place].first
    after = headings[place + 1].first if place + 1 < len(headings) else None
    if number == before + 1 or (number <= 1 and after == headings[place].last + 1):
        return False
    return after == before + 1 or number <= before


def _few(texts: Sequence[str], headings: Sequence[HeadingCandidate]) -> list[HeadingCandidate]:
    """One or two headings are not a pattern: they must begin a numbering or the text, and have a separate title."""
    kept: list[HeadingCandidate] = []
    for one in headings:
        begins = one.first <= 1 or not any(text.strip() for text in texts[: one.index])
        follows = bool(kept) and 0 < one.first - kept[-1].last <= 2
        if one.separated and (begins or follows) and one.title[-1:] not in _SENTENCE_MARKS:
            kept.append(one)
    return kept


def _fill_gaps(
    kept: list[HeadingCandidate], others: Sequence[HeadingCandidate], alike: Callable[[HeadingCandidate], bool]
) -> list[HeadingCandidate]:
    """`kept`, and those of `others` whose numbers are missing between two of them.

    One that looks `alike` may also be the first of several that are missing.
    """
    filled = list(kept)
    for one in others:
        place = bisect_left(filled, one.index, key=lambda heading: heading.index)
        before = filled[place - 1].last if place else 0
        after = filled[place] if place < len(filled) else None
        if one.first != before + 1 or not filled:
            continue
        if alike(one) if after is None else _reaches(one, after, others) or (alike(one) and after.first > one.last):
            if one.prefix:
                one.cut_prefix()
            filled.insert(place, one)
    return filled


def _reaches(one: HeadingCandidate, after: HeadingCandidate, others: Sequence[HeadingCandidate]) -> bool:
    """Whether `one`, and `others` between it and the heading `after`, have all the numbers that are missing there."""
    last = one.last
    for other in others[bisect_left(others, one.index + 1, key=lambda candidate: candidate.index) :]:
        if last + 1 >= after.first or other.index >= after.index:
            break
        if other.first == last + 1:
            last = other.last
    return last + 1 == after.first


def _volumes(
    texts: Sequence[str], rest: Iterable[HeadingCandidate], chapters: Sequence[HeadingCandidate]
) -> list[HeadingCandidate]:
    """Headings of volumes: larger units, soon followed by a chapter."""
    units = {unit_of(chapter) for chapter in chapters}
    larger = {unit for unit in _SHALLOW if unit not in units} | ({"章", "回"} if "节" in units else set())
    starts = [chapter.index for chapter in chapters]
    volumes = []
    for one in rest:
        following = bisect_left(starts, one.index)
        if (
            unit_of(one) in larger
            and one.separated
            and following < len(starts)
            and _characters(texts[one.index + 1 : starts[following]]) <= 2_000
        ):
            volumes.append(one)
    return volumes


def _numbered_lines(
    texts: Sequence[str], candidates: Sequence[HeadingCandidate], choice: HeadingChoice
) -> list[HeadingCandidate]:
    """Headings such as "12. 雪", "001 雪", "三、雪", "7": numbered through the whole book, or each volume."""
    groups = defaultdict(list)
    for candidate in find_numbered_lines(texts):
        if candidate.index not in choice.contents and candidate.shaped and len(candidate.heading) <= 40:
            groups[candidate.unit].append(candidate)
    volumes = [one.index for one in candidates if one.shaped and unit_of(one) in _SHALLOW]
    best: list[HeadingCandidate] = []
    for group in groups.values():
        contents, entries = find_contents(texts, group)
        group = [one for one in group if one.index not in contents]
        chain = _chain(group, volumes)
        if len(chain) >= 3 and len(group) <= 1.3 * len(chain) and len(chain) > len(best) and _hold_text(texts, chain):
            best = chain
            choice.contents |= contents
            choice.entries += entries
    return best


def _chain(group: Iterable[HeadingCandidate], volumes: Sequence[int]) -> list[HeadingCandidate]:
    """Headings from 0 or 1 on, each number at most three above the one before; 1 again in each volume."""
    chain: list[HeadingCandidate] = []
    for one in group:
        if (
            1 <= one.first - chain[-1].first <= 3
            or (one.first == 1 and any(chain[-1].index < index < one.index for index in volumes))
            if chain
            else one.first <= 1
        ):
            chain.append(one)
    return chain


def _hold_text(texts: Sequence[str], chain: Sequence[HeadingCandidate], least: int = 200) -> bool:
    """Whether most of these lines have a chapter's text below them, unlike the items of a list."""
    boundaries = [*(one.index for one in chain), len(texts)]
    return median(_characters(texts[start:end]) for start, end in pairwise(boundaries)) >= least


def _outdented_titles(texts: Sequence[str]) -> list[HeadingCandidate]:
    """Titles without a number, in a book where only they are not indented."""
    lines = [(index, text) for index, text in enumerate(texts) if text and not text.isspace()]
    out = [(index, text.strip()) for index, text in lines if _columns(text[: len(text) - len(text.lstrip())]) < 2]
    if not 3 <= len(out) <= 0.05 * len(lines):
        return []
    titles = [
        _title(index, title)
        for index, title in out
        if len(title) <= 20 and not re.search(r"[。，！？…：；、,.!?:;]|[”」』]$", title) and re.search(r"\w", title)
    ]
    return titles if len(titles) >= 3 and _hold_text(texts, titles) else []


def _titles_in_contents(texts: Sequence[str], contents: Iterable[int]) -> list[HeadingCandidate]:
    """The lines listed in a table of contents without labels, where they come again."""
    names = {" ".join(texts[index].split()): index for index in contents if texts[index].strip()}
    titles: dict[str, HeadingCandidate] = {}
    for index in range(max(names.values(), default=-1) + 1, len(texts)):
        name = " ".join(texts[index].split())
        if name in names:
            titles.setdefault(name, _title(index, name))
    found = list(titles.values())
    return found if len(found) >= max(3, 0.8 * (len(names) - 1)) and _hold_text(texts, found) else []


def _title(index: int, title: str) -> HeadingCandidate:
    return HeadingCandidate(
        index=index, indent="", unit="", number=None, last=0, label="", title=" ".join(title.split()), joint="",
        separated=True, prefix="", volume="", shaped=True, several=False, ended=False, doubtful=False,
        fits_shape=True, cut=(),
    )  # fmt: skip


def _characters(texts: Sequence[str]) -> int:
    return sum(map(len, texts))


def _columns(indent: str) -> int:
    return sum(2 if character in "\u3000\t" else 1 for character in indent)
