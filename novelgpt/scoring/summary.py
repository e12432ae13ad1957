"""Overall scores from row scores, each with a 95 % interval; and paired comparison of two sets of predictions.

Every overall score is computed from sums over rows (a mean: values / rows; perplexity: nats / tokens; BLEU: counts of
n-grams), so rows are resampled, with replacement, by summing other rows (Efron's bootstrap; for translation: Koehn
2004, "Statistical Significance Tests for Machine Translation Evaluation").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy
from sacrebleu.metrics import BLEU

from novelgpt.scoring.answers import ANSWER_DEFINITIONS
from novelgpt.scoring.row_scores import RowScores, corpus_bleu
from novelgpt.scoring.score_table import (
    BLEU_COLUMNS,
    BLOCK_ROWS,
    MODELLED_CHARACTERS,
    NATS,
    TOKENS,
    TOKENS_RIGHT,
    ScoreColumns,
    table_of,
)
from novelgpt.scoring.text_scores import DEFINITIONS as TEXT_DEFINITIONS
from novelgpt.settings.terminal import counted

RESAMPLES = 2000
PERMUTATIONS = 5000
SEED = 42
LEVEL = 95.0
# Up to so many rows, each sample is summed by itself, all its rows at once. More rows are summed block by block, for
# many samples together, which is several times as fast, and rounds differently in the last bits.
ROWS_SUMMED_AT_ONCE = 32_768
# For the samples that are drawn together, one byte per row and sample; so many are enough where rows are few.
BYTES_OF_SAMPLES, FEW_SAMPLES = 2**24, 64


@dataclass(frozen=True)
class Statistic:
    """An overall score.

    Attributes:
        name: of the score.
        columns: summed over rows.
        combine: [samples, columns] sums -> [samples] values.
    """

    name: str
    columns: tuple[str, ...]
    combine: Callable[[numpy.ndarray], numpy.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One score of two sets of predictions for the same rows.

    Attributes:
        name: of the score.
        first: value of the first predictions.
        second: value of the others.
        low: lower end of the 95 % interval of second - first.
        high: upper end.
        p_value: how often a difference as large occurs when each row's two predictions are swapped at random
            (approximate randomization, two-sided).
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    p_value: float


def _ratio(sums: numpy.ndarray) -> numpy.ndarray:
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / sums[:, 1]


def _bleu(sums: numpy.ndarray) -> numpy.ndarray:
    whole = numpy.rint(sums).astype(int).tolist()
    return numpy.array([BLEU.compute_bleu(s[:4], s[4:8], s[8], s[9], smooth_method="exp").score for s in whole])


_OF_THE_MODEL = (
    Statistic("loss", (NATS, TOKENS), _ratio),
    Statistic("perplexity", (NATS, TOKENS), lambda sums: numpy.exp(numpy.minimum(_ratio(sums), 700.0))),
    Statistic("bits_per_character", (NATS, MODELLED_CHARACTERS), lambda sums: _ratio(sums) / math.log(2.0)),
    Statistic("token_accuracy", (TOKENS_RIGHT, TOKENS), _ratio),
)
_BLEU = Statistic("sacrebleu", BLEU_COLUMNS, _bleu)


def reference_scores(sums: Sequence[float]) -> RowScores:
    """The scores of one reference under the model: the sums, and the row's "loss" and "token_accuracy".

    Args:
        sums: nats, tokens, and tokens that the model ranks first.
    """
    nats, tokens, right = sums
    means = {"loss": nats / max(tokens, 1.0), "token_accuracy": right / max(tokens, 1.0)}
    return {NATS: nats, TOKENS: tokens, TOKENS_RIGHT: right, **means}


def reference_name(name: str) -> str:
    """The name under which a score of predictions is kept for the references."""
    return f"reference_{name.removeprefix('prediction_')}"


def definitions() -> dict[str, str]:
    """Name -> exact definition, for every overall score; means over rows unless they say otherwise."""
    repetition = [
        name for name in TEXT_DEFINITIONS if not name.startswith(("rouge", "bleu", "prediction", "reference"))
    ]
    return {
        **TEXT_DEFINITIONS,
        **{f"reference_{name}": f"the same of the references: {TEXT_DEFINITIONS[name]}" for name in repetition},
        **ANSWER_DEFINITIONS,
        "sacrebleu": f"corpus BLEU, 0 to 100: {corpus_bleu().get_signature()}",
        "stopped": "share of the predictions that the model ended by itself",
        "cut": "share of the predictions that are longer than the row's scored_characters, which alone are scored",
        "loss": "nats per token of the references under the model, end tokens of answers included, over all tokens",
        "perplexity": "e to the loss; compares models of one tokenizer only",
        "bits_per_character": "bits of the references under the model / their characters; compares any models",
        "token_accuracy": "share of the references' tokens that the model ranks first",
    }


def summarise_rows(rows: Iterable[RowScores], seed: int = SEED) -> tuple[dict[str, float], dict[str, list[float]]]:
    """`summarise_columns` of rows that are at hand.

    Args:
        rows: scores of each row by name; a row may lack some.
        seed: of the samples.
    """
    return summarise_columns(table_of(rows).columns(), seed)


def summarise_columns(scores: ScoreColumns, seed: int = SEED) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Overall scores and their 95 % intervals (percentiles of `RESAMPLES` samples of rows).

    Args:
        scores: of the rows.
        seed: of the samples.

    Returns:
        {name: value}, {name: [low, high]}. Means leave out rows without the score.

    Raises:
        ValueError: no rows.
    """
    if not scores.rows:
        raise ValueError("no rows to summarise")
    # Row by row, as other tools sum, for bit-equality.
    whole = numpy.zeros((1, len(scores.places)))
    for start in range(0, scores.rows, BLOCK_ROWS):
        block = scores.block(start, start + BLOCK_ROWS)
        whole = numpy.concatenate([whole, block]).cumsum(axis=0)[-1:]
    (resampled,) = _resampled_sums([scores], numpy.random.default_rng(seed))
    places = {name: place for place, name in enumerate(scores.places)}
    means, intervals = {}, {}
    for statistic in _statistics(places):
        chosen = [places[column] for column in statistic.columns]
        means[statistic.name] = float(statistic.combine(whole[:, chosen])[0])
        intervals[statistic.name] = _interval(statistic.combine(resampled[:, chosen]))
    return means, intervals


