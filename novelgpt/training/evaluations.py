"""How often a run evaluates, on which rows, and how long that will take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers.trainer_utils import IntervalStrategy

from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.terminal import counted

# What an evaluation has at least, where there is so much: below it, figures tell too little.
LEAST_TOKENS, LEAST_ROWS = 20_000, 8
# Of the time of a training step on as many tokens: it has no backward pass.
TIME_SHARE = 1 / 3


@dataclass
class EvaluationPlan:
    """The evaluations of a run.

    Attributes:
        rows: to evaluate on, all or some, spread evenly.
        tokens: of these rows.
        whole: number and tokens of all rows that there are.
        steps: after which it is evaluated, rising; 0 before the first one.
        closing: evaluations after the last step.
        share: tokens of all evaluations together, of those of training.
        least: the limit would leave fewer rows than tell something.
    """

    rows: Dataset[Any]
    tokens: int
    whole: tuple[int, int]
    steps: list[int]
    closing: int
    share: float
    least: bool

    @property
    def times(self) -> int:
        """How many evaluations there are."""
        return len(self.steps) + self.closing

    def left(self, step: int) -> int:
        """How many evaluations are still to come when the training of a step has just ended."""
        return sum(one >= step for one in self.steps if one) + self.closing

    def seconds_left(self, step: int, last: float | None, tokens_per_second: float) -> float:
        """What they will take.

        Args:
            step: whose training has just ended.
            last: seconds of the last evaluation; None before the first.
            tokens_per_second: of training.
        """
        each = self.tokens / max(tokens_per_second, 1e-9) * TIME_SHARE if last is None else last
        return each * self.left(step)

    def explain(self) -> str:
        """A line on what is evaluated."""
        rows, tokens = self.whole
        chosen = len(self.rows)  # type: ignore[arg-type]
        times = "once" if self.times == 1 else f"{self.times:,} times"
        cost = f"together {self.share:.0%} of the tokens that training reads"
        named = counted(rows, "row")
        if chosen == rows:
            return f"evaluation: {times}, on {named} of {tokens:,} tokens, {cost}"
        which = f"{chosen:,} of {named}, spread evenly, {self.tokens:,} of {tokens:,} tokens"
        why = " (fewer would tell too little)" if self.least else ""
        return f"evaluation: {times}, on {which}, {cost}{why}; --max_eval_share 0 evaluates on all rows"


def plan_evaluations(
    valid: Dataset[Any], lengths: list[int], valid_lengths: list[int], rows: int, training: TrainArguments
) -> EvaluationPlan:
    """Choose the rows to evaluate on, such that evaluations cost no more than a share of training.

    The choice follows from the data and the settings alone, so that a run that is gone on with has the same rows.

    Args:
        valid: all rows that there are.
        lengths: tokens of rows to train on, of all or of as many as tell their mean.
        valid_lengths: tokens of each row of `valid`.
        rows: to train on.
        training: `max_eval_share`, 0 for no limit; steps, epochs, and when to evaluate.
    """
    a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    batches = math.ceil(rows / (training.per_device_train_batch_size * training.world_size))
    an_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    mean = sum(lengths) / max(1, len(lengths))
    if training.max_steps > 0:
        last, trained = training.max_steps, training.max_steps * min(a_step, rows) * mean
    else:
        last = max(1, math.ceil(training.num_train_epochs * an_epoch))
        trained = training.num_train_epochs * rows * mean
    steps, closing = _times(training, last, an_epoch)
    times = len(steps) + closing
    tokens = sum(valid_lengths)
    affordable = training.max_eval_share * trained / max(1, times)
    most = max(affordable, LEAST_TOKENS)
    chosen = valid
    if training.max_eval_share and tokens > most:
        count = max(LEAST_ROWS, int(most / (tokens / len(valid_lengths))))
        if count < len(valid_lengths):
            indices = [number * len(valid_lengths) // count for number in range(count)]
            chosen, tokens = Subset(valid, indices), sum(valid_lengths[index] for index in indices)
    whole = len(valid_lengths), sum(valid_lengths)
    least = tokens > affordable + max(valid_lengths)
    return EvaluationPlan(chosen, tokens, whole, steps, closing, tokens * times / max(trained, 1.0), least)


def _times(training: TrainArguments, last: int, an_epoch: int) -> tuple[list[int], int]:
    """Steps after which it is evaluated, and how many evaluations follow the last one."""
    distance = 0
    if training.eval_strategy == IntervalStrategy.EPOCH:
        distance = an_epoch
    elif training.eval_strategy == IntervalStrategy.STEPS:
        given = float(training.eval_steps or training.logging_steps)
        distance = max(1, math.ceil(given * last) if given < 1 else int(given))
    steps = [0] if training.eval_on_start else []
    if distance:
        steps += [*range(distance, last, distance), last]
    return steps, int(training.load_best_model_at_end or not distance)
