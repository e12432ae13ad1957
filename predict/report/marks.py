"""What stands out in a text: what it shares with another, what it repeats, where it goes round in circles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from novelgpt.scoring.repetition import LONGEST_PERIOD, LOOP_CHARACTERS, LOOP_REPEATS, first_loop

SHORTEST_OVERLAP = 5
SHORTEST_REPEAT = 10
BORDER = "\0"
"""Between texts that are searched together; a mark across it would be a mistake."""


class Span(NamedTuple):
    """Characters `start` to `end` of a text, the last one excluded."""

    start: int
    end: int


class Piece(NamedTuple):
    """A piece of a text and the names of the marks on it: "overlap", "repeat", "loop"."""

    text: str
    marks: tuple[str, ...]


def overlaps(text: str, others: Iterable[str]) -> list[Span]:
    """Substrings of at least `SHORTEST_OVERLAP` characters, blanks at their ends aside, that stand in one of `others`.

    The longest is taken first, and what is left of the next longest ones; they come in the order of the text.
    """
    searched = BORDER.join(other.replace(BORDER, "\ufffd") for other in others)
    lengths = []
    length = 0
    for start in range(len(text)):
        # What begins here is at least as long as what began one character before, less that character.
        length = max(0, length - 1)
        while start + length < len(text) and text[start : start + length + 1] in searched:
            length += 1
        # NUL itself is no text, and may be the border.
        border = text.find(BORDER, start, start + length)
        lengths.append(length if border < 0 else border - start)
    return _tiles(text, lengths, SHORTEST_OVERLAP)


def repeats(text: str) -> list[Span]:
    """Substrings of at least `SHORTEST_REPEAT` characters that stood in the text before, blanks at their ends aside."""
    lengths = []
    length = 0
    for start in range(len(text)):
        length = max(0, length - 1)
        # Found within all but its own last character, it begins earlier.
        while start + length < len(text) and text.find(text[start : start + length + 1], 0, start + length) >= 0:
            length += 1
        lengths.append(length)
    return _tiles(text, lengths, SHORTEST_REPEAT)


def loops(text: str) -> list[Span]:
    """Each stretch that `first_loop` would report, from its first round to its end."""
    spans: list[Span] = []
    begin = 0
    while (found := first_loop(text[begin:])) is not None:
        start = begin + found
        end = max(_periodic_end(text, start, period) for period in range(1, LONGEST_PERIOD + 1))
        spans.append(Span(start, end))
        begin = end
    return spans


def _periodic_end(text: str, start: int, period: int) -> int:
    """Where the loop of this period that begins at `start` ends; `start` if there is none."""
    needed = max(LOOP_CHARACTERS, LOOP_REPEATS * period)
    if text[start + period : start + needed] != text[start : start + needed - period] or start + needed > len(text):
        return start
    end = start + needed
    while end < len(text) and text[end] == text[end - period]:
        end += 1
    return end


def split_at_marks(text: str, marks: dict[str, list[Span]]) -> list[Piece]:
    """The text in pieces, each under the same marks from its first to its last character; together they are the text.

    Args:
        text: any.
        marks: name -> spans that do not overlap each other.
    """
    borders = sorted({0, len(text), *(place for spans in marks.values() for span in spans for place in span)})
    changes: dict[int, list[tuple[str, bool]]] = {}
    for name, spans in marks.items():
        for span in spans:
            changes.setdefault(span.end, []).insert(0, (name, False))
            changes.setdefault(span.start, []).append((name, True))
    active = dict.fromkeys(marks, False)
    pieces = []
    for start, end in zip(borders, borders[1:], strict=False):
        active.update(changes.get(start, []))
        pieces.append(Piece(text[start:end], tuple(name for name, on in active.items() if on)))
    return pieces


def _tiles(text: str, lengths: list[int], shortest: int) -> list[Span]:
    """Spans that do not overlap, of the longest that begin at each place: the longest first, the others cut at it."""
    free = bytearray(b"\1") * len(text)
    taken: list[Span] = []
    for start in sorted(range(len(text)), key=lambda place: (-lengths[place], place)):
        if lengths[start] < shortest:
            break
        if not free[start]:
            continue
        end = free.find(b"\0", start, start + lengths[start])
        end = start + lengths[start] if end < 0 else end
        piece = text[start:end]
        if len(piece.strip()) >= shortest:
            left = start + len(piece) - len(piece.lstrip())
            span = Span(left, left + len(piece.strip()))
            taken.append(span)
            free[span.start : span.end] = bytes(span.end - span.start)
    return sorted(taken)
