"""ROUGE on character counts.

rouge_chinese compares sets of words, so a correct sentence repeated ten times gets the full score. Here each n-gram
counts as often as it occurs in both texts (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), and
characters need no dictionary. The names differ from rouge-1/2/l for that reason.
"""

from __future__ import annotations

from novelgpt.scoring.bleu import ngrams
from novelgpt.scoring.rouge import longest_common_subsequence


def character_rouge(prediction: str, reference: str) -> dict[str, float]:
    """{"rouge1_char_count", "rouge2_char_count", "rougel_char"}: F in [0, 1]; white space is left out.

    F is 2 * shared / (n-grams of both sides), the harmonic mean of precision and recall; 0.0 where a side has none.
    """
    predicted, expected = "".join(prediction.split()), "".join(reference.split())
    shared = [(ngrams(predicted, order) & ngrams(expected, order)).total() for order in (1, 2)]
    return {
        "rouge1_char_count": _f(shared[0], len(predicted), len(expected)),
        "rouge2_char_count": _f(shared[1], len(predicted) - 1, len(expected) - 1),
        "rougel_char": _f(longest_common_subsequence(predicted, expected), len(predicted), len(expected)),
    }


def _f(shared: int, predicted: int, expected: int) -> float:
    return 2 * shared / (predicted + expected) if predicted > 0 and expected > 0 else 0.0