def compare_rows(first: Iterable[RowScores], second: Iterable[RowScores], seed: int = SEED) -> list[Comparison]:
    """`compare_columns` of rows that are at hand.

    Args:
        first: scores of each row.
        second: scores of other predictions for the same rows, in the same order.
        seed: of the samples.
    """
    return compare_columns(table_of(first).columns(), table_of(second).columns(), seed)


def compare_columns(first: ScoreColumns, second: ScoreColumns, seed: int = SEED) -> list[Comparison]:
    """Every score that both sets have, the difference with its interval and its p-value.

    Args:
        first: scores of the rows.
        second: scores of other predictions for the same rows, in the same order.
        seed: of the samples.

    Raises:
        ValueError: no rows, or different numbers of rows.
    """
    if not first.rows or first.rows != second.rows:
        raise ValueError(f"{counted(first.rows, 'row')} against {second.rows}: a paired comparison needs the same rows")
    shared = [name for name in first.places if name in second.places]
    names = {name: place for place, name in enumerate(shared)}
    sides = [first.only(shared), second.only(shared)]
    generator = numpy.random.default_rng(seed)
    resampled = _resampled_sums(sides, generator)
    moved = _swapped_sums(sides[0], sides[1], generator)
    whole = [numpy.array([[side.values[place].sum() for place in side.places.values()]]) for side in sides]
    comparisons = []
    for statistic in _statistics(names):
        places = [names[column] for column in statistic.columns]
        sums = [side[:, places] for side in whole]
        before, after = (float(statistic.combine(side)[0]) for side in sums)
        low, high = _interval(statistic.combine(resampled[1][:, places]) - statistic.combine(resampled[0][:, places]))
        chance = statistic.combine(sums[1] - moved[:, places]) - statistic.combine(sums[0] + moved[:, places])
        # Sums in another order differ in the last bits; such differences count as equal.
        as_large = int(numpy.count_nonzero(numpy.abs(chance) >= abs(after - before) * (1 - 1e-9)))
        p_value = (1 + as_large) / (1 + PERMUTATIONS)
        comparisons.append(Comparison(statistic.name, before, after, low, high, p_value))
    return comparisons


