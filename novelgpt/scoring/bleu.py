"""BLEU-4 of one pair, on characters or on words: two conventions with separate names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from novelgpt.scoring.segmentation import words

ORDERS = (1, 2, 3, 4)


def bleu4(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """BLEU of one sequence of tokens against one reference, in [0, 1].

    Geometric mean of the clipped n-gram precisions of orders 1 to 4 times the brevity penalty (Papineni et al. 2002).
    The k-th order without a match counts as 1 / (2^k * n-grams) (NIST's smoothing, mteval-v13a.pl), so short texts do
    not fall to 0. Bit-equal to `sentence_bleu([reference], prediction, smoothing_function=method3)` of nltk 3.10, in a
    third of its time; an empty prediction, or one without a shared token, scores 0.0.
    """
    logarithms = []
    without_match = 0
    for order in ORDERS:
        matches = (ngrams(prediction, order) & ngrams(reference, order)).total()
        total = max(1, len(prediction) - order + 1)
        if matches == 0:
            if order == 1:
                return 0.0
            without_match += 1
            logarithms.append(0.25 * math.log(1 / (2**without_match * total)))
        else:
            logarithms.append(0.25 * math.log(matches / total))
    brevity = 1.0 if len(prediction) > len(reference) else math.exp(1 - len(reference) / len(prediction))
    return brevity * math.exp(math.fsum(logarithms))


def bleu4_char(prediction: str, reference: str) -> float:
    """`bleu4` of characters, blanks and line ends included: LLaMA-Factory's convention."""
    return bleu4(prediction, reference)


def bleu4_word(prediction: str, reference: str) -> float:
    """`bleu4` of jieba words without blanks; line ends are words: ms-swift's convention."""
    return bleu4(bleu_words(prediction), bleu_words(reference))


def bleu_words(text: str) -> list[str]:
    """The words of a text as `bleu4_word` counts them."""
    return [word for word in (word.strip(" ") for word in words(text)) if word]


def ngrams(tokens: Sequence[str], order: int) -> Counter[Sequence[str]]:
    """The n-grams of a sequence with their counts."""
    if isinstance(tokens, str):  # slices of a text are n-grams, and cheaper than tuples
        return Counter(tokens[start : start + order] for start in range(len(tokens) - order + 1))
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
