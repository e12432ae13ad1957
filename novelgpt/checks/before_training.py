"""All that is checked once the rows are read, and what is to be checked on the model during training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.budget.disk import check_disk
from novelgpt.budget.memory_plan import plan_memory
from novelgpt.checks.first_step import check_gradients, first_rows, probe_first_rows
from novelgpt.checks.longest_batch import rows_to_try, try_batch
from novelgpt.checks.stop_check import check_stops
from novelgpt.settings.runs import TrainingRun
from novelgpt.training.plan import Probe, TrainingPlan


def check(
    run: TrainingRun,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    dtype: torch.dtype = torch.float32,
    qlora: bool = False,
    prepare: Callable[[PreTrainedModel], nn.Module] | None = None,
) -> TrainingPlan:
    """Estimate memory and disk of a run before its weights are loaded, and plan the checks of its training.

    Args:
        run: micro-batch and checkpointing are settled where the user left them open.
        tokenizer: as it is saved with each checkpoint.
        train: the rows.
        dtype: of the base's weights.
        qlora: the base is held in 4 bits.
        prepare: what the run makes of the base, such as attaching an adapter.

    Raises:
        UserError: memory or disk are too small, on all processes.
    """
    training = run.training
    memory = plan_memory(run, train, dtype, qlora, prepare)
    check_disk(run, memory, train, tokenizer)
    probes = []
    if training.guards:
        probes.append(Probe(partial(first_rows, len(train)), probe_first_rows))  # type: ignore[arg-type]
    if training.preflight:
        probes.append(Probe(partial(rows_to_try, memory.lengths), try_batch))
    # Where weights may be left out of a step, tensors without a gradient tell nothing.
    watched = training.guards and not training.ddp_find_unused_parameters
    return TrainingPlan(
        memory, probes, check_gradients if watched else nullcontext, partial(check_stops, tokenizer, train)
    )
