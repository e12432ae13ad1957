"""How much a text repeats itself, in characters, so that models with different tokenizers compare. Blanks and
punctuation count."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy

WINDOW = 2000
"""Characters per window: longer texts repeat more n-grams, so texts are compared window by window."""

LOOP_CHARACTERS = 50
LOOP_REPEATS = 3
LONGEST_PERIOD = 1000
SENTENCE_CHARACTERS = 8

_SENTENCE_END = re.compile(r"[。！？!?…\n]+")
_NO_WORD = re.compile(r"[\W_]+")


def repetition(text: str, n: int = 4) -> float:
    """Share of the character n-grams that occur earlier in the text: 1 - distinct n-grams / all n-grams.

    seq-rep-n of Welleck et al. (arXiv:1908.04319), who count tokens of one continuation. From 0 (no repeated n-gram)
    towards 1 (a loop); 0.0 for texts of fewer than n characters.

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
    """The text in windows of `WINDOW` characters; the last one ends with the text, and may overlap another.

    A shorter text is one window. So all windows of a long text have one length, and its end, where loops are, counts.
    """
    last = max(0, len(text) - WINDOW)
    return [text[start : start + WINDOW] for start in (*range(0, last, WINDOW), last)]


def windowed_repetition(text: str, n: int) -> float:
    """Mean `repetition` of the text's `windows`."""
    found = windows(text)
    return sum(repetition(window, n) for window in found) / len(found)


def distinct(text: str, n: int) -> float:
    """Distinct n-grams of characters / all n-grams, mean over the text's `windows`; 0.0 where there is no n-gram.

    After distinct-n of Li et al. (arXiv:1510.03055), who count words of all outputs together and divide by all words;
    windows keep texts of several lengths comparable.
    """
    if len(text) < n:
        return 0.0
    return 1.0 - windowed_repetition(text, n)


def longest_repeat(text: str) -> int:
    """Characters of the longest substring that occurs twice in the text; the two may overlap.

    Prefix doubling (Karp, Miller, Rosenberg 1972) on numpy arrays, exact, O(n log² n): 2 ms at 4,000 characters.
    """
    codes = _codes(text)
    length, names = 0, numpy.zeros(len(codes), dtype=numpy.int64)
    # names[i]: number of the substring of `length` characters that starts at i; equal substrings have equal numbers.
    following = _names(codes)
    while _repeats(following):
        length, names = max(1, 2 * length), following
        if 2 * length >= len(codes):
            break
        following = _names(_pairs(names, length))
    # Repeated for certain; perhaps repeated.
    shortest, longest = length, max(length, min(2 * length, len(codes)) - 1)
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        # A substring of up to twice the length is identified by its start and its end.
        if _repeats(_names(_pairs(names, middle - length))):
            shortest = middle
        else:
            longest = middle - 1
    return shortest


def first_loop(text: str) -> int | None:
    """Where the first loop of the text starts, in characters from 0; None if there is none.

    A loop is a substring of at most `LONGEST_PERIOD` characters repeated `LOOP_REPEATS` times in a row, together at
    least `LOOP_CHARACTERS` long. O(n * LONGEST_PERIOD), after a cheaper check of the longest repeat.
    """
    # A loop of period p repeats a substring of its whole length less p.
    if longest_repeat(text) < LOOP_CHARACTERS * (LOOP_REPEATS - 1) // LOOP_REPEATS:
        return None
    codes = _codes(text)
    first: int | None = None
    for period in range(1, min(LONGEST_PERIOD, len(codes) // LOOP_REPEATS) + 1):
        # Only a loop before the first one found so far is of interest.
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
    """Share of the sentences that occur earlier in the text, ignoring punctuation and blanks; 0.0 without sentences.

    Sentences of fewer than `SENTENCE_CHARACTERS` characters ("他笑了。") repeat in good prose, and are left out.
    """
    sentences = [_NO_WORD.sub("", sentence) for sentence in _SENTENCE_END.split(text)]
    sentences = [sentence for sentence in sentences if len(sentence) >= SENTENCE_CHARACTERS]
    return 1.0 - len(set(sentences)) / len(sentences) if sentences else 0.0


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


def _repeats(names: numpy.ndarray) -> bool:
    return len(names) > 0 and int(names.max()) + 1 < len(names)


def _pairs(names: numpy.ndarray, distance: int) -> numpy.ndarray:
    """One value for each pair of names that are `distance` apart."""
    return names[: len(names) - distance] * numpy.int64(len(names) + 1) + names[distance:]
