"""What is odd in the numbers of a book's headings, in sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from dataset.novels.chapters.headings import HeadingCandidate

MOST_FINDINGS = 50
_PART = re.compile(r"[（(]?[上中下一二三四五六七八九十0-9]{1,2}[)）]?$")


def describe_numbering(headings: Sequence[HeadingCandidate], volumes: Sequence[int]) -> list[str]:
    """Gaps, repeats and steps back, as "chapter 20 is missing between 19 and 21".

    Args:
        headings: numbered ones, in order.
        volumes: line indices of the headings of volumes, in order; numbers may begin anew behind each.
    """
    if not headings:
        return []
    found = []
    if headings[0].first > 1:
        found.append(f"the numbering begins at {headings[0].first}")
    for before, after in pairwise(headings):
        last, number = before.last, after.first
        if number == last + 1:
            continue
        new_volume = after.volume != before.volume or any(before.index < index < after.index for index in volumes)
        if new_volume and number <= 1:
            continue
        if number == last:
            if not (_PART.search(before.title) and _PART.search(after.title)):
                found.append(f"chapter {number} comes twice in a row")
        elif number > last + 2:
            found.append(f"chapters {last + 1} to {number - 1} are missing between {last} and {number}")
        elif number == last + 2:
            found.append(f"chapter {last + 1} is missing between {last} and {number}")
        elif number <= 1:
            found.append(f"the numbering begins anew at {number} after {last}")
        else:
            found.append(f"the numbering goes back from {last} to {number}")
    if len(found) > MOST_FINDINGS:
        found[MOST_FINDINGS:] = [f"the numbering is irregular at {len(found) - MOST_FINDINGS} more places"]
    return found
