"""The stock Trainer with evaluation in flat memory, throughput and memory in its logs.

The loss stays the model's own: with `num_items_in_batch` from the Trainer it is the token mean over the whole optimizer
step, micro-batches and ranks together.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy
import torch
from torch import nn
from transformers import EvalPrediction, Trainer

from novelgpt.scoring.perplexity import row_sums, summarise


class NovelTrainer(Trainer):
    """Trainer whose metrics are token-weighted and whose evaluation keeps three numbers a row."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, compute_metrics=_metrics)
        self._tokens = 0
        self._since = time.perf_counter()
        self._outside = 0.0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The stock step; counts the tokens read."""
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """[rows, 3] sums in place of logits, so that memory does not grow with the evaluation set."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = row_sums(model(**inputs).logits, labels)
        return None, sums, sums[:, 1]

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """The stock evaluation; its time does not count in the training throughput."""
        begin = time.perf_counter()
        try:
            return super().evaluate(*arguments, **keywords)
        finally:
            self._outside += time.perf_counter() - begin

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second (all ranks, since the last log) and peak memory in GB (of this rank)."""
        if "loss" in logs:
            tokens = torch.tensor(self._tokens, device=self.args.device)
            total = int(self.accelerator.reduce(tokens, "sum"))
            now = time.perf_counter()
            logs["tokens_per_second"] = round(total / max(1e-9, now - self._since - self._outside), 1)
            logs["memory_gb"] = round(_peak_memory() / 1e9, 3)
            self._tokens, self._since, self._outside = 0, now, 0.0
        super().log(logs, start_time)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    return summarise(numpy.asarray(prediction.predictions))


def _peak_memory() -> int:
    """Bytes: of the device where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
