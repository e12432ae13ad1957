"""Scores of many rows, on all cores and in constant memory; each row as a mapping from names to numbers."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from novelgpt.scoring.answers import ANSWER_SCORES
from novelgpt.scoring.text_scores import repetition_scores, score_pair
from novelgpt.settings.hardware import usable_cores

RowScores = dict[str, Any]
"""Names of scores -> numbers; "sacrebleu_statistics" -> the ten counts that corpus BLEU is computed from."""

CHARACTERS_OF_A_TASK = 100_000
CHARACTERS_FOR_SEVERAL_PROCESSES = 500_000


# An evaluation meets the same references at every checkpoint.
_reference_repetition = functools.lru_cache(maxsize=1024)(repetition_scores)


@dataclass(frozen=True)
class ScoredRow:
    """What is scored of one row.

    Attributes:
        prediction: the answer.
        reference: the correct answer; "" for none, then only scores without a reference are computed.
        metrics: names of `ANSWER_SCORES` that the row asks for.
        answers: further correct answers, for those.
    """

    prediction: str
    reference: str
    metrics: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


def score_row(row: ScoredRow) -> RowScores:
    """Every score of one row.

    Those of `text_scores.DEFINITIONS`, the repetition scores of the reference as "reference_…", the answer scores that
    the row asks for, and "sacrebleu_statistics": matches and n-grams of orders 1 to 4, lengths of both sides in tokens.
    """
    if not row.reference:
        return {**repetition_scores(row.prediction), "prediction_characters": len(row.prediction)}
    scores: RowScores = dict(score_pair(row.prediction, row.reference))
    scores |= {f"reference_{name}": value for name, value in _reference_repetition(row.reference).items()}
    scores |= {name: ANSWER_SCORES[name](row.prediction, [row.reference, *row.answers]) for name in row.metrics}
    bleu = corpus_bleu().corpus_score([row.prediction], [[row.reference]])
    scores["sacrebleu_statistics"] = [*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len]
    return scores


def score_rows(rows: Iterable[ScoredRow], workers: int | None = None) -> Iterator[RowScores]:
    """`score_row` of each row, in order.

    Args:
        rows: consumed as needed; of a long iterator only a few tasks per process are in memory.
        workers: processes; None for one per core, or only this process where there is little to do.
    """
    tasks = _tasks(rows)
    if workers is None:
        few = max(1, CHARACTERS_FOR_SEVERAL_PROCESSES // CHARACTERS_OF_A_TASK)
        first = list(itertools.islice(tasks, few + 1))
        tasks = itertools.chain(first, tasks)
        workers = usable_cores() if len(first) > few else 1
    if workers == 1:
        for task in tasks:
            yield from _score_task(task)
        return
    # Not fork, which copies threads of torch or tokenizers in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: list[Future[list[RowScores]]] = [
            pool.submit(_score_task, task) for task in itertools.islice(tasks, 2 * workers)
        ]
        while waiting:
            yield from waiting.pop(0).result()
            waiting += [pool.submit(_score_task, task) for task in itertools.islice(tasks, 1)]


@functools.cache
def corpus_bleu() -> BLEU:
    """sacrebleu's BLEU for Chinese: each hanzi is a token."""
    bleu = BLEU(tokenize="zh")
    bleu.corpus_score(["一"], [["一"]])  # sets the number of references in its signature
    return bleu


def _tasks(rows: Iterable[ScoredRow]) -> Iterator[list[ScoredRow]]:
    """Lists of rows with about the same number of characters."""
    task: list[ScoredRow] = []
    characters = 0
    for row in rows:
        task.append(row)
        characters += len(row.prediction) + len(row.reference)
        if characters >= CHARACTERS_OF_A_TASK:
            yield task
            task, characters = [], 0
    if task:
        yield task


def _score_task(task: list[ScoredRow]) -> list[RowScores]:
    scores = [score_row(row) for row in task]
    # sacrebleu caches the last 65,536 tokenized texts, 100 KB each where they are long.
    TokenizerZh.__call__.cache_clear()
    TokenizerRegexp.__call__.cache_clear()
    return scores
