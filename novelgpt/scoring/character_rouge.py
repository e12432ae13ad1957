"""ROUGE on counts of characters: what rouge_chinese's sets cannot see.

rouge_chinese compares sets of words, so a right sentence said ten times scores full marks. Here each n-gram counts as
often as it stands in both texts (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), and characters
need no dictionary. The names say so: these are no rouge-1/2/l.
"""

from __future__ import annotations

from collections import Counter

from novelgpt.scoring.rouge import longest_common_subsequence


def character_rouge(prediction: str, reference: str) -> dict[str, float]:
    """{"rouge1_char_count", "rouge2_char_count", "rougel_char"}: F in [0, 1]; white space is left out.

    F is 2 * shared / (n-grams of both sides), the harmonic mean of precision and recall; 0.0 where a side has none.
    """
    predicted, expected = "".join(prediction.split()), "".join(reference.split())
    return {
        "rouge1_char_count": _f(_shared(predicted, expected, 1), len(predicted), len(expected)),
        "rouge2_char_count": _f(_shared(predicted, expected, 2), len(predicted) - 1, len(expected) - 1),
        "rougel_char": _f(longest_common_subsequence(predicted, expected), len(predicted), len(expected)),
    }


def _shared(prediction: str, reference: str, order: int) -> int:
    """n-grams of both texts, each as often as in the text that has fewer of it."""
    counts = [
        Counter(text[start : start + order] for start in range(len(text) - order + 1))
        for text in (prediction, reference)
    ]
    return (counts[0] & counts[1]).total()


def _f(shared: int, predicted: int, expected: int) -> float:
    return 2 * shared / (predicted + expected) if predicted > 0 and expected > 0 else 0.0
