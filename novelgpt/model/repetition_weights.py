"""The loss of pseudo-repetitions (DITTO, Xu et al. 2022, arXiv:2206.02369), as weights of a cross-entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch

from novelgpt.text.conversation import IGNORE_INDEX

# A repeated token should be this much as likely as its copy before was.
PENALTY = 0.5
# Of 1 - |p - PENALTY * q|, which is 0 where a repetition is certain that was impossible before: its loss is infinite.
LEAST_REST = 1e-6


class RepetitionWeights(NamedTuple):
    """Weights of tokens, and what the weighted cross-entropy lacks to be the loss itself.

    Attributes:
        weights: [rows, tokens] fp32, of predicting the label at the same place; 1 where nothing is repeated.
        difference: [] the sum over repeated tokens of their loss less that of their weighted cross-entropy, in nats.
    """

    weights: torch.Tensor
    difference: torch.Tensor


def repetition_weights(token_losses: torch.Tensor, labels: torch.Tensor, periods: torch.Tensor) -> RepetitionWeights:
    """Weights with which cross-entropy has the gradient of -log(1 - |p - PENALTY * q|) at repeated tokens.

    p is the probability of a token, q that of its last copy, a constant. With c = -log p, the derivative of the loss is
    -sign(p - PENALTY * q) * p / (1 - |p - PENALTY * q|) times that of c: a weight that a pass without gradients gives.

    Args:
        token_losses: [trained tokens] fp32, c of each label that is not ignored, row by row.
        labels: [rows, tokens], of which the first of each row is predicted by nothing.
        periods: [rows, tokens], how far before a token its last copy is, which has a label; 0 where there is none.
    """
    costs = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    trained = labels != IGNORE_INDEX
    trained[:, 0] = False
    costs[trained] = token_losses.float()
    rows, places = (periods > 0).nonzero(as_tuple=True)
    probability, before = (torch.exp(-costs[rows, at]) for at in (places, places - periods[rows, places]))
    excess = probability - PENALTY * before
    rest = (1 - excess.abs()).clamp(min=LEAST_REST)
    weights = torch.ones_like(costs)
    weights[rows, places] = -excess.sign() * probability / rest
    difference = -rest.log() - weights[rows, places] * costs[rows, places]
    return RepetitionWeights(weights, difference.sum())
