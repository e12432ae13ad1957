"""The peak memory of a training run, known before its weights are loaded.

One micro-step of the very model, adapter and loss is simulated, and the bytes that live at each moment are counted:
that covers any architecture, number format and attention. What such a step does not hold (optimizer states, the shares
of several processes, the process itself) is reckoned.
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

# Bytes of optimizer states for a trained weight; AdamW's two fp32 moments where the optimizer is not named here.
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
# What a process comes to hold beside its tensors once it trains. On CPUs: libraries that are loaded late (Trainer,
# TensorBoard, plots) and work space of matrix products. On CUDA: work space of cuBLAS.
LATER_BYTES = {"cpu": 90_000_000, "cuda": 40_000_000}
# glibc serves blocks from this size on from the system and gives them back; its limit grows up to here by itself.
GLIBC_LIMIT = 32 * 2**20
# DeepSpeed's default for weights that ZeRO-3 keeps whole at once (stage3_max_live_parameters).
LIVE_PARAMETERS = 1e9


@dataclass
class MemoryEstimate:
    """Bytes at the highest moment of a run, by what they are for.

    Attributes:
        process: on CPUs, what the process holds without the model. On GPUs nothing: neither this estimate nor what is
            measured counts the context.
        weights: of the model, adapters included.
        copies: of weights in a second number format: casts of autocast, fp32 masters of DeepSpeed.
        gradients: of trained weights, with the buckets of several processes.
        optimizer: its states.
        activations: what is kept for the backward pass, and what is being computed.
        loss: logits and the other buffers of the head.
        kept: on CPUs, blocks that were freed and that the allocator keeps, and holes among them.
        evaluation: what the evaluation takes beyond the highest training step.
        other: libraries and their work space.
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


def estimate_memory(model: SimulatedModel, training: TrainArguments, tokens: int, borders: bool) -> MemoryEstimate:
    """What a run of `model` takes on each device.

    Args:
        model: what trains.
        training: batch sizes, checkpointing, number format, optimizer, DeepSpeed, processes.
        tokens: of the longest row.
        borders: rows are packs of documents.
    """
    autocast = None if training.deepspeed else compute_dtype(training)
    checkpointing = checkpointing_options(training) if training.activation_checkpointing else None
    count = sum(numel for numel, _ in model.trained)
    each = optimizer_bytes(training)
    estimate = MemoryEstimate(optimizer=count * each, other=LATER_BYTES[model.device.type])
    step = model.step(
        training.per_device_train_batch_size, tokens, borders, autocast, checkpointing=checkpointing,
        accumulated=training.gradient_accumulation_steps > 1 and not training.deepspeed,
    )  # fmt: skip
    evaluation = model.step(training.per_device_eval_batch_size, tokens, borders, autocast, evaluation=True)
    heap = _heap(model.device, [numel * each // 2 for numel, _ in model.trained for _ in range(2)])
    # Under DeepSpeed, gradients leave for their buckets and shares; elsewhere they stay.
    parts = step.peak(frozenset({"gradients"} if training.deepspeed else ()), heap)
    phases = [parts, evaluation.peak(heap=heap)]
    if training.deepspeed:
        size = sum(held for _, held in model.trained) // max(1, count)
        _share(phases, estimate, count, size, training, model.device)
    elif training.world_size > 1:
        parts["gradients"] += sum(held for _, held in model.trained)  # the buckets of DDP
    for name, held in parts.items():
        setattr(estimate, name, getattr(estimate, name) + held)
    if model.device.type == "cpu":
        estimate.process = psutil.Process().memory_info().rss  # now that what the simulation needed is loaded
    estimate.evaluation = max(0, phases[1].total() - parts.total())
    return estimate


def _heap(device: torch.device, optimizer_states: list[int]) -> Heap | None:
    """Where glibc puts small blocks on CPUs, by its own rules; None on GPUs, whose measure counts live bytes.

    Args:
        device: of the run.
        optimizer_states: bytes of each state.
    """
    if device.type != "cpu":
        return None
    limit = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", GLIBC_LIMIT))
    used = sum(size for size in optimizer_states if size < limit)
    return Heap(limit, used=used, high=used)


def optimizer_bytes(training: TrainArguments) -> int:
    """Of the optimizer's states, for one trained weight."""
    return OPTIMIZER_BYTES.get(OptimizerNames(training.optim).value, ADAMW_BYTES)


def compute_dtype(training: TrainArguments) -> torch.dtype | None:
    """The 16-bit number format that a run computes in, None for fp32."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


def checkpointing_options(training: TrainArguments) -> dict[str, Any]:
    """What the Trainer hands to `activation_checkpointing_enable`."""
    given = training.activation_checkpointing_kwargs
    options: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    own: dict[str, Any] = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    return own | {"activation_checkpointing_kwargs": options or None}


def _share(
    phases: list[Counter[str]],
    estimate: MemoryEstimate,
    count: int,
    size: int,
    training: TrainArguments,
    device: torch.device,
) -> None:
    """Turn what one device would hold into its share under ZeRO.

    Each stage divides one more of the optimizer states with their fp32 weights, gradients, and weights, by the number
    of processes. Before a step, stages 1 and 2 copy their share of the gradients to fp32.

    Args:
        phases: bytes at the highest moment of a step, without gradients, and of an evaluation.
        estimate: its optimizer is shared.
        count: trained weights.
        size: bytes of one, and of its gradient.
        training: the DeepSpeed settings and the number of processes.
        device: of the run, which offloading relieves if it is no CPU.
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
