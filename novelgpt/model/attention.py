"""Attention that does not leak between packed documents, registered with transformers as "packed".

Rows carry the boundaries of their documents (`cu_seq_lens_q`, transformers' name). On CUDA, torch's variable-length
kernel takes them directly; elsewhere, each document is attended to separately. Without boundaries (padded batches,
generation) it is transformers' SDPA with transformers' masks. ALiBi biases are folded into queries and keys, so they
need neither a mask nor a kernel that supports them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "packed"
# Supported by the variable-length kernel.
KERNEL_TYPES = (torch.bfloat16, torch.float16)
KERNEL_HEAD_DIM = 256
# Dimensions that ALiBi adds to a head; it uses six, but kernels need multiples of eight.
ALIBI_SIZE = 8
# Positions are split into multiples of this and a remainder, both exact in bf16 up to 65,536 keys.
ALIBI_BLOCK = 256


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents.

    Args:
        module: the attention layer.
        query: [rows, heads, tokens, head_dim]; key and value may have fewer heads, which divide those of the query.
        key: as query.
        value: as query.
        attention_mask: for batches without boundaries.
        dropout: fraction of attention weights dropped.
        scaling: of the products; default 1/sqrt(head_dim).
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        cu_seq_lens_q: [documents + 1] int32, offsets of the documents in the concatenated rows; the last is the total
            number of tokens.
        max_length_q: tokens of the longest document.
        alibi_slopes: [heads], for models with linear biases (arXiv:2108.12409); keys are counted from the first.

    Returns:
        [rows, tokens, heads, head_dim], and None for the attention weights.

    Raises:
        ValueError: an option that changes attention and is not supported (soft caps, attention sinks).
    """
    unsupported = ("softcap", "s_aux") if cu_seq_lens_q is None else ("softcap", "s_aux", "position_bias")
    unknown = [name for name in unsupported if options.get(name) is not None]
    if unknown:
        raise ValueError(f"packed attention does not support {', '.join(unknown)}")
    if alibi_slopes is not None:
        size = query.shape[-1]
        scaling = size**-0.5 if scaling is None else scaling
        query, key, value = with_alibi(query, key, value, alibi_slopes, scaling)
        biased, _ = packed_attention(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window, cu_seq_lens_q, max_length_q,
            **options,
        )  # fmt: skip
        return biased[..., :size], None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    rows, _, tokens, _ = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    kernel = query.is_cuda and query.dtype in KERNEL_TYPES and query.shape[-1] <= KERNEL_HEAD_DIM
    if kernel and not dropout:
        longest = rows * tokens if max_length_q is None else int(max_length_q)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        boundaries = cu_seq_lens_q.to(torch.int32)
        output = varlen.varlen_attn(
            query, key, value, boundaries, boundaries, longest, longest, scale=scaling, window_size=window,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return output.view(rows, tokens, *output.shape[1:]), None  # type: ignore[union-attr]
    dtype, device = query.dtype, query.device.type
    if device == "cpu":
        # torch's bf16 kernel for CPUs is not faster here, and caches some megabytes for each length.
        query, key, value = query.float(), key.float(), value.float()
    starts = cu_seq_lens_q.tolist()
    outputs = []
    with torch.autocast(device, enabled=False):
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            queries, keys, values = (states[begin:end].transpose(0, 1)[None] for states in (query, key, value))
            mask = _document_mask(end - begin, sliding_window, query.device)
            output = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
            outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).to(dtype).view(rows, tokens, *query.shape[1:]), None


def _document_mask(tokens: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The pairs to keep; None if plain causal attention suffices."""
    if sliding_window is None or tokens <= sliding_window:
        return None
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().triu(1 - sliding_window)


def with_alibi(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add ALIBI_SIZE dimensions to each head, which add slope * j to the scaled product of a query and key j.

    This equals slope * (j - i) up to a constant per query, to which softmax is invariant; so it holds at any position
    of the query, as with static caches. Slopes are split into three parts and positions into two that are exact in
    bf16, and kernels accumulate in fp32: in any dtype, scores are accurate to 1e-3 at 4,096 keys (5e-5 on average),
    where biases rounded to bf16 are off by up to 8. The cost is 8 dimensions per head, of 128 in Baichuan-13B; a mask
    of biases would take [heads, tokens, tokens], and time for masked pairs.

    Args:
        query: [rows, heads, queries, head_dim].
        key: [rows, key heads, keys, head_dim].
        value: as key; its added dimensions are zeros.
        slopes: [heads].
        scaling: factor of the products.
    """
    parts = []
    rest = slopes.float() / scaling
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16).float())
        rest = rest - parts[-1]
    places = torch.arange(key.shape[2], device=key.device)
    blocks, within = places // ALIBI_BLOCK, places % ALIBI_BLOCK
    query_part = torch.stack([part * ALIBI_BLOCK for part in parts] + parts, -1)[None, :, None]
    key_part = torch.stack([blocks] * 3 + [within] * 3, -1)[None, None]
    return _append(query, query_part), _append(key, key_part), functional.pad(value, (0, ALIBI_SIZE))


def _append(states: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Append ALIBI_SIZE dimensions: those of `part`, and zeros."""
    part = functional.pad(part.to(states.dtype), (0, ALIBI_SIZE - part.shape[-1]))
    return torch.cat([states, part.expand(*states.shape[:-1], -1)], -1)


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """No mask for packed rows, of which `packed_attention` gets the boundaries; transformers' SDPA mask for others.

    transformers calls with `allow_is_causal_skip=False` when positions restart within a row.
    """
    if attention_mask is None and q_length == kv_length and not allow_is_causal_skip:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
