"""Tables of contents, which are runs of headings without text between them that come again later, and front matter."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from dataset.novels.chapters.headings import HeadingCandidate

_TITLE = re.compile(r"[\W_]*(?:目\s*[录錄次]|[总總章]\s*目[录錄]?|CONTENTS|Contents)[\W_]*")
_PAGE = re.compile(r"[\s.．…·\-—0-9０-９]*")
_LONGEST_BETWEEN = 40
"""Characters between two entries: the title of an entry on a line of its own."""
_VOLUMES = frozenset(("卷", "部", "部分", "集", "编", "編", "册", "冊", "篇"))
_Key = tuple[str, str | int]
_AGAIN, _AGAIN_BELOW_TITLE = 0.7, 0.5
"""Share of the entries that must come again, and the same below 目录; the others are missing chapters, or misprints."""


PROLOGUE_CHARACTERS = 300
"""Min length of prose before the first heading that is kept as a prologue; shorter is a blurb."""
BLURB_CHARACTERS = 1_500
"""The same below a line such as 内容简介."""
_BLURB = re.compile(
    r"\W*(?:内容|內容|作品|作者|故事|小[说說]|本?[书書]籍?|[图圖][书書])?(?:[简簡]介|提要|介[绍紹]|文案|[导導][读讀])(?:\W.{0,20})?"
)
_ABOUT = re.compile(
    r"\W*(?:[书書]名|作者|作品|[类類][别別型]|分[类類]|字[数數]|[状狀][态態]|[标標][签籤]|主角|[关關][键鍵]字|出版社?|ISBN"
    r"|[来來]源|更新|[声聲]明|版[权權])\s*(?:[：:；/].{0,60})?|.*(?:https?:|www\.).*|\W+|\W*正文\W*|\W*《[^》]*》.{0,20}|.{0,20}[著撰]\W*"
)


def find_contents(texts: Sequence[str], candidates: Sequence[HeadingCandidate]) -> tuple[set[int], int]:
    """Indices of the lines of tables of contents, and how many of them name a chapter."""
    usable = [one for one in candidates if one.shaped or (one.several and one.fits_shape and not one.prefix)]
    later = defaultdict(list)
    for place, one in enumerate(usable):
        later[_key(one)].append(place)
    lines: set[int] = set()
    entries = 0
    for first, last in _runs(texts, usable):
        if last > first and later[_key(usable[last])][-1] == last and not _belongs_to_run(texts, usable, last):
            last -= 1  # the heading of the first chapter, right below
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


def _belongs_to_run(texts: Sequence[str], usable: Sequence[HeadingCandidate], last: int) -> bool:
    """Whether the last entry of a run belongs to it, although the book lacks its chapter."""
    if last + 1 == len(usable):
        return False
    one, before, following = usable[last], usable[last - 1], usable[last + 1]
    if _is_empty(texts, one.index + 1, following.index):
        return True
    # A blurb or the like below: the numbers continue to this entry, and restart after it.
    numbered = one.number is not None and before.number is not None
    return numbered and one.unit == before.unit and one.first == before.last + 1 > following.first > 0


def _key(one: HeadingCandidate) -> _Key:
    return (one.unit, one.label if one.number is None else one.number)


def _runs(texts: Sequence[str], usable: Sequence[HeadingCandidate]) -> Iterator[tuple[int, int]]:
    """First and last position of each run of headings without text between them, cut where an entry is repeated."""
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
    return len(between) <= 1 and all(
        len(text) <= _LONGEST_BETWEEN and text[-1] not in "。！？”」…：" for text in between
    )


def _comes_again(
    usable: Sequence[HeadingCandidate], first: int, last: int, later: Mapping[_Key, Sequence[int]], share: float
) -> bool:
    """Whether most entries of a run are headings again after it, most of them with the same title."""
    again, titled, same = 0, 0, 0
    run = usable[first : last + 1]
    run = [one for one in run if one.unit not in _VOLUMES] or run
    for one in run:
        places = [place for place in later[_key(one)] if place > last]
        again += bool(places)
        titles = [usable[place].title for place in places if usable[place].title]
        if one.title and titles:
            titled += 1
            mine = _plain(one.title)
            same += any(mine.startswith(title[:4]) or title.startswith(mine[:4]) for title in map(_plain, titles))
    return again >= share * len(run) and same >= 0.5 * titled


def _plain(title: str) -> str:
    return re.sub(r"[\s.．…·0-9０-９１-９-]", "", title)


def _title_above(texts: Sequence[str], index: int) -> int | None:
    """Line of the word 目录 right above a table of contents."""
    for above in range(index - 1, max(-1, index - 12), -1):
        text = texts[above].strip()
        if text:
            return above if _TITLE.fullmatch(text) else None
    return None


def _contents_without_labels(texts: Sequence[str], candidates: Sequence[HeadingCandidate]) -> tuple[set[int], int]:
    """A table of contents with titles only: the lines below 目录 that come again, alone or after a label."""
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


def first_line_of_prologue(texts: Sequence[str]) -> int:
    """Index of the prologue's first line among the lines before the first heading; their number if there is none.

    Lines about the book (作者：…, 书名, rules, web addresses) and titles are never part of it. The rest is a prologue
    if it is prose of at least 300 characters; below a line such as 内容简介, of at least 1,500. Such a line within a
    prologue does not end it.
    """
    start, least = 0, PROLOGUE_CHARACTERS
    for index, text in enumerate(texts):
        stripped = text.strip()
        if _BLURB.fullmatch(stripped):
            if _is_prose(texts[start:index], least):
                break  # a line of the prologue itself: the text above it is not front matter
            start, least = index + 1, BLURB_CHARACTERS
        elif not stripped or _ABOUT.fullmatch(stripped):
            start = index + 1 if least == PROLOGUE_CHARACTERS and start == index else start
    while start < len(texts) and (not texts[start].strip() or _ABOUT.fullmatch(texts[start].strip())):
        start += 1
    return start if _is_prose(texts[start:], least) else len(texts)


def _is_prose(texts: Sequence[str], least: int) -> bool:
    """Whether the lines are prose of at least `least` characters."""
    length = sum(len("".join(text.split())) for text in texts)
    sentences = sum(text.count("。") + text.count("！") + text.count("？") for text in texts)
    return length >= least and sentences >= 3
