"""ROUGE-1/2/L of Chinese text: bit-equal to rouge_chinese 1.0.3, without its O(n*m) dictionary.

The package is not imported: its wheel also installs a top-level `rouge` that overwrites the package of that name, and a
pair of 10,000-character texts takes it a minute and 5 GB. The tests compare with it.

It compares sets of words, so a correct sentence repeated ten times gets the full score. `character_rouge` counts each
n-gram as often as it occurs in both texts (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), and
characters need no dictionary; its names differ from rouge-1/2/l for that reason.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Hashable, Iterable, Sequence

from novelgpt.scoring.bleu import ngrams
from novelgpt.scoring.segmentation import segment

METRICS = ("rouge-1", "rouge-2", "rouge-l")

Score = dict[str, float]
"""{"r": recall, "p": precision, "f": F}, each in [0, 1]."""

PairScores = dict[str, Score]
"""A Score for each of METRICS."""

# rouge_chinese.Rouge.cut_sent, in its order: a sentence ends after 。！？? (and the closing quote behind), ......, ……
_SENTENCE_ENDS = (
    re.compile(r"([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
    re.compile(r"(…{2})([^”’])"),
    re.compile(r"([。！？?][”’])([^，。！？?])"),
)


def rouge_tokens(segmented: str) -> list[str]:
    """Cut a text whose words are separated by blanks into the flat word list that rouge_chinese scores.

    The package first puts a newline after every 。！？?, ...... and …… (also inside a word: "x?y" is two words), strips
    the end of the text, splits at newlines, and drops pieces of no characters. Each piece then gives its words; a piece
    of white space only gives one empty word '', which counts and matches like any other word. So a newline after a full
    stop and a blank line are words: "一 。 \\n \\n 二" gives ["一", "。", "", "", "二"].

    Returns [] for an empty or blank text, and only then.
    """
    for sentence_end in _SENTENCE_ENDS:
        segmented = sentence_end.sub(r"\1\n\2", segmented)
    tokens: list[str] = []
    for piece in segmented.rstrip().split("\n"):
        if piece:
            tokens.extend(piece.split() or [""])
    return tokens


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length, in words, of the longest common subsequence of `a` and `b`.

    Bit-parallel dynamic programming (Hyyrö 2004, "Bit-parallel LCS-length computation revisited") with the column in
    one Python integer: O(len(a) * len(b) / 30) time, O(len(a)) bits for each distinct common word.
    """
    # Only words of both sides can be part of it, and unrelated texts share few: shorter integers, fewer rounds.
    common = set(a).intersection(b)
    positions = dict.fromkeys(common, 0)
    bit = 1
    for word in a:
        if word in common:
            positions[word] |= bit
            bit <<= 1
    everywhere = bit - 1
    # A 0 bit at i: the subsequence grows by one at word i of `a`.
    unmatched = everywhere
    for word in b:
        if word in common:
            matches = unmatched & positions[word]
            unmatched = ((unmatched + matches) | (unmatched - matches)) & everywhere
    return everywhere.bit_count() - unmatched.bit_count()


def score_counts(predicted: int, expected: int, shared: int) -> Score:
    """Precision, recall and F of `shared` units out of `predicted` and `expected`; an empty side scores 0."""
    precision = shared / predicted if predicted else 0.0
    recall = shared / expected if expected else 0.0
    # rouge_chinese's formula, in its order, for bit-equality; the 1e-8 makes a perfect match 0.999999995.
    f = 2.0 * ((precision * recall) / (precision + recall + 1e-8))
    return {"r": recall, "p": precision, "f": f}


def score_sets(prediction: Iterable[Hashable], reference: Iterable[Hashable]) -> Score:
    """Score of the distinct units of both sides."""
    predicted, expected = set(prediction), set(reference)
    return score_counts(len(predicted), len(expected), len(predicted & expected))


def score_segmented(prediction: str, reference: str) -> PairScores:
    """Score one pair of texts whose words are separated by blanks.

    The result == `rouge_chinese.Rouge().get_scores(prediction, reference)[0]`: rouge-1 and rouge-2 compare the sets of
    distinct words and word pairs (of the whole text, across sentences), rouge-l the longest common subsequence of
    `rouge_tokens`. Where an empty or blank text makes the package raise ValueError, every number is 0.0.
    """
    predicted, expected = rouge_tokens(prediction), rouge_tokens(reference)
    return {
        "rouge-1": score_sets(predicted, expected),
        "rouge-2": score_sets(itertools.pairwise(predicted), itertools.pairwise(expected)),
        "rouge-l": score_counts(len(predicted), len(expected), longest_common_subsequence(predicted, expected)),
    }


# Cutting words is nine tenths of the cost, and an evaluation meets the same references at every checkpoint. At the
# usual few hundred characters a text this holds some MB.
_segment_reference = functools.lru_cache(maxsize=4096)(segment)


def score_texts(predictions: Sequence[str], references: Sequence[str]) -> list[PairScores]:
    """Score raw texts pair by pair: `score_segmented` of their jieba words.

    Raises ValueError if there are not as many references as predictions.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: ROUGE needs pairs")
    return [
        score_segmented(segment(prediction), _segment_reference(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def mean_f(scores: Iterable[PairScores]) -> dict[str, float]:
    """Mean F of each of METRICS over the pairs, in [0, 1]; equal to the "f" of rouge_chinese's `get_scores(avg=True)`.

    Raises ValueError if there are no pairs.
    """
    # Not sum(): from Python 3.12 on it compensates rounding, and the last bit would differ from rouge_chinese.
    totals, count = dict.fromkeys(METRICS, 0.0), 0
    for pair in scores:
        count += 1
        for metric in METRICS:
            totals[metric] += pair[metric]["f"]
    if not count:
        raise ValueError("no scores to average")
    return {metric: total / count for metric, total in totals.items()}


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
