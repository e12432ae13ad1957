"""The peak memory of a training run, known before its weights are loaded.

One micro-step of the actual model, adapter and loss is simulated, and the live bytes at each moment are counted, which
covers any architecture, dtype and attention. What such a step does not hold (optimizer states, ZeRO's shares, the
process itself) is computed.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import psutil
import torch
from transformers.training_args import OptimizerNames

from novelgpt.budget.live_bytes import Heap
from novelgpt.budget.simulated_model import SimulatedModel
from novelgpt.settings.arguments import TrainArguments

# Bytes of optimizer states per trained weight; others have those of AdamW's two fp32 moments.
OPTIMIZER_BYTES = (
    dict.fromkeys(("sgd", "adafactor", "lomo", "adalomo", "galore_adafactor", "galore_adafactor_layerwise"), 0)
    | dict.fromkeys(("adamw_torch_4bit", "lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1)
    | dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2)
    | dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3)
    | dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "adagrad"), 4)
    | dict.fromkeys(("schedule_free_sgd",), 4)
    | dict.fromkeys(("ademamix", "paged_ademamix_32bit", "grokadamw"), 12)
)
ADAMW_BYTES = 8
# What a training process holds beside its tensors. On CPUs: libraries that are loaded late (Trainer, TensorBoard,
# plots) and workspaces of matrix products. On CUDA: workspaces of cuBLAS.
LATER_BYTES = {"cpu": 90_000_000, "cuda": 40_000_000}
# glibc returns blocks from this size on to the system; its threshold grows up to here by itself.
GLIBC_LIMIT = 32 * 2**20
# DeepSpeed's default for the weights that ZeRO-3 gathers at once (stage3_max_live_parameters).
LIVE_PARAMETERS = 1e9


@dataclass
class MemoryEstimate:
    """Bytes at the peak of a run, by purpose.

    Attributes:
        process: on CPUs, what the process holds without the model. On GPUs none: neither this estimate nor the
            measurement counts the context.
        weights: of the model, adapters included.
        copies: of weights in a second dtype: casts of autocast, fp32 masters of DeepSpeed.
        gradients: of trained weights, with the buckets of several processes.
        optimizer: its states.
        activations: those kept for the backward pass, and those being computed.
        loss: logits and the other buffers of the head.
        kept: on CPUs, freed blocks that the allocator keeps, and holes among them.
        evaluation: what an evaluation takes beyond the peak of a training step.
        other: libraries and their workspaces.
    """

    process: int = 0
    weights: int = 0
    copies: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    kept: int = 0
    evaluation: int = 0
    other: int = 0

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: int(vars(self)[field.name]) for field in fields(self)}

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())


def estimate_memory(model: SimulatedModel, training: TrainArguments, tokens: int, packed: bool) -> MemoryEstimate:
    """Estimate what a run of `model` takes on each device.

    Args:
        model: what trains.
        training: batch sizes, checkpointing, dtype, optimizer, DeepSpeed, processes.
        tokens: of the longest row.
        packed: rows are packs of documents.
    """
    autocast = None if training.deepspeed else compute_dtype(training)
    checkpointing = checkpointing_options(training) if training.activation_checkpointing else None
    count = sum(numel for numel, _ in model.trained)
    each = optimizer_bytes(training)
    estimate = MemoryEstimate(optimizer=count * each, other=LATER_BYTES[model.device.type])
    step = model.step(
        training.per_device_train_batch_size, tokens, packed, autocast, checkpointing=checkpointing,
        accumulated=training.gradient_accumulation_steps > 1 and not training.deepspeed,
    )  # fmt: skip
    evaluation = model.step(training.per_device_eval_batch_size, tokens, packed, autocast, evaluation=True)
    heap: Heap | None = None  # on GPUs, whose measurement counts live bytes
    if model.device.type == "cpu":  # where glibc puts small blocks, by its own rules
        limit = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", GLIBC_LIMIT))
        used = sum(2 * (numel * each // 2) for numel, _ in model.trained if numel * each // 2 < limit)
        heap = Heap(limit, used=used, high=used)
    # DeepSpeed moves gradients to its buckets and shares; elsewhere they stay.
    parts = step.peak(frozenset({"gradients"} if training.deepspeed else ()), heap)
    phases = [parts, evaluation.peak(heap=heap)]
    if training.deepspeed:
        size = sum(held for _, held in model.trained) // max(1, count)
        _shard(phases, estimate, count, size, training, model.device)
    elif training.world_size > 1:
        parts["gradients"] += sum(held for _, held in model.trained)  # the buckets of DDP
    for name, held in parts.items():
        setattr(estimate, name, getattr(estimate, name) + held)
    if model.device.type == "cpu":
        estimate.process = psutil.Process().memory_info().rss  # now that what the simulation needed is loaded
    estimate.evaluation = max(0, phases[1].total() - parts.total())
    return estimate


def optimizer_bytes(training: TrainArguments) -> int:
    """Return the bytes of optimizer states per trained weight."""
    return OPTIMIZER_BYTES.get(OptimizerNames(training.optim).value, ADAMW_BYTES)


def compute_dtype(training: TrainArguments) -> torch.dtype | None:
    """Return the 16-bit dtype that a run computes in, None for fp32."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


def checkpointing_options(training: TrainArguments) -> dict[str, Any]:
    """Return what the Trainer passes to `activation_checkpointing_enable`."""
    given = training.activation_checkpointing_kwargs
    options: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    own: dict[str, Any] = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    return own | {"activation_checkpointing_kwargs": options or None}


def _shard(
    phases: list[Counter[str]],
    estimate: MemoryEstimate,
    count: int,
    size: int,
    training: TrainArguments,
    device: torch.device,
) -> None:
    """Reduce what one device would hold to its share under ZeRO.

    Stage 1 divides the optimizer states with their fp32 weights by the number of processes, stage 2 the gradients as
    well, stage 3 the weights, too. Before a step, stages 1 and 2 copy their share of the gradients to fp32.

    Args:
        phases: bytes at the peak of a step, without gradients, and of an evaluation.
        estimate: its optimizer is shared.
        count: trained weights.
        size: bytes of one, and of its gradient.
        training: the DeepSpeed settings and the number of processes.
        device: of the run, which offloading relieves unless it is a CPU.
    """
    parts = phases[0]
    zero: dict[str, Any] = training.hf_deepspeed_config.config.get("zero_optimization", {})
    stage, shares = int(zero.get("stage", 0)), training.world_size
    away = {
        name
        for name in ("optimizer", "param")
        if device.type != "cpu" and zero.get(f"offload_{name}", {}).get("device", "none") != "none"
    }
    bucket = zero.get("reduce_bucket_size", 5e8)
    bucket = 0 if bucket == "auto" else min(int(bucket), count) * size  # auto: one matrix, next to nothing
    divided = shares if stage else 1
    masters = 0 if "optimizer" in away else 4 * count // divided
    estimate.optimizer = 0 if "optimizer" in away else estimate.optimizer // divided
    gradients = count * size // (shares if stage >= 2 else 1)
    parts["gradients"] = (0 if "optimizer" in away and stage >= 2 else gradients) + bucket * (2 if stage == 2 else 1)
    if stage == 3:
        live = int(float(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))) * size
        for phase in phases:
            kept = 0 if "param" in away else phase["weights"] // shares
            phase["weights"] = kept + min(phase["weights"], live)
    for phase in phases:
        phase["copies"] += masters
    at_step = parts["weights"] + parts["copies"] + parts["gradients"] + masters
    parts["gradients"] += max(0, at_step - parts.total())
