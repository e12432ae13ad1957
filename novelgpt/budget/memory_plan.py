"""Before weights are loaded: estimate a run's memory against the device's, and choose the settings left open."""

from __future__ import annotations

import copy
import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from novelgpt.budget.auto_batch import (
    TRIED_SHARE,
    cuda_peak,
    largest_fitting,
    micro_batches,
    no_row_fits,
    settle_rows,
    try_micro_batches,
    with_rows,
)
from novelgpt.budget.memory import MemoryEstimate, compute_dtype, estimate_memory
from novelgpt.budget.simulated_model import SimulatedModel
from novelgpt.settings.arguments import ConversationArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import first_process_value, is_first_process, raise_on_all_ranks
from novelgpt.settings.runs import TrainingRun
from novelgpt.settings.terminal import counted, say
from novelgpt.text.packing import PackedRows
from novelgpt.text.statistics import row_lengths

# An estimate above this share of the device's memory turns checkpointing on, or warns.
FULL_SHARE = 0.9
# The share that auto_batch may take by the estimate alone, on CPUs and under DeepSpeed.
ESTIMATED_SHARE = 0.8
# Packs of rows that stand for all: all but the last are about as long as allowed.
MAX_PACKS = 200

# Limit and usage of the control group, in version 2 and 1.
CONTROL_GROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)

Prepare = Callable[[PreTrainedModel], nn.Module]


def plan_memory(
    run: TrainingRun,
    train: Dataset[Any],
    dtype: torch.dtype = torch.float32,
    qlora: bool = False,
    prepare: Prepare | None = None,
) -> MemoryPlan:
    """Estimate the peak memory, show it, and choose checkpointing and micro-batch where the user left them open.

    Args:
        run: stays as it is; `run` of the plan has what was settled.
        train: the rows.
        dtype: of the base's weights.
        qlora: the base is held in 4 bits.
        prepare: turns the base into what trains, as by attaching an adapter.

    Raises:
        UserError: with auto_batch, not even one row fits; or `prepare` raises it.
    """
    return_freed_memory()  # of reading the rows: some is kept of each of them, if less than their tokens
    plan = MemoryPlan(run, train)
    outcome: Any = None
    with raise_on_all_ranks():
        if is_first_process():
            # DeepSpeed casts the weights and keeps fp32 ones beside them, where others cast as they compute.
            cast = compute_dtype(run.training) if run.training.deepspeed else None
            outcome = plan.decide(lambda: SimulatedModel(run.model, run.training.device, dtype, prepare, qlora, cast))
    rows, checkpointing, plan.estimate = first_process_value(outcome)
    plan.run = settle_rows(run, rows, activation_checkpointing=checkpointing, gradient_checkpointing=checkpointing)
    return plan


