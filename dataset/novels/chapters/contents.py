"""Tables of contents: runs of headings with no text between them, which come again later in the book."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat

from dataset.novels.chapters.headings import HeadingCandidate

_TITLE = re.compile(r"[\W_]*(?:目\s*[录錄次]|[总總章]\s*目[录錄]?|CONTENTS|Contents)[\W_]*")
_PAGE = re.compile(r"[\s.．…·\-—0-9０-９]*")
_LONGEST_BETWEEN = 40
"""Characters between two entries: the title of an entry on a line of its own."""
_VOLUMES = frozenset(("卷", "部", "部分", "集", "编", "編", "册", "冊", "篇"))
_Key = tuple[str, str | int]
_AGAIN, _AGAIN_BELOW_TITLE = 0.7, 0.5
"""Share of the entries that must come again, also where 目录 stands above them; the others are chapters that the book
lacks, or misprints."""


def find_contents(texts: Sequence[str], candidates: Sequence[HeadingCandidate]) -> tuple[set[int], int]:
    """Indices of the lines that make up tables of contents, and how many of them name a chapter."""
    usable = [one for one in candidates if one.shaped or (one.several and one.fits_shape and not one.prefix)]
    later = defaultdict(list)
    for place, one in enumerate(usable):
        later[_key(one)].append(place)
    lines: set[int] = set()
    entries = 0
    for first, last in _runs(texts, usable):
        if last > first and later[_key(usable[last])][-1] == last and not _goes_on(texts, usable, last):
            last -= 1  # the first chapter, right below
        titled = _title_above(texts, usable[first].index)
        if last - first + 1 < (2 if titled is not None else 3) or not _comes_again(
            usable, first, last, later, _AGAIN if titled is None else _AGAIN_BELOW_TITLE
        ):
            continue
        begin = usable[first].index if titled is None else titled
        end = usable[last].index + 1
        following = usable[last + 1].index if last + 1 < len(usable) else len(texts)
        if _is_empty(texts, end, following):
            end = following
        lines.update(range(begin, end))
        entries += sum(1 + one.several for one in usable[first : last + 1])
    if not lines:
        return _contents_without_labels(texts, candidates)
    return lines, entries


def _goes_on(texts: Sequence[str], usable: Sequence[HeadingCandidate], last: int) -> bool:
    """Whether the last entry of a run is one like those before it, though the book lacks its chapter."""
    if last + 1 == len(usable):
        return False
    one, before, following = usable[last], usable[last - 1], usable[last + 1]
    if _is_empty(texts, one.index + 1, following.index):
        return True
    # A blurb or the like below: the entries are numbered on, and behind them the numbers begin anew.
    numbered = one.number is not None and before.number is not None
    return numbered and one.unit == before.unit and one.first == before.last + 1 > following.first > 0


def _key(one: HeadingCandidate) -> _Key:
    return (one.unit, one.label if one.number is None else one.number)


def _runs(texts: Sequence[str], usable: Sequence[HeadingCandidate]) -> Iterator[tuple[int, int]]:
    """First and last place of each run of headings without text between them, cut where an entry comes again."""
    first, volume = 0, 0
    seen: set[object] = set()
    for place, one in enumerate(usable):
        joined = place > first and _is_empty(texts, usable[place - 1].index + 1, one.index)
        larger = one.unit in _VOLUMES
        key = _key(one) if larger else (volume, *_key(one))
        if not joined or key in seen:
            if place > first:
                yield first, place - 1
            first, volume = place, 0
            seen = set()
            key = _key(one) if larger else (volume, *_key(one))
        volume += larger
        seen.add(key)
    if usable:
        yield first, len(usable) - 1


def _is_empty(texts: Sequence[str], begin: int, end: int) -> bool:
    """Whether there is no text between two entries: blank lines, page numbers, a title on a line of its own."""
    if end - begin > 40:
        return False
    between = [text for text in map(str.strip, texts[begin:end]) if text and not _PAGE.fullmatch(text)]
    between = [text for text in between if not _TITLE.fullmatch(text)]
    if len(between) > 1:
        return False
    return all(len(text) <= _LONGEST_BETWEEN and text[-1] not in "。！？”」…：" for text in between)


def _comes_again(
    usable: Sequence[HeadingCandidate], first: int, last: int, later: Mapping[_Key, Sequence[int]], share: float
) -> bool:
    """Whether most entries of a run are headings again behind it, most of them with the same title."""
    again, titled, same = 0, 0, 0
    run = usable[first : last + 1]
    run = [one for one in run if one.unit not in _VOLUMES] or run
    for one in run:
        places = [place for place in later[_key(one)] if place > last]
        again += bool(places)
        titles = [usable[place].title for place in places if usable[place].title]
        if one.title and titles:
            titled += 1
            same += any(map(_begin_alike, titles, repeat(one.title)))
    return again >= share * len(run) and same >= 0.5 * titled


def _begin_alike(title: str, other: str) -> bool:
    title, other = _plain(title), _plain(other)
    return title.startswith(other[:4]) or other.startswith(title[:4])


def _plain(title: str) -> str:
    return re.sub(r"[\s.．…·0-9０-９１-９-]", "", title)


def _title_above(texts: Sequence[str], index: int) -> int | None:
    """Line of the word 目录 right above a table of contents."""
    for above in range(index - 1, max(-1, index - 12), -1):
        text = texts[above].strip()
        if _TITLE.fullmatch(text):
            return above
        if text:
            return None
    return None


def _contents_without_labels(texts: Sequence[str], candidates: Sequence[HeadingCandidate]) -> tuple[set[int], int]:
    """A table of contents that gives titles only: the lines below 目录 that come again, alone or behind a label."""
    for title, text in enumerate(texts[:200]):
        if not _TITLE.fullmatch(text.strip()):
            continue
        alone = Counter(map(_plain, texts[title + 1 :]))
        labelled = {_plain(one.title) for one in candidates if one.index > title}
        lines, entries = {title}, 0
        for index in range(title + 1, len(texts)):
            name = _plain(texts[index])
            if len(name) > _LONGEST_BETWEEN or (name and alone[name] < 2 and name not in labelled):
                break
            alone[name] -= 1
            lines.add(index)
            entries += bool(name)
        if entries >= 3:
            return lines, entries
    return set(), 0
