"""Tokens per second, and the share of the machine's peak FLOP/s that training turns into model work."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from novelgpt.settings.hardware import peak_process_memory

# Sizes of the square products timed for the ceiling: large enough to run near the peak, small enough to be quick.
CEILING_SIZE = {"cpu": 1024, "cuda": 8192}
CEILING_RUNS = 8
# On CPUs, which may multiply a number format in plain loops, sizes grow from the first one while the runs of the next
# size take at most so many seconds.
FIRST_CPU_SIZE = 128
CEILING_SECONDS = 0.5
# A product is undisturbed if its threads computed for this share of its time; otherwise other processes had the cores.
UNDISTURBED = 0.85
# Measurements of the ceiling per run; repeated where products were disturbed, or slower than training.
MAX_MEASUREMENTS = 4


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some matrix products, measured now; on a CPU in about a second in any number format."""
    return _fastest_products(device, dtype)[0]


def _fastest_products(device: torch.device, dtype: torch.dtype) -> tuple[float, bool]:
    """FLOP/s of the fastest product, and whether it was undisturbed, as far as that is known."""
    largest = CEILING_SIZE.get(device.type, CEILING_SIZE["cuda"])
    size = min(FIRST_CPU_SIZE, largest) if device.type == "cpu" else largest
    best = (0.0, False)
    while True:
        seconds, undisturbed = _fastest_product(size, device, dtype)
        best = max(best, (2.0 * size**3 / seconds, undisturbed))
        size *= 2
        # A product of twice the size takes eight times as long.
        if size > largest or 8 * seconds * CEILING_RUNS > CEILING_SECONDS:
            return best


def _fastest_product(size: int, device: torch.device, dtype: torch.dtype) -> tuple[float, bool]:
    """Seconds of the fastest of a few products of two square matrices, and whether it was undisturbed."""
    generator = torch.Generator(device)  # its own: the random state of training does not change
    left, right = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator).unbind()
    times = []
    for _ in range(CEILING_RUNS):
        start, computed = time.perf_counter(), time.process_time()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, computed = time.perf_counter() - start, time.process_time() - computed
        # Whether others use a GPU is not known.
        undisturbed = device.type != "cpu" or computed >= UNDISTURBED * torch.get_num_threads() * seconds
        times.append((seconds, undisturbed))
    return min(times)


class StepCost:
    """FLOPs of training steps, counted as useful work: recomputation for checkpointing does not count.

    A weight costs 2 FLOPs per token in the forward pass, 2 for the gradient of its input, and 2 for its own where it is
    trained. The head counts for trained tokens only, experts of a mixture for the tokens routed to them. Attention
    costs 6 L² times a layer's width for a document of L tokens: half of the 12 L² of all pairs, as it is causal.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        self.per_token = self.per_trained_token = 0
        chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        for module in model.modules():
            experts = vars(module).get("num_experts")
            if experts and chosen:
                stacks = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
                each = sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in stacks)
                self.per_token += each * chosen // experts
            if not isinstance(module, nn.Linear):
                continue
            # in_features and out_features, as quantised and sharded weights have other shapes.
            cost = module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)
            if module is head:
                self.per_trained_token += cost
            else:
                self.per_token += cost
        config = model.config
        width = config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads * (getattr(config, "head_dim", None) or width)
        self.per_pair = 6 * config.num_hidden_layers * heads

    def flops(self, tokens: float, trained: float, pairs: float) -> float:
        """FLOPs of a step, from its tokens, trained tokens, and the sum of its squared document lengths."""
        return self.per_token * tokens + self.per_trained_token * trained + self.per_pair * pairs


class Ceiling:
    """The peak FLOP/s of a device, measured when training starts, and again where that was not the peak.

    It is unknown while all products were disturbed by other processes, and while training is faster than they were:
    then no share of it is reported. A busy machine may become quiet, so that a run measures again, a few times.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        # A CPU without instructions for a format has its best products in fp32.
        formats = {dtype, torch.float32} if device.type == "cpu" else {dtype}
        self._measure = lambda: max(_fastest_products(device, number_format) for number_format in formats)
        self.flops, self.undisturbed = self._measure()
        self.measured = 1
        self.reached = 0.0  # by training

    @property
    def known(self) -> bool:
        """Whether the products were undisturbed, and never slower than training."""
        return self.undisturbed and self.reached <= self.flops

    def share(self, flops: float) -> float | None:
        """The FLOP/s that training reached as a share of the ceiling, in [0, 1]; None where that is unknown."""
        self.reached = max(self.reached, flops)
        if not self.known and self.measured < MAX_MEASUREMENTS:
            self.flops, self.undisturbed = max((self.flops, self.undisturbed), self._measure())
            self.measured += 1
        return flops / self.flops if self.known else None


class Throughput:
    """Counts the tokens of batches, and reports speeds since the last reading."""

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.cost = StepCost(model)
        self.device = device
        self.ceiling = Ceiling(device, dtype)
        self.started = self.since = time.perf_counter()
        self.outside = 0.0
        self._reset()

    def count(self, inputs: dict[str, Any]) -> None:
        """Add a micro-batch of the collator. Nothing is read from the device."""
        labels = inputs["labels"]
        boundaries, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
        if boundaries is not None:
            lengths = boundaries.diff()
            self.tokens += labels.numel()
        else:
            lengths = torch.full_like(labels[:, 0], labels.shape[1]) if mask is None else mask.sum(1)
            self.tokens += lengths.sum()
        self.pairs += lengths.double().square().sum()
        self.trained += (labels[:, 1:] >= 0).sum()

    def read(self, total: Any, processes: int) -> dict[str, float]:
        """Speeds since the last reading, of all processes, and peak memory of this one.

        Args:
            total: sums a tensor over processes.
            processes: their number.

        Returns:
            {"tokens_per_second" (without padding), "trained_tokens_per_second", "utilisation" (share of the
            device's ceiling, at most 1; where that is known), "memory_gb" (highest so far), "seconds" (since
            training started)}.
        """
        tokens, trained, pairs = total(torch.stack([self.tokens, self.trained, self.pairs])).tolist()
        now = time.perf_counter()
        passed = max(1e-9, now - self.since - self.outside)
        self._reset()
        share = self.ceiling.share(self.cost.flops(tokens, trained, pairs) / passed / processes)
        self.since, self.outside = time.perf_counter(), 0.0
        return {
            "tokens_per_second": round(tokens / passed, 1),
            "trained_tokens_per_second": round(trained / passed, 1),
            **({} if share is None else {"utilisation": round(share, 4)}),
            "memory_gb": round(peak_memory(self.device) / 1e9, 3),
            "seconds": round(now - self.started, 3),
        }

    def _reset(self) -> None:
        self.tokens, self.trained, self.pairs = torch.zeros(3, dtype=torch.float64, device=self.device).unbind()


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU if that is the device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_process_memory()
