"""How much a text repeats itself, in characters, which compare across tokenizers. Blanks and punctuation count."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy

WINDOW = 2000
"""Characters of a window: n-grams repeat the more, the longer a text is, so texts are compared window by window."""

LOOP_CHARACTERS = 50
LOOP_REPEATS = 3
LONGEST_PERIOD = 1000
SENTENCE_CHARACTERS = 8

_SENTENCE_END = re.compile(r"[。！？!?…\n]+")
_NO_WORD = re.compile(r"[\W_]+")


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of characters that stood in the text before: 1 - distinct n-grams / all n-grams.

    seq-rep-n of Welleck et al. (arXiv:1908.04319), who count tokens of one continuation. From 0 (no n-gram comes twice)
    towards 1 (a loop); 0.0 for texts of fewer than n characters, which have no n-gram.

    >>> repetition("啊啊啊啊啊啊啊")  # four 4-grams, all the same
    0.75

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"{n}-grams do not exist")
    count = len(text) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({text[start : start + n] for start in range(count)}) / count


def rep4_char(texts: Sequence[str]) -> float:
    """Mean over texts of their `repetition` with n = 4.

    Raises:
        ValueError: there are no texts.
    """
    if not texts:
        raise ValueError("no texts to average")
    return sum(map(repetition, texts)) / len(texts)


def windows(text: str) -> list[str]:
    """The text in pieces of `WINDOW` characters; the last one ends where the text does, and may overlap another.

    A shorter text is one piece. So each piece of a long text has the same length, and its end, where loops are, counts.
    """
    last = max(0, len(text) - WINDOW)
    starts = [*range(0, last, WINDOW), last]
    return [text[start : start + WINDOW] for start in starts]


def windowed_repetition(text: str, n: int) -> float:
    """Mean `repetition` of the text's `windows`."""
    pieces = windows(text)
    return sum(repetition(piece, n) for piece in pieces) / len(pieces)


def distinct(text: str, n: int) -> float:
    """Distinct n-grams of characters / all n-grams, mean over the text's `windows`; 0.0 where there is no n-gram.

    After distinct-n of Li et al. (arXiv:1510.03055), who count words of all outputs together and divide by all words;
    windows keep texts of several lengths comparable.
    """
    if len(text) < n:
        return 0.0
    return 1.0 - windowed_repetition(text, n)


def longest_repeat(text: str) -> int:
    """Characters of the longest substring that stands at two places of the text, which may overlap.

    By prefix doubling (Karp, Miller, Rosenberg 1972) on numpy arrays, exact, O(n log² n): 2 ms at 4,000
    characters.
    """
    codes = _codes(text)
    if len(codes) < 2:
        return 0
    # names[i]: which substring of `length` characters begins at i; equal substrings have equal names.
    levels = [(1, _names(codes))]
    while True:
        length, names = levels[-1]
        if names.max() + 1 == len(names) or 2 * length >= len(codes):
            break
        levels.append((2 * length, _names(_joined(names, names, length))))
    if levels[-1][1].max() + 1 == len(levels[-1][1]):
        levels.pop()
    if not levels:
        return 0
    base, names = levels[-1]
    shortest, longest = base, min(2 * base, len(codes)) - 1  # repeated for certain; perhaps
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        # A substring of up to twice the base is told by its beginning and its end.
        candidate = _names(_joined(names, names, middle - base))
        if candidate.max() + 1 < len(candidate):
            shortest = middle
        else:
            longest = middle - 1
    return shortest


def first_loop(text: str) -> int | None:
    """Where the text first begins to go round in circles, in characters from 0; None where it does not.

    A loop is a piece of at most `LONGEST_PERIOD` characters that stands `LOOP_REPEATS` times in a row, all of it
    together at least `LOOP_CHARACTERS` long. O(n * LONGEST_PERIOD), after a cheaper look at the longest repeat.
    """
    # A loop of period p repeats a substring of its whole length less p.
    if longest_repeat(text) < LOOP_CHARACTERS * (LOOP_REPEATS - 1) // LOOP_REPEATS:
        return None
    codes = _codes(text)
    first: int | None = None
    for period in range(1, min(LONGEST_PERIOD, len(codes) // LOOP_REPEATS) + 1):
        # Behind the first loop found so far, nothing earlier begins.
        end = len(codes) if first is None else min(len(codes), first + max(LOOP_CHARACTERS, LOOP_REPEATS * period))
        same = codes[period:end] == codes[: end - period]
        needed = max(LOOP_CHARACTERS, LOOP_REPEATS * period) - period
        if len(same) < needed:
            continue
        breaks = numpy.flatnonzero(~same)
        starts = numpy.concatenate([[0], breaks + 1])
        lengths = numpy.concatenate([breaks, [len(same)]]) - starts
        found = numpy.flatnonzero(lengths >= needed)
        if len(found):
            start = int(starts[found[0]])
            first = start if first is None else min(first, start)
    return first


def sentences_seen_before(text: str) -> float:
    """Share of the sentences that stood in the text before, punctuation and blanks aside; 0.0 where there are none.

    Sentences of fewer than `SENTENCE_CHARACTERS` characters ("他笑了。") come again in good prose, and are left out.
    """
    sentences = [_NO_WORD.sub("", piece) for piece in _SENTENCE_END.split(text)]
    sentences = [sentence for sentence in sentences if len(sentence) >= SENTENCE_CHARACTERS]
    if not sentences:
        return 0.0
    return 1.0 - len(set(sentences)) / len(sentences)


def compression_ratio(text: str) -> float:
    """Bytes of the text in UTF-8 / bytes after zlib at level 6; 0.0 for an empty text.

    1.5 to 2.3 in prose of some thousand characters, far above where it loops; grows with length.
    """
    data = text.encode("utf-8", errors="surrogatepass")
    return len(data) / len(zlib.compress(data, 6)) if data else 0.0


def _codes(text: str) -> numpy.ndarray:
    """[characters] int64 code points."""
    return numpy.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4").astype(numpy.int64)


def _names(values: numpy.ndarray) -> numpy.ndarray:
    """Small numbers from 0, equal where the values are."""
    return numpy.unique(values, return_inverse=True)[1]


def _joined(beginnings: numpy.ndarray, ends: numpy.ndarray, distance: int) -> numpy.ndarray:
    """One value for each pair of names that lie `distance` apart."""
    count = len(beginnings) - distance
    return beginnings[:count] * numpy.int64(len(ends) + 1) + ends[distance:]
