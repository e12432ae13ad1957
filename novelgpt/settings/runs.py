"""The arguments of each pipeline, as groups."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from novelgpt.settings.arguments import (
    ConversationArguments,
    CorpusArguments,
    GenerationArguments,
    InferenceModelArguments,
    LoraArguments,
    ModelArguments,
    PredictArguments,
    TrainArguments,
    option,
)
from novelgpt.settings.random_weights import PretrainModelArguments, RandomWeights


@dataclass
class LoraTrainArguments(TrainArguments):
    """Adapters start at zero and take a higher learning rate."""

    learning_rate: float = option(1e-4, "Peak learning rate of the schedule.")


@dataclass
class PretrainRun:
    """Pretraining, continued or from random weights: raw text, all weights."""

    pipeline: ClassVar[str] = "pretrain"
    model: PretrainModelArguments
    data: CorpusArguments
    training: TrainArguments

    def __post_init__(self) -> None:
        """Let the run's seed decide random weights, too.

        Raises:
            UserError: as settle_random_weights.
        """
        self.model.settle_random_weights(self.training.seed)


@dataclass
class FinetuneRun:
    """Full-parameter SFT: conversations, all weights."""

    pipeline: ClassVar[str] = "finetune"
    model: ModelArguments
    data: ConversationArguments
    training: TrainArguments


@dataclass
class LoraRun:
    """LoRA SFT: conversations, adapter weights."""

    pipeline: ClassVar[str] = "finetune_lora"
    model: ModelArguments
    data: ConversationArguments
    lora: LoraArguments
    training: LoraTrainArguments


@dataclass
class PredictRun:
    """Generation and scores."""

    pipeline: ClassVar[str] = "predict"
    model: InferenceModelArguments
    data: PredictArguments
    generation: GenerationArguments


TrainingRun = PretrainRun | FinetuneRun | LoraRun

Run = TypeVar("Run", bound=TrainingRun)


def random_weights_of(run: TrainingRun) -> RandomWeights | None:
    """The random weights that a run starts from; None where it starts from a model's."""
    return run.model.random_weights if isinstance(run, PretrainRun) else None


def with_training(run: Run, **changes: Any) -> Run:
    """Return a copy of a run with some of its training arguments changed; nothing that follows from them is derived."""
    training: Any = copy.copy(run.training)
    vars(training).update(changes)
    return replace(run, training=training)