class MemoryPlan:
    """The memory of one run.

    Attributes:
        run: with micro-batch and checkpointing settled.
        estimate: the peak with the run's settings; None where the model cannot be simulated.
        lengths: [rows] tokens of the rows; of the first packs, which stand for the others, where rows are packed.
        tokens: of the longest row.
        capacity: bytes of the device that this process may take.
        model: the simulated one, on the first process; None where the architecture cannot be simulated.
    """

    def __init__(self, run: TrainingRun, train: Dataset[Any]) -> None:
        self.run, self.packed = run, run.data.packing
        self.device = run.training.device
        self.estimate: MemoryEstimate | None = None
        self.lengths = row_lengths(train)[: MAX_PACKS if isinstance(train, PackedRows) else None]
        # Of a stream, longer rows may follow.
        streamed = isinstance(run.data, ConversationArguments) and run.data.streaming
        self.tokens = run.data.max_length if streamed else int(self.lengths.max())
        self.capacity = available_memory(self.device)
        self.model: SimulatedModel | None = None
        # Elsewhere a step that runs out of memory ends the process, or the weights are sharded.
        self._can_try = self.device.type == "cuda" and not self.training.deepspeed

    @property
    def training(self) -> TrainArguments:
        """The training arguments of the run."""
        return self.run.training

    def decide(self, build: Callable[[], SimulatedModel]) -> tuple[int, bool, MemoryEstimate | None]:
        """Rows of a micro-batch, whether to checkpoint, and the estimate for the two, which is shown.

        Raises:
            UserError: what `build` raises, or, with auto_batch on a CPU or under DeepSpeed, not even one row fits.
        """
        chosen = copy.copy(self.training)
        try:
            self.model = build()
            if chosen.auto_batch:
                chosen = with_rows(chosen, 1)
            estimate = self._estimate(chosen)
            if chosen.checkpointing_is_open and estimate.total > FULL_SHARE * self.capacity:
                chosen.activation_checkpointing = True
                estimate = self._estimate(chosen)
            if chosen.auto_batch:
                share = (TRIED_SHARE if self._can_try else ESTIMATED_SHARE) * self.capacity
                rows = largest_fitting(
                    micro_batches(chosen), lambda size: self._estimate(with_rows(chosen, size)).total <= share
                )
                if rows is None and not self._can_try:
                    raise no_row_fits(estimate.total, self.capacity, self.tokens)
                chosen = with_rows(chosen, rows or 1)
                estimate = self._estimate(chosen)
            self._show(chosen, estimate)
        except UserError:
            raise
        except Exception as error:  # of any kind: an architecture that cannot be simulated may train all the same
            reason = (str(error).splitlines() or [""])[0]
            say(f"memory: no estimate for this model ({type(error).__name__}: {reason:.100})")
            return self.training.per_device_train_batch_size, bool(self.training.activation_checkpointing), None
        return chosen.per_device_train_batch_size, bool(chosen.activation_checkpointing), estimate

    def settle_micro_batch(self, model: nn.Module) -> MemoryPlan:
        """Return the plan with the micro-batch that really fits, with auto_batch on a GPU, once the weights are loaded.

        Raises:
            UserError: not even one row fits.
        """
        if not (self.training.auto_batch and self._can_try):
            return self
        model.to(self.device)
        rows = try_micro_batches(model, self.training, self.tokens, self.packed, self.capacity, cuda_peak)
        settled = copy.copy(self)
        settled.run = settle_rows(self.run, rows)
        if is_first_process():
            say(f"auto_batch: {_batch_line(settled.training, self.tokens)}")
            if self.model is not None and self.estimate is not None:
                settled.estimate = self._estimate(settled.training)
        return settled

    def compare(self, measured: int) -> str:
        """Format the measured peak, in bytes, beside the estimate."""
        line = f"memory: {_gigabytes(measured)}"
        return line if self.estimate is None else f"{line}, estimated {_gigabytes(self.estimate.total)}"

    def _estimate(self, training: TrainArguments) -> MemoryEstimate:
        assert self.model is not None
        return estimate_memory(self.model, training, self.tokens, self.packed)

    def _show(self, chosen: TrainArguments, estimate: MemoryEstimate) -> None:
        """Print the estimate, and remedies where it does not fit."""
        dtype = str(compute_dtype(chosen) or torch.float32).removeprefix("torch.")
        kept = "activations recomputed" if chosen.activation_checkpointing else "activations kept"
        parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in estimate.parts().items() if size >= 5e6)
        say(
            f"memory: {_gigabytes(estimate.total)} expected of {_gigabytes(self.capacity)} on this "
            f"{self.device.type}: {_batch_line(chosen, self.tokens)}, {dtype}, {kept}",
            f"  {parts}",
        )
        if estimate.total > FULL_SHARE * self.capacity:
            say(f"  This will probably not fit. {self._remedies(chosen, estimate)}", style="yellow")

    def _remedies(self, chosen: TrainArguments, estimate: MemoryEstimate) -> str:
        """List settings that take less, the cheapest first, with estimates where these are cheap."""
        texts = []
        if not chosen.activation_checkpointing:
            smaller = copy.copy(chosen)
            smaller.activation_checkpointing = True
            texts.append(f"--activation_checkpointing ({_gigabytes(self._estimate(smaller).total)})")
        if chosen.per_device_train_batch_size > 1:
            least = with_rows(chosen, 1)
            texts.append(
                f"--per_device_train_batch_size 1 --gradient_accumulation_steps {least.gradient_accumulation_steps} "
                f"({_gigabytes(self._estimate(least).total)})"
            )
        if self.device.type == "cuda":
            texts.append("several GPUs with ZERO=2 or ZERO=3, or OFFLOAD=1")
        states = estimate.gradients + estimate.optimizer
        if states > estimate.weights:
            texts.append(f"LoRA (about {_gigabytes(estimate.total - states)})")
        else:
            texts.append("--qlora, a shorter --max_length, or a smaller model")
        return "Try " + "; ".join(texts)


def return_freed_memory() -> None:
    """Return what this process has freed to the system; glibc and Arrow keep it for what is allocated later."""
    pyarrow.default_memory_pool().release_unused()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Return the bytes of the device that this process may hold, including what it holds now.

    On CPUs: what the host and the control group leave, divided among the processes on this host.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    left = psutil.virtual_memory().available
    for limit, usage in CONTROL_GROUP_FILES:
        if limit.is_file() and usage.is_file() and limit.read_text().strip().isdigit():
            left = min(left, int(limit.read_text()) - int(usage.read_text()))
    held = psutil.Process().memory_info().rss
    return held + left // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _batch_line(training: TrainArguments, tokens: int) -> str:
    rows, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return (
        f"{rows} x {counted(tokens, 'token')} per micro-batch, "
        f"{counted(rows * steps * tokens * training.world_size, 'token')} per optimizer step"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
