"""The longest micro-batch of a run, tried once before the first step.

Weights, gradients, optimizer states, modes and random states do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from novelgpt.budget.memory import checkpointing_options, optimizer_bytes
from novelgpt.settings.arguments import TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import raise_on_all_ranks
from novelgpt.settings.terminal import counted, gigabytes
from novelgpt.training.plan import Autocast
from novelgpt.training.sample_predictions import preserve_mode_and_rng

REMEDY = "--per_device_train_batch_size 1, --activation_checkpointing, a shorter --max_length, or --auto_batch"


def rows_to_try(lengths: list[int], training: TrainArguments) -> list[int]:
    """Indices of the longest rows, as many as a micro-batch has.

    On CPUs one row, as it takes seconds and no GPU memory is at stake; and none where even that would take longer than
    a step.

    Args:
        lengths: tokens of each row.
        training: batch sizes and device.
    """
    longest = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    rows = training.per_device_train_batch_size
    if training.device.type != "cpu":
        return longest[:rows]
    step = sum(lengths) / len(lengths) * rows * training.gradient_accumulation_steps
    return longest[:1] if lengths[longest[0]] <= step else []


@raise_on_all_ranks()
def try_batch(model: nn.Module, batch: dict[str, Any], training: TrainArguments, autocast: Autocast) -> None:
    """Run forward and backward in training mode, and a pass as in evaluation.

    Gradients are computed apart from those of the weights (`torch.autograd.grad`), so that no hook of data parallelism
    or of ZeRO sees them. Under DeepSpeed, which reduces gradients as they are computed, only that of the first trained
    weight is kept; the path to it leads through all others.

    Args:
        model: the bare one, set up for training; it returns a loss for labelled rows.
        batch: rows of this process, on its device.
        training: optimizer, checkpointing and DeepSpeed.
        autocast: the context of each pass.

    Raises:
        UserError: the batch does not fit, on all processes.
    """
    cuda = batch["input_ids"].is_cuda
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rows, tokens = batch["input_ids"].shape
    what = f"the longest micro-batch, {rows} x {counted(tokens, 'token')}"
    try:
        with preserve_mode_and_rng(model):
            _passes(model, batch, training, autocast)
        if cuda:
            trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            later = 0 if training.deepspeed else optimizer_bytes(training) * trained
            # What other processes hold is neither free nor reserved.
            capacity = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            peak = torch.cuda.max_memory_allocated()
            if peak + later > capacity:
                raise UserError(
                    f"{what}, takes {gigabytes(peak)}, the optimizer another {gigabytes(later)}, and the GPU has "
                    f"{gigabytes(capacity)}",
                    REMEDY,
                )
    except torch.OutOfMemoryError:
        device = batch["input_ids"].device.type
        raise UserError(f"{what}, does not fit into the memory of this {device}", REMEDY) from None
    finally:
        if cuda:
            torch.cuda.empty_cache()


def _passes(model: nn.Module, batch: dict[str, Any], training: TrainArguments, autocast: Autocast) -> None:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with autocast():
        loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
    options = checkpointing_options(training)["activation_checkpointing_kwargs"] or {}
    # Recomputed this way, activations support gradients of the weights only.
    if not (training.activation_checkpointing and options.get("use_reentrant")):
        torch.autograd.grad(loss, trained[:1] if training.deepspeed else trained, allow_unused=True)
    del loss
    model.eval()
    with torch.no_grad(), autocast():
        model(**batch)
