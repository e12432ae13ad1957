"""How much a text repeats itself: seq-rep-n of Welleck et al. (arXiv:1908.04319), on characters."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of characters that stood in the text before: 1 - distinct n-grams / all n-grams.

    From 0 (no n-gram comes twice) towards 1 (a loop); 0.0 for texts of fewer than n characters, which have no n-gram.
    The paper counts tokens of one continuation; characters compare across tokenizers. Blanks and punctuation count.

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
