"""Loss, perplexity and token accuracy in flat memory: three numbers a row, never [rows, tokens, vocabulary]."""

from __future__ import annotations

import math

import numpy
import torch
from torch.nn import functional

from novelgpt.text.conversation import IGNORED


def row_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of negative log likelihoods (nats), trained tokens and tokens predicted right, of each row.

    Args:
        logits: [rows, tokens, vocabulary], any float type; each row is made fp32 on its own.
        labels: [rows, tokens], not shifted, -100 where nothing is to be predicted.

    Returns:
        [rows, 3], float64.
    """
    sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=logits.device)
    for index in range(len(labels)):
        wanted = labels[index, 1:] != IGNORED
        targets = labels[index, 1:][wanted]
        predicted = logits[index, :-1][wanted].float()
        sums[index, 0] = functional.cross_entropy(predicted, targets, reduction="sum").double()
        sums[index, 1] = len(targets)
        sums[index, 2] = (predicted.argmax(-1) == targets).sum()
    return sums


def summarise(sums: numpy.ndarray) -> dict[str, float]:
    """Token means over all rows: {"loss" (nats), "perplexity", "token_accuracy"} of [rows, 3] sums."""
    nll, tokens, right = (float(total) for total in sums.sum(axis=0))
    loss = nll / max(tokens, 1.0)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": right / max(tokens, 1.0)}
