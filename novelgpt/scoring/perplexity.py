"""Loss, perplexity and token accuracy in flat memory: three numbers a row, never [rows, tokens, vocabulary]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch

from novelgpt.text.conversation import IGNORE_INDEX


def row_sums(token_losses: torch.Tensor, token_hits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of negative log likelihoods (nats), trained tokens and tokens predicted right, of each row.

    Args:
        token_losses: [trained tokens], row by row.
        token_hits: [trained tokens] bool.
        labels: [rows, tokens], not shifted, -100 where nothing is to be predicted.

    Returns:
        [rows, 3], float64.
    """
    rows = (labels[:, 1:] != IGNORE_INDEX).nonzero()[:, 0]
    values = torch.stack([token_losses.double(), torch.ones_like(token_losses).double(), token_hits.double()], dim=1)
    return torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device).index_add_(0, rows, values)


def summarise(sums: numpy.ndarray, characters: int | None = None) -> dict[str, float]:
    """Means over all rows.

    Args:
        sums: [rows, 3], as `row_sums` gives them.
        characters: of the text that the trained tokens stand for.

    Returns:
        {"loss" (nats per token), "perplexity", "token_accuracy", "tokens" (trained ones of all rows)} and, where
        characters are given, "bits_per_character": all nats, those of end tokens too, / ln 2 / characters. Unlike the
        others, it compares models of different tokenizers.
    """
    nll, tokens, right = (float(total) for total in sums.sum(axis=0))
    loss = nll / max(tokens, 1.0)
    means = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": right / max(tokens, 1.0),
        "tokens": int(tokens),
    }
    if characters is not None:
        means["bits_per_character"] = nll / math.log(2.0) / max(characters, 1)
    return means


def loss_by_source(sums: numpy.ndarray, sources: numpy.ndarray, names: Sequence[str]) -> dict[str, float]:
    """{"NAME_loss": nats per token} of the rows of each source that has any.

    Args:
        sums: [rows, 3], as `row_sums` gives them.
        sources: [rows] the source of each row.
        names: of the sources, unlike each other.
    """
    nll, tokens = (numpy.bincount(sources, sums[:, column], len(names)) for column in (0, 1))
    return {f"{names[source]}_loss": float(nll[source] / max(tokens[source], 1.0)) for source in numpy.unique(sources)}
