"""A small Baichuan2 (ALiBi, NormHead) and a distribution of rows that never runs out, for the scripts of this folder.

Rows are drawn from a random process whose next token depends on the last two and, at times, repeats the one four places
back: order matters, and no row comes twice, so that an evaluation loss that climbs is no over-fitting.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from novelgpt.model.baichuan import BaichuanConfig, BaichuanForCausalLM

VOCABULARY = 256
CLASSES = 4
SUCCESSORS = 4
LAG = 4
COPIED = 0.3
ROWS, TOKENS = 16, 128
PRETRAINING_STEPS, PRETRAINING_RATE, WARMUP = 900, 2e-3, 30


class Source:
    """Rows of one distribution; two of different seeds for the draws give different rows of it."""

    def __init__(self, seed: int) -> None:
        process = torch.Generator().manual_seed(0)
        shape = (VOCABULARY, CLASSES, SUCCESSORS)
        self.successors = torch.randint(VOCABULARY, shape, generator=process)
        self.weights = torch.tensor([0.55, 0.25, 0.15, 0.05])
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, rows: int = ROWS, tokens: int = TOKENS) -> torch.Tensor:
        """[rows, tokens] token ids."""
        ids = torch.empty(rows, tokens, dtype=torch.long)
        ids[:, :LAG] = torch.randint(VOCABULARY, (rows, LAG), generator=self.generator)
        picks = torch.multinomial(self.weights.expand(rows, -1), tokens, replacement=True, generator=self.generator)
        copied = torch.rand(rows, tokens, generator=self.generator) < COPIED
        for place in range(LAG, tokens):
            following = self.successors[ids[:, place - 1], ids[:, place - 2] % CLASSES, picks[:, place]]
            ids[:, place] = torch.where(copied[:, place], ids[:, place - LAG], following)
        return ids


def small_config(position_embedding: str = "alibi") -> BaichuanConfig:
    """Three layers of width 128 with 8 heads."""
    return BaichuanConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=8,
        model_max_length=4096, position_embedding=position_embedding, norm_head=True,
    )  # fmt: skip


def make_model(position_embedding: str = "alibi") -> BaichuanForCausalLM:
    """The small model with fixed random weights."""
    torch.manual_seed(0)
    return BaichuanForCausalLM._from_config(small_config(position_embedding), attn_implementation="sdpa")


def pretrained_model() -> BaichuanForCausalLM:
    """The small model after training on the distribution: about a minute on 2 CPU cores."""
    model = make_model()

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / PRETRAINING_STEPS))

    train(model, Source(seed=1), PRETRAINING_STEPS, PRETRAINING_RATE, rate)
    return model


def train(
    model: BaichuanForCausalLM,
    source: Source,
    steps: int,
    learning_rate: float,
    schedule: Callable[[int], float] = lambda step: 1.0,
    evaluate_every: int | None = None,
    held_out: torch.Tensor | None = None,
) -> tuple[list[float], list[float]]:
    """Losses of the steps, and of the held-out rows before and after every `evaluate_every` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    losses, evaluations = [], []
    for step in range(steps):
        if evaluate_every and step % evaluate_every == 0:
            evaluations.append(evaluation_loss(model, held_out))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step)
        rows = source.rows()
        model.train()
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if evaluate_every:
        evaluations.append(evaluation_loss(model, held_out))
    return losses, evaluations


@torch.no_grad()
def evaluation_loss(model: BaichuanForCausalLM, rows: torch.Tensor | None) -> float:
    """Nats a token, in evaluation mode."""
    model.eval()
    return float(model(input_ids=rows, labels=rows, use_cache=False).loss)
