"""The largest micro-batch that fits, for the same rows per optimizer step."""

from __future__ import annotations

import bisect
import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from novelgpt.budget.memory import checkpointing_options, compute_dtype, optimizer_bytes
from novelgpt.budget.simulated_model import changes_logits, worst_batch
from novelgpt.model.lora import base_model
from novelgpt.model.loss import attach_chunked_loss
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import all_processes_values
from novelgpt.settings.runs import TrainingRun, with_training
from novelgpt.settings.terminal import counted

# Of the device's memory: what a tried micro-batch may take, the states of the optimizer included.
TRIED_SHARE = 0.92


def micro_batches(training: TrainArguments) -> list[int]:
    """Return the divisors of the rows per device and optimizer step, ascending."""
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return [size for size in range(1, rows + 1) if rows % size == 0]


def with_rows(training: TrainArguments, rows: int) -> TrainArguments:
    """Return a copy that takes micro-batches of `rows`, and as many rows per optimizer step as before."""
    changed = copy.copy(training)
    total = training.per_device_train_batch_size * training.gradient_accumulation_steps
    changed.per_device_train_batch_size, changed.gradient_accumulation_steps = rows, max(1, total // rows)
    return changed


def settle_rows(run: TrainingRun, rows: int, **changes: Any) -> TrainingRun:
    """Return the run with a micro-batch of `rows`, as many rows per step as before, and other training arguments.

    DeepSpeed's settings, of which transformers keeps one object per process, are made to agree.
    """
    training = with_rows(run.training, rows)
    steps = training.gradient_accumulation_steps
    if training.deepspeed and rows != run.training.per_device_train_batch_size:
        settings = training.hf_deepspeed_config.config
        settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"] = rows, steps
        training.deepspeed_plugin.gradient_accumulation_steps = steps  # type: ignore[attr-defined]
    return with_training(run, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, **changes)


def largest_fitting(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """Return the last of ascending `sizes` that fits, by bisection; None where the first does not."""
    fitting = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[fitting - 1] if fitting else None


def no_row_fits(need: float, has: float, tokens: int) -> UserError:
    """Build the error for a device on which not even one row fits.

    Args:
        need: bytes that one row takes; infinity where unknown.
        has: bytes of the device.
        tokens: of the row.
    """
    taken = "more" if need == float("inf") else f"{need / 1e9:.1f} GB"
    return UserError(
        f"--auto_batch: one row of {counted(tokens, 'token')} takes {taken}, and the device has {has / 1e9:.1f} GB",
        "lower --max_length, set --activation_checkpointing, train with LoRA, or take several devices with ZERO=3",
    )


def try_micro_batches(
    model: nn.Module,
    training: TrainArguments,
    tokens: int,
    packed: bool,
    capacity: int,
    peak_of: Callable[[Callable[[], None]], int],
) -> int:
    """Find the largest micro-batch that fits by running steps on the longest rows, from one row upwards.

    Gradients, random states, the training mode and the forward of `model` are restored.

    Args:
        model: on its device, as the Trainer gets it.
        training: rows per step, number format, checkpointing.
        tokens: of the longest row.
        packed: rows are packs of documents.
        capacity: bytes of the device that this process may take.
        peak_of: calls its argument and returns the peak memory in bytes, what was held before included; or raises
            torch.OutOfMemoryError.

    Raises:
        UserError: not even one row fits.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    later = optimizer_bytes(training) * sum(parameter.numel() for parameter in trained)
    if training.world_size > 1:
        later += sum(parameter.nbytes for parameter in trained)
    sizes = micro_batches(training)
    fitting = 0
    with _restored(model, training):
        for rows in sizes:
            batch = worst_batch(rows, tokens, packed, next(model.parameters()).device)
            try:
                taken = peak_of(partial(_steps, model, training, batch, once=rows == sizes[-1]))
            except torch.OutOfMemoryError:
                break
            finally:
                model.zero_grad()
            if taken + later > capacity * TRIED_SHARE:
                break
            fitting = rows
    fitting = min(all_processes_values(fitting))
    if not fitting:
        raise no_row_fits(float("inf"), capacity, tokens)
    return fitting


def cuda_peak(run: Callable[[], None]) -> int:
    """Return the peak of reserved bytes while `run` runs; counters and cache are reset afterwards."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _steps(model: nn.Module, training: TrainArguments, batch: dict[str, Any], once: bool) -> None:
    """Run forward and backward of a micro-batch; twice where gradients accumulate, as the second one holds more."""
    dtype = compute_dtype(training)
    device = batch["input_ids"].device.type
    for _ in range(1 if once else 2):
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
        loss.backward()


@contextlib.contextmanager
def _restored(model: nn.Module, training: TrainArguments) -> Iterator[None]:
    """Set up `model` as the Trainer does, and restore it: what a trial leaves behind would change the run."""
    base = base_model(model)
    head = base.get_output_embeddings()
    assert isinstance(head, nn.Module)
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad()  # to None, or gradients would accumulate
    forwards = [(module, vars(module).get("forward")) for module in (base, head)]
    mode = model.training
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else []
    if training.activation_checkpointing:
        base.activation_checkpointing_enable(**checkpointing_options(training))
    attach_chunked_loss(base, not changes_logits(base.config))
    model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(mode)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, forward in forwards:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
