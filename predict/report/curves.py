"""The data of a report's charts: repetition by position, means of a score by length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

GRAM = 8
"""Length of the n-grams whose repetition is shown: prose repeats few of them, a loop all."""

BINS = 16
MAX_ROWS = 2_000
MAX_CHARACTERS = 8_000_000
MIN_SHARE_OF_TEXTS = 0.05


@dataclass(frozen=True)
class Curve:
    """Means of groups of rows.

    Attributes:
        places: [groups] positions on the x axis.
        means: [groups].
        errors: [groups] half widths of the 95 % intervals of the means; NaN for a group of one row.
        counts: [groups] rows.
    """

    places: numpy.ndarray
    means: numpy.ndarray
    errors: numpy.ndarray
    counts: numpy.ndarray


def seen_before(text: str) -> numpy.ndarray:
    """[n-grams] 1.0 where the `GRAM` characters that start here occur earlier in the text, else 0.0.

    The mean is `repetition(text, GRAM)`; this locates it in the text.
    """
    count = max(0, len(text) - GRAM + 1)
    # Of equal keys the last value stays; backwards, that is the first occurrence.
    first = {text[start : start + GRAM]: start for start in range(count - 1, -1, -1)}
    seen = numpy.ones(count)
    seen[list(first.values())] = 0.0
    return seen


def bin_width(lengths: Sequence[float]) -> int:
    """Characters per bin, a round number of at least 20: about `BINS` bins hold all but the longest 5 % of texts."""
    if not lengths:
        return 20
    wanted = float(numpy.percentile(lengths, 95)) / BINS
    power = 10 ** max(1, math.floor(math.log10(max(wanted, 10.0))))
    return max(20, next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted))


def repetition_by_position(texts: Iterable[str], width: int) -> Curve:
    """`seen_before` in bins of `width` characters: means over the texts that fill at least half of a bin.

    Bins that fewer than `MIN_SHARE_OF_TEXTS` of the texts reach are dropped.
    """
    groups: list[list[float]] = []
    total = 0
    for text in texts:
        total += 1
        seen = seen_before(text[: (2 * BINS + 1) * width])
        for place in range(min((len(seen) + width // 2) // width, 2 * BINS)):
            if place == len(groups):
                groups.append([])
            groups[place].append(float(seen[place * width : (place + 1) * width].mean()))
    kept = [group for group in groups if len(group) >= MIN_SHARE_OF_TEXTS * total]
    return _curve([(place + 0.5) * width for place in range(len(kept))], kept)


def sample(lengths: Sequence[float]) -> list[int]:
    """Evenly spaced row numbers: all rows, or as many as can be read quickly.

    Args:
        lengths: of each row, in characters.
    """
    if not lengths:
        return []
    mean = max(1.0, sum(lengths) / len(lengths))
    count = min(len(lengths), MAX_ROWS, max(1, int(MAX_CHARACTERS / mean)))
    return [number * len(lengths) // count for number in range(count)]


def means_by_length(lengths: Sequence[float], values: Sequence[float]) -> Curve:
    """Means of values in at most 8 groups of similar size (5 rows or more), from shortest to longest; rows of one
    length stay together.
    """
    order = numpy.argsort(numpy.asarray(lengths, dtype=float), kind="stable")
    along, across = numpy.asarray(lengths, dtype=float)[order], numpy.asarray(values, dtype=float)[order]
    groups = max(1, min(8, len(order) // 5))
    cuts = [len(order) * group // groups for group in range(1, groups)]
    cuts = sorted({int(numpy.searchsorted(along, along[cut])) for cut in cuts} - {0})
    parts = [part for part in zip(numpy.split(along, cuts), numpy.split(across, cuts), strict=True) if len(part[0])]
    return _curve([float(part.mean()) for part, _ in parts], [part.tolist() for _, part in parts])


def _curve(places: Sequence[float], groups: Sequence[Sequence[float]]) -> Curve:
    counts = numpy.array([len(group) for group in groups])
    means = numpy.array([numpy.mean(group) for group in groups])
    deviations = numpy.array([numpy.std(group, ddof=1) if len(group) > 1 else math.nan for group in groups])
    return Curve(numpy.array(places), means, 1.96 * deviations / numpy.sqrt(counts), counts)
