"""Marked spans of a text: what it shares with another text, what it repeats, where it loops."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from novelgpt.scoring.repetition import LONGEST_PERIOD, LOOP_CHARACTERS, LOOP_REPEATS, first_loop

SHORTEST_OVERLAP = 5
SHORTEST_REPEAT = 10
SEPARATOR = "\0"
"""Between texts that are searched together; no mark may cross it."""


MarkSpan = tuple[int, int]
"""Start and end of characters in a text, end excluded."""


class MarkedText(NamedTuple):
    """A segment of a text and the names of the marks on it: "overlap", "repeat", "loop"."""

    text: str
    marks: tuple[str, ...]


def overlaps(text: str, others: Iterable[str]) -> list[MarkSpan]:
    """Substrings of at least `SHORTEST_OVERLAP` characters, outer blanks not counted, that occur in one of `others`.

    Longest first, each then trimmed to what is still free; returned in the order of the text.
    """
    searched = SEPARATOR.join(other.replace(SEPARATOR, "\ufffd") for other in others)
    lengths = []
    length = 0
    for start in range(len(text)):
        # A match at this position is at least as long as the one at the previous position, less one character.
        length = max(0, length - 1)
        while start + length < len(text) and text[start : start + length + 1] in searched:
            length += 1
        # A NUL in the text matches the separator.
        end = text.find(SEPARATOR, start, start + length)
        lengths.append(length if end < 0 else end - start)
    return _tiles(text, lengths, SHORTEST_OVERLAP)


def repeats(text: str) -> list[MarkSpan]:
    """Substrings of at least `SHORTEST_REPEAT` characters, outer blanks not counted, that occur earlier in the text."""
    lengths = []
    length = 0
    for start in range(len(text)):
        length = max(0, length - 1)
        # A match that ends before this substring's last character starts earlier.
        while start + length < len(text) and text.find(text[start : start + length + 1], 0, start + length) >= 0:
            length += 1
        lengths.append(length)
    return _tiles(text, lengths, SHORTEST_REPEAT)


def loops(text: str) -> list[MarkSpan]:
    """Every loop that `first_loop` would report, from its first repetition to its end."""
    spans: list[MarkSpan] = []
    searched = 0
    while (found := first_loop(text[searched:])) is not None:
        start = searched + found
        searched = max(_periodic_end(text, start, period) for period in range(1, LONGEST_PERIOD + 1))
        spans.append((start, searched))
    return spans


def _periodic_end(text: str, start: int, period: int) -> int:
    """End of the loop of this period that starts at `start`; `start` if there is none."""
    needed = max(LOOP_CHARACTERS, LOOP_REPEATS * period)
    if text[start + period : start + needed] != text[start : start + needed - period] or start + needed > len(text):
        return start
    end = start + needed
    while end < len(text) and text[end] == text[end - period]:
        end += 1
    return end


def split_at_marks(text: str, marks: dict[str, list[MarkSpan]]) -> list[MarkedText]:
    """Split a text where marks start or end; the segments joined are the text.

    Args:
        text: any.
        marks: name -> spans that do not overlap each other.
    """
    cuts = sorted({0, len(text), *(cut for spans in marks.values() for span in spans for cut in span)})
    changes: dict[int, list[tuple[str, bool]]] = {}
    for name, spans in marks.items():
        for start, end in spans:
            changes.setdefault(end, []).insert(0, (name, False))
            changes.setdefault(start, []).append((name, True))
    active = dict.fromkeys(marks, False)
    segments = []
    for start, end in pairwise(cuts):
        active.update(changes.get(start, []))
        segments.append(MarkedText(text[start:end], tuple(name for name, on in active.items() if on)))
    return segments


def _tiles(text: str, lengths: list[int], shortest: int) -> list[MarkSpan]:
    """Disjoint spans out of the longest matches at each position: the longest first, later ones cut where it starts."""
    free = bytearray(b"\1") * len(text)
    taken: list[MarkSpan] = []
    for start in sorted(range(len(text)), key=lambda start: (-lengths[start], start)):
        if lengths[start] < shortest:
            break
        if not free[start]:
            continue
        end = free.find(b"\0", start, start + lengths[start])
        end = start + lengths[start] if end < 0 else end
        match = text[start:end]
        if len(match.strip()) >= shortest:
            left = start + len(match) - len(match.lstrip())
            taken.append((left, left + len(match.strip())))
            free[slice(*taken[-1])] = bytes(len(match.strip()))
    return sorted(taken)
