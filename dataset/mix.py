"""Conversations of several sources, each by its weight; and the names under which figures of each are logged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy

from dataset.encoded_rows import EncodedRows
from dataset.sources import RowSource
from novelgpt.settings.arguments import ANSWER_FIGURES, EVALUATION_FIGURES, ConversationArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.mix import parse_mix
from novelgpt.settings.process import is_first_process
from novelgpt.settings.terminal import counted, say
from novelgpt.text.mixture import MixedRows, RowsBySource
from novelgpt.text.statistics import SourceCounts, show_sources
from novelgpt.training.checkpoints.sampling import order_seed


def weights_of(sources: Sequence[RowSource], weights: Mapping[str, Fraction]) -> list[Fraction]:
    """The weight of each source: that of its name, as given or short; 1 where neither is in the mix.

    Raises:
        UserError: a name in the mix is that of no source, or of several that were given apart; or all weights are 0.
    """
    found = [Fraction(1)] * len(sources)
    named: dict[int, str] = {}
    for name, weight in weights.items():
        given = [number for number, source in enumerate(sources) if name == source.given]
        matching = given or [number for number, source in enumerate(sources) if name == source.name]
        if not matching:
            known = ", ".join(dict.fromkeys(source.given for source in sources))
            raise UserError(f"--mix names {name}, which is none of the training sources {known}",
                            "name one of them, or add it to --train_files")  # fmt: skip
        if not given and len({sources[number].given for number in matching}) > 1:
            several = " and ".join(sources[number].given for number in matching[:2])
            raise UserError(f"--mix names {name}, which may be {several}", "name it as in --train_files")
        for number in matching:
            if number in named:
                raise UserError(f"--mix names one source as {named[number]} and as {name}", "leave one of them out")
            named[number], found[number] = name, weight
    if not any(found):
        raise UserError("--mix gives every source the weight 0", "give one of them more")
    return found


def figure_names(names: Sequence[str]) -> list[str]:
    """Names of sources as parts of names of figures: letters, digits, `_`, `.` and `-`, and unlike each other.

    >>> figure_names(["novels", "a b#30%", "novels"])
    ['novels', 'a_b_30', 'novels_2']
    """
    found: list[str] = []
    for name in names:
        safe = re.sub(r"[^\w.-]+", "_", name).strip("_") or "source"
        number, unlike = 1, safe
        while unlike in found:
            number += 1
            unlike = f"{safe}_{number}"
        found.append(unlike)
    return found


def mix_sources(
    train: EncodedRows,
    valid: EncodedRows,
    sources: Sequence[RowSource],
    data: ConversationArguments,
    training: TrainArguments,
) -> tuple[MixedRows, RowsBySource]:
    """Training rows of several sources by weight, and validation rows by source; packed if asked.

    Shows a table of the sources.

    Args:
        train: rows to train on.
        valid: rows to evaluate on.
        sources: those of the training rows.
        data: weights, and the length of packs.
        training: its seed decides the order.

    Raises:
        UserError: what `weights_of` and `check_figure` raise, or an epoch would have no row.
    """
    by_source = rows_by_source(valid, data)
    check_figure(training.metric_for_best_model, by_source.names)
    weights = weights_of(sources, parse_mix(data.mix))
    numbers = train.source_numbers()
    mixed = MixedRows(train, numbers, weights, order_seed(training), data.max_length if data.packing else None)
    if is_first_process():
        show_source_table(train, sources, weights, mixed.per_epoch, training)
        if data.packing:
            say(f"{counted(len(mixed), 'pack')} of {data.max_length:,} tokens in the first epoch", "")
    return mixed, by_source


def show_source_table(
    train: EncodedRows,
    sources: Sequence[RowSource],
    weights: Sequence[Fraction],
    per_epoch: int,
    training: TrainArguments,
) -> None:
    """Print the rows and passes of each source.

    Args:
        train: the training rows.
        sources: that they are of.
        weights: passes over each in an epoch.
        per_epoch: rows or packs of an epoch.
        training: how long.
    """
    epochs = training.num_train_epochs
    if training.max_steps > 0:
        per_batch = training.per_device_train_batch_size * training.world_size
        epochs = training.max_steps * training.gradient_accumulation_steps * per_batch / per_epoch
    numbers = train.source_numbers()
    rows, tokens, trained = (
        numpy.bincount(numbers, values, len(sources)) for values in (None, train.lengths, train.trained_tokens())
    )
    counts = [
        SourceCounts(source.name, int(rows[number]), int(tokens[number]), int(trained[number]), weights[number])
        for number, source in enumerate(sources)
    ]
    show_sources(counts, epochs)


def rows_by_source(rows: EncodedRows, data: ConversationArguments) -> RowsBySource:
    """Validation rows such that a loss can be told for each source; packed if asked."""
    known = list(dict.fromkeys((source.given, source.name) for source in rows.sources))
    of_parts = numpy.array([known.index((source.given, source.name)) for source in rows.sources])
    present, numbers = numpy.unique(of_parts[rows.source_numbers()], return_inverse=True)
    names = figure_names([known[number][1] for number in present])
    return RowsBySource(rows, numbers, names, data.max_length if data.packing else None)


def check_figure(figure: str | None, names: Sequence[str]) -> None:
    """Make sure that the figure that chooses the best checkpoint is one that evaluations have.

    Args:
        figure: `metric_for_best_model`.
        names: of the sources whose loss is logged.

    Raises:
        UserError: it is not.
    """
    known = [*EVALUATION_FIGURES, *ANSWER_FIGURES, *(f"{name}_loss" for name in names)]
    if figure is not None and figure.removeprefix("eval_") not in known:
        raise UserError(
            f"--metric_for_best_model {figure} is not a metric of evaluations", f"use one of {', '.join(known)}"
        )
