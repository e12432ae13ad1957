"""The best checkpoint of a run: of those that are there, the one whose evaluation was best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from novelgpt.settings.process import is_first_process
from novelgpt.training.checkpoints.folders import step_of
from novelgpt.training.checkpoints.weights import StoredWeights


def best_checkpoint(folders: Iterable[Path], history: list[dict[str, Any]], training: TrainingArguments) -> Path | None:
    """The checkpoint whose step has the best finite figure, the earlier of two that are equal; None where none has one.

    An evaluation between two checkpoints does not count, as its weights are not there any more.

    Args:
        folders: of checkpoints.
        history: log entries with "step", those of evaluations with the figure.
        training: `metric_for_best_model` names the figure, `greater_is_better` says what is best.
    """
    name = f"eval_{str(training.metric_for_best_model).removeprefix('eval_')}"
    sign = -1.0 if training.greater_is_better else 1.0
    figures = {entry["step"]: entry[name] for entry in history if name in entry}
    ranked = [
        (sign * figures[step_of(folder)], step_of(folder), folder)
        for folder in folders
        if math.isfinite(figures.get(step_of(folder), math.nan))
    ]
    return min(ranked)[2] if ranked else None


def load_into_parts(folder: Path, model: nn.Module) -> None:
    """Give a model whose weights lie in parts (ZeRO-3) the trained ones of a checkpoint. Every process calls this."""
    from deepspeed.runtime.zero import GatheredParameters

    with ExitStack() as stack:
        stored = StoredWeights(folder, stack)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                with GatheredParameters([weight], modifier_rank=0), torch.no_grad():
                    if is_first_process():
                        weight.copy_(stored.tensor(name).view(weight.shape))


def without_places(state: TrainerState) -> TrainerState:
    """The state for a file that leaves this machine: the best checkpoint by its name, which lies beside the file."""
    best = state.best_model_checkpoint
    return state if best is None else dataclasses.replace(state, best_model_checkpoint=Path(best).name)
