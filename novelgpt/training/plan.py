"""What a run is checked by on its model: before the first step, in its first backward pass, and after the last step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from novelgpt.budget.memory_plan import MemoryPlan
from novelgpt.settings.arguments import TrainArguments
from novelgpt.training.run_folder import RunFolder

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context that the training's forward passes run under."""


@dataclass(frozen=True)
class Probe:
    """A check of the model on one micro-batch before the first step.

    Attributes:
        rows: indices of the training rows that this process takes; with none, the check is left out.
        run: (bare model, batch on its device, training arguments, autocast); raises UserError on all processes.
    """

    rows: Callable[[TrainArguments], list[int]]
    run: Callable[[nn.Module, dict[str, Any], TrainArguments, Autocast], None]


@dataclass(frozen=True)
class TrainingPlan:
    """A run that is ready to train: its folder, memory estimate, and checks, which all processes call.

    Attributes:
        folder: of the run.
        memory: estimate, and the run with everything settled.
        probes: run once the model is set up for training, before anything is evaluated or trained.
        watch_gradients: of the bare model, the context of the first backward pass; raises UserError at its end.
        after_training: (bare model, training arguments, accelerator) -> figures to log with the weights that are saved.
    """

    folder: RunFolder
    memory: MemoryPlan
    probes: Sequence[Probe]
    watch_gradients: Callable[[nn.Module], AbstractContextManager[Any]]
    after_training: Callable[[PreTrainedModel, TrainArguments, Accelerator], dict[str, float]]
