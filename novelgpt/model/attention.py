"""Attention that packed rows cannot leak through: one function, registered with transformers as "packed".

Rows carry the borders of their documents (`cu_seq_lens_q`, the name transformers uses). On CUDA, torch's own
variable-length kernel takes them as they are; elsewhere, and for ALiBi, each document is attended to on its own.
Without borders (padded batches, generation) it is transformers' SDPA with transformers' masks.
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
# What the variable-length kernel takes.
KERNEL_TYPES = (torch.bfloat16, torch.float16)
KERNEL_HEAD_DIM = 256


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
        attention_mask: for batches without borders.
        dropout: share of attention weights dropped.
        scaling: of the products; default 1/sqrt(head_dim).
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        cu_seq_lens_q: [documents + 1] int32, where documents start in the rows laid end to end; the last is the number
            of all tokens.
        max_length_q: tokens of the longest document.
        alibi_slopes: [heads], for models with linear biases (arXiv:2108.12409).

    Returns:
        [rows, tokens, heads, head_dim], and no weights.

    Raises:
        ValueError: an option that changes attention and is not known here (soft caps, attention sinks).
    """
    strange = ("softcap", "s_aux") if cu_seq_lens_q is None else ("softcap", "s_aux", "position_bias")
    unknown = [name for name in strange if options.get(name) is not None]
    if unknown:
        raise ValueError(f"packed attention does not know {', '.join(unknown)}")
    if cu_seq_lens_q is None:
        if alibi_slopes is not None:
            options["position_bias"] = _alibi(alibi_slopes, query.shape[2], key.shape[2], query.dtype)[None]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    rows, _, tokens, _ = query.shape
    query, key, value = (_end_to_end(states) for states in (query, key, value))
    kernel = query.is_cuda and query.dtype in KERNEL_TYPES and query.shape[-1] <= KERNEL_HEAD_DIM
    if kernel and alibi_slopes is None and not dropout:
        longest = rows * tokens if max_length_q is None else int(max_length_q)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        borders = cu_seq_lens_q.to(torch.int32)
        output = varlen.varlen_attn(
            query, key, value, borders, borders, longest, longest, scale=scaling, window_size=window,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return output.view(rows, tokens, *output.shape[1:]), None  # type: ignore[union-attr]
    dtype, device = query.dtype, query.device.type
    if device == "cpu":
        # torch's bf16 kernel for CPUs is no faster here, and keeps some megabytes for each length it has seen.
        query, key, value = query.float(), key.float(), value.float()
    starts = cu_seq_lens_q.tolist()
    outputs = []
    with torch.autocast(device, enabled=False):
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            queries, keys, values = (states[begin:end].transpose(0, 1)[None] for states in (query, key, value))
            mask = _document_mask(end - begin, sliding_window, alibi_slopes, query)
            output = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
            outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs).to(dtype).view(rows, tokens, *query.shape[1:]), None


def _end_to_end(states: torch.Tensor) -> torch.Tensor:
    """[rows, heads, tokens, head_dim] -> [rows * tokens, heads, head_dim]."""
    return states.transpose(1, 2).flatten(0, 1)


def _document_mask(
    tokens: int, sliding_window: int | None, alibi_slopes: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor | None:
    """None where plain causal attention will do, else what to add to the scores or which pairs to keep."""
    windowed = sliding_window is not None and tokens > sliding_window
    if not windowed and alibi_slopes is None:
        return None
    kept = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if windowed:
        kept = kept.triu(1 - int(sliding_window))  # type: ignore[arg-type]
    if alibi_slopes is None:
        return kept
    return _alibi(alibi_slopes, tokens, tokens, query.dtype).masked_fill(~kept, float("-inf"))


def _alibi(slopes: torch.Tensor, queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """[heads, queries, keys]: the distance times each head's slope; the last query stands at the last key."""
    position = torch.arange(keys, device=slopes.device)
    distance = position[None, :] - position[keys - queries :, None]
    return (slopes[:, None, None].float() * distance).to(dtype)


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """No mask for packed rows, whose borders `packed_attention` gets; transformers' SDPA mask for all others.

    transformers calls with `allow_is_causal_skip=False` when it sees positions restart within a row.
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
