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


@dataclass
class LoraTrainArguments(TrainArguments):
    """Adapters start at zero and take a higher learning rate."""

    learning_rate: float = option(1e-4, "Peak learning rate of the schedule.")


@dataclass
class PretrainRun:
    """Continued pretraining: raw text, all weights."""

    pipeline: ClassVar[str] = "pretrain"
    model: ModelArguments
    data: CorpusArguments
    training: TrainArguments


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


def with_training(run: Run, **changes: Any) -> Run:
    """Return a copy of a run with some of its training arguments changed; nothing that follows from them is derived."""
    training: Any = copy.copy(run.training)
    vars(training).update(changes)
    return replace(run, training=training)