def _resampled_sums(sides: Sequence[ScoreColumns], generator: numpy.random.Generator) -> list[numpy.ndarray]:
    """[RESAMPLES, columns] of each side: sums over as many rows, sampled with replacement, the same for all sides."""
    rows = sides[0].rows
    sums: list[list[numpy.ndarray]] = [[] for _ in sides]
    # How often each sample holds each row: no row is drawn 256 times, which has a chance of 1 in 10^500.
    for counts in _samples(RESAMPLES, rows):
        for sample in counts:
            for start in range(0, rows, BLOCK_ROWS):
                drawn = generator.integers(0, rows, min(BLOCK_ROWS, rows - start))
                numpy.add.at(sample, drawn, numpy.uint8(1))
        for side, found in zip(sides, sums, strict=True):
            found.append(_weighted_sums(counts, side))
    return [numpy.concatenate(found) for found in sums]


def _swapped_sums(first: ScoreColumns, second: ScoreColumns, generator: numpy.random.Generator) -> numpy.ndarray:
    """[PERMUTATIONS, columns]: what moves from the second side to the first where half of the rows swap their sides."""
    rows = first.rows
    sums = []
    for swapped in _samples(PERMUTATIONS, rows):
        for sample in swapped:
            for start in range(0, rows, BLOCK_ROWS):
                sample[start : start + BLOCK_ROWS] = generator.integers(0, 2, min(BLOCK_ROWS, rows - start))
        sums.append(_weighted_sums(swapped, second, minus=first))
    return numpy.concatenate(sums)


def _samples(total: int, rows: int) -> Iterator[numpy.ndarray]:
    """[samples, rows] of zeros, `total` samples in all, as many at once as are summed together."""
    together = FEW_SAMPLES if rows <= ROWS_SUMMED_AT_ONCE else max(1, BYTES_OF_SAMPLES // rows)
    for first in range(0, total, together):
        yield numpy.zeros((min(together, total - first), rows), numpy.uint8)


def _weighted_sums(weights: numpy.ndarray, of: ScoreColumns, minus: ScoreColumns | None = None) -> numpy.ndarray:
    """[samples, columns] sums over rows.

    Args:
        weights: [samples, rows] of each row in each sample.
        of: what is summed.
        minus: subtracted from it, row by row.
    """

    def block(start: int, stop: int) -> numpy.ndarray:
        return of.block(start, stop) if minus is None else of.block(start, stop) - minus.block(start, stop)

    if of.rows <= ROWS_SUMMED_AT_ONCE:
        values = block(0, of.rows)
        return numpy.stack([sample.astype(float) @ values for sample in weights])
    sums = numpy.zeros((len(weights), len(of.places)))
    for start in range(0, of.rows, BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        sums += weights[:, start:stop].astype(float) @ block(start, stop)
    return sums


def _interval(values: numpy.ndarray) -> list[float]:
    known = values[numpy.isfinite(values)]
    if not len(known):
        return [math.nan, math.nan]
    low, high = numpy.percentile(known, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return [float(low), float(high)]


def _statistics(names: dict[str, int]) -> list[Statistic]:
    """The overall scores of these columns; a mean is over the rows that have the score."""
    means = [
        Statistic(name, (name, f"rows_with_{name}"), _ratio)
        for name in names
        if f"rows_with_{name}" in names and name not in (NATS, TOKENS, TOKENS_RIGHT)
    ]
    return means + [extra for extra in (*_OF_THE_MODEL, _BLEU) if set(extra.columns) <= set(names)]
