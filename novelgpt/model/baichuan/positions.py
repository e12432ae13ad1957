"""Position encodings of Baichuan: rotary in the 7B models, ALiBi in the 13B ones."""

from __future__ import annotations

import math

import torch

from novelgpt.model.baichuan.configuration import BaichuanConfig


def rotary_factors(config: BaichuanConfig, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions (arXiv:2104.09864), [rows, 1, tokens, head_dim / 2] fp32.

    Recomputed each time: a buffer beside the weights could be left empty by loading on the meta device.
    """
    size = config.hidden_size // config.num_attention_heads
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=position_ids.device) / size
    angles = position_ids[:, None, :, None].float() * (1.0 / config.rope_theta**steps)
    return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate [rows, heads, tokens, head_dim] in fp32: dimension i together with dimension i + head_dim / 2."""
    first, second = states.float().chunk(2, -1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)
    return turned.to(states.dtype)


def alibi_slopes(heads: int) -> torch.Tensor:
    """How much the score of a key falls per token of distance: [heads] fp32 (arXiv:2108.12409).

    A power of two p of heads has 2^(-8 (i + 1) / p); of the heads beyond the largest such p, the j-th has
    2^(-4 (2 j + 1) / p).
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (index + 1) / power) for index in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * index + 1) / power) for index in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_mask(slopes: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[rows, heads, tokens, keys] fp32, added to scores: slope * (j - i) for visible keys.

    Args:
        slopes: [heads].
        places: [tokens] of the queries; keys are counted from 0.
        mask: [rows, 1, tokens, keys], whether a key is visible, or what is added to its score.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    distances = torch.arange(mask.shape[-1], device=places.device) - places[:, None]
    return slopes[:, None, None] * distances + mask.float()
