"""Overall scores from row scores, each with a 95 % interval; and paired comparison of two sets of predictions.

Every overall score is computed from sums over rows (a mean: values / rows; perplexity: nats / tokens; BLEU: counts of
n-grams), so rows are resampled, with replacement, by summing other rows (Efron's bootstrap; for translation: Koehn
2004, "Statistical Significance Tests for Machine Translation Evaluation").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from sacrebleu.metrics import BLEU

from novelgpt.scoring.answers import ANSWER_DEFINITIONS
from novelgpt.scoring.row_scores import RowScores, corpus_bleu
from novelgpt.scoring.text_scores import DEFINITIONS as TEXT_DEFINITIONS
from novelgpt.settings.terminal import counted

RESAMPLES = 2000
PERMUTATIONS = 5000
SEED = 42
LEVEL = 95.0

NATS = "reference_nats"
TOKENS = "reference_tokens"
TOKENS_RIGHT = "reference_tokens_right"
CHARACTERS = "reference_characters"
BLEU_COLUMNS = tuple(f"sacrebleu_statistics_{place}" for place in range(10))


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
    Statistic("bits_per_character", (NATS, f"modelled_{CHARACTERS}"), lambda sums: _ratio(sums) / math.log(2.0)),
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


def summarise_rows(rows: Sequence[RowScores], seed: int = SEED) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Overall scores and their 95 % intervals (percentiles of `RESAMPLES` samples of rows).

    Args:
        rows: scores of each row by name; a row may lack some.
        seed: of the samples.

    Returns:
        {name: value}, {name: [low, high]}. Means leave out rows without the score.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows to summarise")
    names, values = _columns(rows)
    # Row by row, as other tools sum, for bit-equality.
    whole = values.cumsum(axis=0)[-1:]
    (resampled,) = _resampled_sums([values], numpy.random.default_rng(seed))
    means, intervals = {}, {}
    for statistic in _statistics(names):
        places = [names[column] for column in statistic.columns]
        means[statistic.name] = float(statistic.combine(whole[:, places])[0])
        intervals[statistic.name] = _interval(statistic.combine(resampled[:, places]))
    return means, intervals


def compare_rows(first: Sequence[RowScores], second: Sequence[RowScores], seed: int = SEED) -> list[Comparison]:
    """Every score that both sets have, the difference with its interval and its p-value.

    Args:
        first: scores of each row.
        second: scores of other predictions for the same rows, in the same order.
        seed: of the samples.

    Raises:
        ValueError: no rows, or different numbers of rows.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{counted(len(first), 'row')} against {len(second)}: a paired comparison needs the same rows")
    (first_names, a), (second_names, b) = _columns(first), _columns(second)
    shared = [name for name in first_names if name in second_names]
    names = {name: place for place, name in enumerate(shared)}
    a, b = a[:, [first_names[name] for name in shared]], b[:, [second_names[name] for name in shared]]
    generator = numpy.random.default_rng(seed)
    resampled = _resampled_sums([a, b], generator)
    moved = numpy.stack([generator.integers(0, 2, len(a)) @ (b - a) for _ in range(PERMUTATIONS)])
    comparisons = []
    for statistic in _statistics(names):
        places = [names[column] for column in statistic.columns]
        sums = [side[:, places].sum(axis=0, keepdims=True) for side in (a, b)]
        before, after = (float(statistic.combine(side)[0]) for side in sums)
        low, high = _interval(statistic.combine(resampled[1][:, places]) - statistic.combine(resampled[0][:, places]))
        chance = statistic.combine(sums[1] - moved[:, places]) - statistic.combine(sums[0] + moved[:, places])
        # Sums in another order differ in the last bits; such differences count as equal.
        as_large = int(numpy.count_nonzero(numpy.abs(chance) >= abs(after - before) * (1 - 1e-9)))
        p_value = (1 + as_large) / (1 + PERMUTATIONS)
        comparisons.append(Comparison(statistic.name, before, after, low, high, p_value))
    return comparisons


def _resampled_sums(sides: list[numpy.ndarray], generator: numpy.random.Generator) -> list[numpy.ndarray]:
    """[RESAMPLES, columns] of each side: sums over as many rows, sampled with replacement, the same for all sides."""
    count = len(sides[0])
    resampled = [numpy.empty((RESAMPLES, side.shape[1])) for side in sides]
    for draw in range(RESAMPLES):
        weights = numpy.bincount(generator.integers(0, count, count), minlength=count)
        for sums, side in zip(resampled, sides, strict=True):
            sums[draw] = weights @ side
    return resampled


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


def _columns(rows: Sequence[RowScores]) -> tuple[dict[str, int], numpy.ndarray]:
    """Indices of the columns, and [rows, columns] to sum; for each mean, also which rows have the score."""
    # Overall scores of the model come from its sums, not from the rows' own values.
    derived = {statistic.name for statistic in _OF_THE_MODEL}
    found = dict.fromkeys(
        name for row in rows for name, value in row.items() if isinstance(value, (int, float)) and name not in derived
    )
    columns: dict[str, list[float]] = {}
    for name in found:
        columns[name] = [row.get(name, 0.0) for row in rows]
        columns[f"rows_with_{name}"] = [float(name in row) for row in rows]
    if NATS in found:
        columns[f"modelled_{CHARACTERS}"] = [row.get(CHARACTERS, 0) * float(NATS in row) for row in rows]
    counts = [row.get("sacrebleu_statistics", (0,) * len(BLEU_COLUMNS)) for row in rows]
    if any(map(any, counts)):
        columns |= {name: [row[place] for row in counts] for place, name in enumerate(BLEU_COLUMNS)}
    return {name: place for place, name in enumerate(columns)}, numpy.array(list(columns.values()), dtype=float).T
