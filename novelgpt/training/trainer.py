"""The stock Trainer with the chunked loss, evaluation in flat memory, guards, and throughput and memory in its logs.

With `num_items_in_batch` from the Trainer, the loss is the token mean over the whole optimizer step, micro-batches and
ranks together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    EvalPrediction,
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from novelgpt.scoring.perplexity import row_sums, summarise
from novelgpt.settings.arguments import TrainArguments
from novelgpt.training.checkpoints.trainer import CheckpointTrainer
from novelgpt.training.forward_checks import head_is_last
from novelgpt.training.guards import GradientWatch, check_forward, check_vocabulary
from novelgpt.training.loss import attach_chunked_loss
from novelgpt.training.sample_predictions import SamplePredictions
from novelgpt.training.throughput import Throughput


class NovelTrainer(CheckpointTrainer):
    """Trainer whose metrics are token-weighted and whose evaluation keeps three numbers a row."""

    def __init__(
        self, *, samples: SamplePredictions | None = None, characters: int | None = None, **arguments: Any
    ) -> None:
        """Evaluations also answer `samples`, and divide by the `characters` of the rows for bits per character."""
        super().__init__(**arguments, compute_metrics=partial(_metrics, characters=characters))
        self.samples = samples
        base = base_model(self.model)
        attach_chunked_loss(base, head_is_last(base))
        self.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch, whatever the architecture
        self.throughput: Throughput | None = None  # from the first step on
        self._first_step = 0
        # Where weights may be left out of a step, tensors without a gradient tell nothing.
        guards = cast(TrainArguments, self.args).guards
        self._watch_gradients = guards and not self.args.ddp_find_unused_parameters
        if guards:
            self.add_callback(_BeforeTraining(self.check_first_rows))

    def check_first_rows(self) -> None:
        """Try the model on a micro-batch of the first training rows, each process on its own.

        Raises:
            UserError: what `novelgpt.training.guards` finds.
        """
        dataset: Any = self.train_dataset
        rows = self.args.per_device_train_batch_size
        first = self.args.process_index * rows
        chosen = [dataset[index % len(dataset)] for index in range(first, first + rows)]
        batch = self._prepare_inputs(self.data_collator(chosen))
        base = base_model(self.model)
        check_vocabulary(base, batch)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else base.dtype
        check_forward(cast(nn.Module, self.model), batch, dtype, self.accelerator.autocast)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The stock step; counts what it trains on, and the first one has to reach every trained tensor."""
        if self.throughput is None:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            self._first_step = self.state.global_step
            self.throughput = Throughput(base_model(self.model), self.args.device, dtype)
        self.throughput.count(inputs)
        if not self._watch_gradients:
            return super().training_step(model, inputs, num_items_in_batch)
        self._watch_gradients = False
        watch = GradientWatch(cast(nn.Module, self.model))
        loss = super().training_step(model, inputs, num_items_in_batch)
        watch.check()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """[rows, 3] sums in place of logits, so that memory does not grow with the evaluation set."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        sums = row_sums(outputs.token_losses, outputs.token_hits, inputs["labels"])
        return None, sums, sums[:, 1]

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """The stock evaluation; its time does not count in the training throughput."""
        begin = time.perf_counter()
        try:
            return super().evaluate(*arguments, **keywords)
        finally:
            if self.throughput is not None:
                self.throughput.outside += time.perf_counter() - begin

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Beside the weights of an adapter, its end tokens; full weights bring theirs."""
        super().save_model(output_dir, _internal_call)
        ends = base_model(self.model).generation_config
        if isinstance(self.model, PeftModel) and self.args.should_save and isinstance(ends, GenerationConfig):
            ends.save_pretrained(str(output_dir or self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speeds, peak memory and the time left to the entries of training."""
        if "train_loss" in logs:  # the stock one is of the steps since the run was last started
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if "loss" in logs and self.throughput is not None:
            logs |= self.throughput.read(lambda sums: self.accelerator.reduce(sums, "sum"), self.args.world_size)
            steps = self.state.global_step - self._first_step
            logs["seconds_left"] = round(logs["seconds"] / steps * (self.state.max_steps - self.state.global_step), 1)
        if "eval_loss" in logs and self.samples is not None:
            # Here and not in the evaluation loop: its rows a second are then those of the loss.
            model = cast(PreTrainedModel, self.model)  # or the same with an adapter
            logs |= self.samples.scores(model, self.accelerator, self.state.global_step)
        super().log(logs, start_time)


class _BeforeTraining(TrainerCallback):
    """Calls `check` once the model is set up for training, before anything is evaluated or trained."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check."""
        self.check()


def base_model(model: nn.Module | None) -> PreTrainedModel:
    """The model itself, within an adapter if there is one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def _metrics(prediction: EvalPrediction, characters: int | None) -> dict[str, float]:
    return summarise(numpy.asarray(prediction.predictions), characters)
