"""The scores that other tools would print for the same texts, under their names and on their scale of 0 to 100.

Each function follows one recipe: how texts are segmented, how empty ones count, how the mean is computed. A published
score can only be compared with one computed by the same recipe.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Callable, Iterable

import numpy

from novelgpt.scoring.bleu import bleu4, bleu4_char, bleu_words
from novelgpt.scoring.rouge import METRICS, mean_f, score_counts, score_segmented, score_sets, score_texts
from novelgpt.scoring.segmentation import segment


def llamafactory(predictions: Iterable[str], references: Iterable[str]) -> dict[str, float]:
    """LLaMA-Factory 0.9.5, `train/sft/metric.py`: {"rouge-1", "rouge-2", "rouge-l", "bleu-4"}.

    rouge_chinese on jieba words, BLEU-4 on characters, each pair rounded to 4 places and then averaged; empty counts 0.
    """
    scores = {name: array("d") for name in (*METRICS, "bleu-4")}
    for prediction, reference in zip(predictions, references, strict=True):
        (rouge,) = score_texts([prediction], [reference])
        for metric in METRICS:
            scores[metric].append(round(rouge[metric]["f"] * 100, 4))
        scores["bleu-4"].append(round(bleu4_char(prediction, reference) * 100, 4))
    return {name: float(numpy.mean(values)) for name, values in scores.items()}


def swift(predictions: Iterable[str], references: Iterable[str]) -> dict[str, float]:
    """ms-swift 4.6.0, `metrics/nlg.py`: {"rouge-1", "rouge-2", "rouge-l", "bleu-4"}.

    The `rouge` package (not rouge_chinese) and BLEU-4, both on jieba words without blanks. Pairs without a reference
    are left out of the mean, empty predictions count 0. `rouge` cuts at each ".", and its rouge-l takes the union of
    the words of all longest common subsequences; where its recursion fails (about 1,000 words), this continues.
    """
    totals = dict.fromkeys((*METRICS, "bleu-4"), 0.0)
    count = 0
    for prediction, reference in zip(predictions, references, strict=True):
        predicted, expected = bleu_words(prediction), bleu_words(reference)
        if not expected:
            continue
        count += 1
        if not predicted:
            continue
        for name, value in _rouge_package(" ".join(predicted), " ".join(expected)).items():
            totals[name] += value
        totals["bleu-4"] += bleu4(predicted, expected)
    return {name: round(total / count * 100, 6) if count else 0.0 for name, total in totals.items()}


def opencompass(predictions: Iterable[str], references: Iterable[str]) -> dict[str, float]:
    """OpenCompass' JiebaRougeEvaluator: {"rouge1", "rouge2", "rougeL"}.

    Of each text, only the part before the first line end, "." or "," counts, without its punctuation.
    """
    predicted = (segment(_opencompass_text(text)) or "__PREDPLACEHOLDER__" for text in predictions)
    expected = (segment(_opencompass_text(text)) or "__REFRPLACEHOLDER__" for text in references)
    means = mean_f(map(score_segmented, predicted, expected))
    return {"rouge1": means["rouge-1"] * 100, "rouge2": means["rouge-2"] * 100, "rougeL": means["rouge-l"] * 100}


CONVENTIONS: dict[str, Callable[[Iterable[str], Iterable[str]], dict[str, float]]] = {
    "llamafactory": llamafactory,
    "swift": swift,
    "opencompass": opencompass,
}


def _opencompass_text(text: str) -> str:
    first = re.split(r"[\n.,]", text, maxsplit=1)[0]
    bare = re.sub(r"\b(a|an|the)\b", "", re.sub(r"[^\w\s]", "", first), flags=re.IGNORECASE)
    return " ".join(bare.split())


def _rouge_package(prediction: str, reference: str) -> dict[str, float]:
    """F of rouge-1/2/l as `rouge` 1.0.1 gives them for words with blanks between; all 0 where a side is "." only."""
    if not prediction.strip(".") or not reference.strip("."):
        return dict.fromkeys(METRICS, 0.0)
    predicted, expected = (
        [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece] for text in (prediction, reference)
    )
    common = set().union(*(_common_words(sentence, other) for sentence in expected for other in predicted))
    said, meant = ([word for sentence in side for word in sentence] for side in (predicted, expected))
    return {
        "rouge-1": score_sets(said, meant)["f"],
        "rouge-2": score_sets(itertools.pairwise(said), itertools.pairwise(meant))["f"],
        "rouge-l": score_counts(len(set(said)), len(set(meant)), len(common))["f"],
    }


def _common_words(reference: list[str], prediction: list[str]) -> set[str]:
    """The words of the longest common subsequence that `rouge` finds: from the end, a match is taken at once, and of
    two equal paths the one that shortens the prediction.

    Only every √n-th row of the table is kept, and the others are recomputed block by block, so that long texts fit into
    memory.
    """
    numbers = {word: number for number, word in enumerate({*reference, *prediction})}
    rows = numpy.array([numbers[word] for word in reference])
    columns = numpy.array([numbers[word] for word in prediction])
    step = max(1, int(len(rows) ** 0.5))
    kept = [numpy.zeros(len(columns) + 1, dtype=numpy.int32)]
    for begin in range(0, len(rows), step):
        kept.append(_table(kept[-1], rows[begin : begin + step], columns)[-1])
    words: set[str] = set()
    j = len(columns)
    for block in range(len(kept) - 2, -1, -1):
        begin = block * step
        table = _table(kept[block], rows[begin : begin + step], columns)
        i = len(table) - 1
        while i > 0 and j > 0:
            if rows[begin + i - 1] == columns[j - 1]:
                words.add(prediction[j - 1])
                i, j = i - 1, j - 1
            elif table[i - 1, j] > table[i, j - 1]:
                i -= 1
            else:
                j -= 1
    return words


def _table(first: numpy.ndarray, rows: numpy.ndarray, columns: numpy.ndarray) -> numpy.ndarray:
    """[rows + 1, columns + 1] lengths of longest common subsequences, continued from the row `first`."""
    table = numpy.empty((len(rows) + 1, len(first)), dtype=numpy.int32)
    table[0] = first
    for i, word in enumerate(rows):
        row = table[i + 1]
        row[0] = 0
        numpy.maximum(table[i, 1:], table[i, :-1] + (columns == word), out=row[1:])
        numpy.maximum.accumulate(row, out=row)
    return table
