"""All scores of one text or one pair of texts, by exact name."""

from __future__ import annotations

from novelgpt.scoring.bleu import bleu4_char, bleu4_word
from novelgpt.scoring.repetition import (
    LONGEST_PERIOD,
    LOOP_CHARACTERS,
    LOOP_REPEATS,
    SENTENCE_CHARACTERS,
    WINDOW,
    compression_ratio,
    distinct,
    first_loop,
    longest_repeat,
    sentences_seen_before,
    windowed_repetition,
)
from novelgpt.scoring.rouge import METRICS, character_rouge, score_texts

_WINDOWED = f"mean over windows of {WINDOW:,} characters (a shorter text is one window)"

DEFINITIONS = {
    "rouge-1": "F of the sets of jieba words, as rouge_chinese 1.0.3 gives it; empty texts count as 0",
    "rouge-2": "F of the sets of pairs of jieba words, as rouge_chinese 1.0.3 gives it; empty texts count as 0",
    "rouge-l": "F of the longest common subsequence of jieba words, as rouge_chinese 1.0.3 gives it; empty texts count "
    "as 0",
    "rouge1_char_count": "F of characters, each counted as often as it occurs in both texts; white space left out",
    "rouge2_char_count": "F of pairs of characters, each counted as often as it occurs in both texts; white space left "
    "out",
    "rougel_char": "F of the longest common subsequence of characters; white space left out",
    "bleu4_char": "BLEU-4 of characters of one pair, NIST smoothing (nltk's method3): LLaMA-Factory's bleu-4 / 100",
    "bleu4_word": "BLEU-4 of jieba words of one pair, NIST smoothing (nltk's method3): ms-swift's bleu-4 / 100",
    "distinct1_char": f"distinct characters / characters of the prediction, {_WINDOWED}",
    "distinct2_char": f"distinct pairs of characters / pairs of the prediction, {_WINDOWED}",
    "rep4_char": f"1 - distinct 4-grams of characters / 4-grams, {_WINDOWED}",
    "rep8_char": f"1 - distinct 8-grams of characters / 8-grams, {_WINDOWED}",
    "rep16_char": f"1 - distinct 16-grams of characters / 16-grams, {_WINDOWED}",
    "longest_repeat_char": "characters of the longest substring that occurs twice in the prediction",
    "looped": f"share of predictions in which a substring of at most {LONGEST_PERIOD:,} characters occurs "
    f"{LOOP_REPEATS} times in a row, {LOOP_CHARACTERS} characters or more together",
    "first_loop_char": "where the first such loop starts, in characters; only of predictions that have one",
    "sentences_seen_before": f"share of the sentences of {SENTENCE_CHARACTERS} characters or more that occur earlier "
    "in the prediction, ignoring punctuation",
    "compression_ratio": "UTF-8 bytes / bytes after zlib, level 6; high where a text repeats itself; grows with length",
    "prediction_characters": "characters of the prediction",
    "reference_characters": "characters of the reference",
}
"""Name -> exact definition, for every score of a row."""


def repetition_scores(text: str) -> dict[str, float]:
    """The scores that need no reference, "distinct1_char" to "compression_ratio"; "first_loop_char" only in a loop."""
    scores: dict[str, float] = {f"distinct{n}_char": distinct(text, n) for n in (1, 2)}
    scores |= {f"rep{n}_char": windowed_repetition(text, n) for n in (4, 8, 16)}
    loop = first_loop(text)
    scores |= {"longest_repeat_char": longest_repeat(text), "looped": float(loop is not None)}
    if loop is not None:
        scores["first_loop_char"] = loop
    scores |= {"sentences_seen_before": sentences_seen_before(text), "compression_ratio": compression_ratio(text)}
    return scores


def score_pair(prediction: str, reference: str) -> dict[str, float]:
    """Every score of `DEFINITIONS` for one pair; all but "first_loop_char" exist for any two texts."""
    (rouge,) = score_texts([prediction], [reference])
    return {
        **{metric: rouge[metric]["f"] for metric in METRICS},
        **character_rouge(prediction, reference),
        "bleu4_char": bleu4_char(prediction, reference),
        "bleu4_word": bleu4_word(prediction, reference),
        **repetition_scores(prediction),
        "prediction_characters": len(prediction),
        "reference_characters": len(reference),
    }
