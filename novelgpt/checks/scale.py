"""How the tokens of a training from random weights compare with its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from novelgpt.budget.memory_plan import MemoryPlan
from novelgpt.model.loading import read_config
from novelgpt.model.random_base import WeightCounts, count_weights
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.terminal import counted

# Hoffmann et al. 2022 (arXiv:2203.15556, table 3): of the weights of a model, all of them.
OPTIMAL_TOKENS_PER_WEIGHT = 20


def run_tokens(tokens: int, rows: int, training: TrainArguments) -> int:
    """Number of tokens that a run trains on, repeated ones counted each time.

    Args:
        tokens: of all rows together.
        rows: in an epoch.
        training: with the micro-batch settled.
    """
    if training.max_steps <= 0:
        return round(tokens * training.num_train_epochs)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return round(training.max_steps * per_step * tokens / rows)


def describe_scale(counts: WeightCounts, tokens: int) -> str:
    """One line: the weights, the run's tokens per weight, and the tokens of a compute-optimal run.

    Args:
        counts: of the model.
        tokens: of the run.
    """
    optimal = OPTIMAL_TOKENS_PER_WEIGHT * counts.total
    return (
        f"scale: {_millions(counts.total)} weights, {_millions(counts.inner)} without embeddings; this run trains on "
        f"{counted(tokens, 'token')}, {tokens / counts.total:.2g} per weight; a compute-optimal one would take "
        f"{_millions(optimal)} tokens, {OPTIMAL_TOKENS_PER_WEIGHT} per weight (arXiv:2203.15556)"
    )


def scale_of(plan: MemoryPlan) -> str:
    """`describe_scale` of a run that is planned."""
    config = read_config(plan.run.model)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        counts = count_weights(architecture(config))
    lengths = plan.lengths
    return describe_scale(counts, run_tokens(int(lengths.sum()), len(lengths), plan.training))


def _millions(number: float) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} M"
