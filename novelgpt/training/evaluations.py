"""When a run evaluates, on which rows, and how long that will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from torch.utils.data import Dataset, Subset
from transformers.trainer_utils import IntervalStrategy

from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.terminal import counted
from novelgpt.text.mixture import RowsBySource

# Minimum of an evaluation, where there is as much: below it, figures are too noisy.
MIN_TOKENS, MIN_ROWS = 20_000, 8
# Time relative to a training step on as many tokens: there is no backward pass.
TIME_SHARE = 1 / 3


@dataclass
class EvaluationPlan:
    """The evaluations of a run.

    Attributes:
        rows: to evaluate on, all or some, spread evenly.
        tokens: of these rows.
        of_all: number and tokens of all validation rows.
        steps: after which the run evaluates, rising; 0 before the first one.
        closing: evaluations after the last step.
        share: tokens of all evaluations, relative to those of training.
        least: whether the limit would leave fewer rows than are meaningful.
        sources: of `rows`; None where the loss is not told by source.
        names: of the sources.
    """

    rows: Dataset[Any]
    tokens: int
    of_all: tuple[int, int]
    steps: list[int]
    closing: int
    share: float
    least: bool
    sources: numpy.ndarray | None = None
    names: Sequence[str] = ()

    @property
    def times(self) -> int:
        """Number of evaluations."""
        return len(self.steps) + self.closing

    def left(self, step: int) -> int:
        """Number of evaluations to come when the training of a step has just ended."""
        return sum(one >= step for one in self.steps if one) + self.closing

    def seconds_left(self, step: int, last: float | None, tokens_per_second: float) -> float:
        """Seconds of the evaluations to come.

        Args:
            step: whose training has just ended.
            last: seconds of the last evaluation; None before the first.
            tokens_per_second: of training.
        """
        each = self.tokens / max(tokens_per_second, 1e-9) * TIME_SHARE if last is None else last
        return each * self.left(step)

    def explain(self) -> str:
        """Describe the evaluations in a line."""
        rows, tokens = self.of_all
        chosen = len(self.rows)  # type: ignore[arg-type]
        times = "once" if self.times == 1 else f"{self.times:,} times"
        cost = f"together {self.share:.0%} of the tokens that training reads"
        named = counted(rows, "row")
        if chosen == rows:
            return f"evaluation: {times}, on {named} of {tokens:,} tokens, {cost}"
        which = f"{chosen:,} of {named}, spread evenly, {self.tokens:,} of {tokens:,} tokens"
        why = " (fewer would be too noisy)" if self.least else ""
        return f"evaluation: {times}, on {which}, {cost}{why}; --max_eval_share 0 evaluates on all rows"


def plan_evaluations(
    valid: Dataset[Any], lengths: numpy.ndarray, valid_lengths: numpy.ndarray, rows: int, training: TrainArguments
) -> EvaluationPlan:
    """Choose the rows to evaluate on, such that evaluations cost no more than a share of training.

    The choice depends on the data and the settings alone, so that a resumed run has the same rows.

    Args:
        valid: all validation rows.
        lengths: [any number] tokens of training rows, of all or of a sample that gives their mean.
        valid_lengths: [rows] tokens of each row of `valid`.
        rows: number of training rows.
        training: `max_eval_share`, 0 for no limit; steps, epochs, and when to evaluate.
    """
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    batches = math.ceil(rows / (training.per_device_train_batch_size * training.world_size))
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    mean = int(lengths.sum()) / max(1, len(lengths))
    if training.max_steps > 0:
        last, trained = training.max_steps, training.max_steps * min(per_step, rows) * mean
    else:
        last = max(1, math.ceil(training.num_train_epochs * per_epoch))
        trained = training.num_train_epochs * rows * mean
    steps, closing = _times(training, last, per_epoch)
    times = len(steps) + closing
    tokens = int(valid_lengths.sum())
    of_all = len(valid_lengths), tokens
    affordable = training.max_eval_share * trained / max(1, times)
    limit, chosen = max(affordable, MIN_TOKENS), valid
    if training.max_eval_share and tokens > limit:
        count = max(MIN_ROWS, int(limit / (tokens / len(valid_lengths))))
        if count < len(valid_lengths):
            indices = spread_evenly(valid, count)
            chosen, tokens = Subset(valid, indices), int(valid_lengths[indices].sum())  # type: ignore[arg-type]
    least = tokens > affordable + int(valid_lengths.max())
    plan = EvaluationPlan(chosen, tokens, of_all, steps, closing, tokens * times / max(trained, 1.0), least)
    if isinstance(valid, RowsBySource):
        plan.names = valid.names
        plan.sources = valid.sources[chosen.indices] if isinstance(chosen, Subset) else valid.sources
    return plan


def spread_evenly(rows: Dataset[Any], count: int) -> numpy.ndarray:
    """Indices of about `count` rows, spread evenly over all, and over those of each source, MIN_ROWS of it at least."""
    total = len(rows)  # type: ignore[arg-type]
    sizes = numpy.bincount(rows.sources).tolist() if isinstance(rows, RowsBySource) else [total]
    parts, start = [], 0
    for size in sizes:
        share = min(size, max(MIN_ROWS, count * size // total)) if size < total else count
        parts.append(start + numpy.arange(share) * size // max(1, share))
        start += size
    return numpy.concatenate(parts)


def _times(training: TrainArguments, last: int, per_epoch: int) -> tuple[list[int], int]:
    """Steps after which the run evaluates, and the number of evaluations after the last one."""
    distance = 0
    if training.eval_strategy == IntervalStrategy.EPOCH:
        distance = per_epoch
    elif training.eval_strategy == IntervalStrategy.STEPS:
        given = float(training.eval_steps or training.logging_steps)
        distance = max(1, math.ceil(given * last) if given < 1 else int(given))
    steps = [0] if training.eval_on_start else []
    if distance:
        steps += [*range(distance, last, distance), last]
    return steps, int(training.load_best_model_at_end or not distance)
