"""Prompts into the cache of a batch, a few at a time, before `generate` takes them all together."""

from __future__ import annotations

import inspect

import torch
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from novelgpt.inference.preallocated_cache import PreallocatedLayer, preallocated_cache
from novelgpt.model.lora import base_model

# Padded tokens of the prompts that are read at once. A CPU keeps what so many make of a layer in its own caches; with
# so many a GPU has all its cores at work.
READ_AT_ONCE = 1024
READ_AT_ONCE_BY_GPU = 16384


def left_padded(prompts: list[list[int]], pad: int | None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, [prompts, tokens of the longest].

    Args:
        prompts: token ids, at least one each.
        pad: token that goes before shorter prompts; None for the first of each prompt.
    """
    longest = max(map(len, prompts))
    filled = [[prompt[0] if pad is None else pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    return {
        "input_ids": torch.tensor(filled),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def prefill(model: PreTrainedModel, prompts: list[list[int]], pad: int, cache: DynamicCache, beams: int) -> None:
    """Fill the cache with all tokens of the prompts but the last ones, from where `generate` goes on.

    That takes less time and memory than reading all prompts at once: what is computed stays near the processor,
    neighbours of like length are hardly padded, and the beams of a prompt share it. The cache stays empty where that
    gains nothing (all prompts fit into one piece) or cannot be done (layers that do not keep every token).

    Args:
        model: the one that generates.
        prompts: token ids, at least one each.
        pad: token that goes before shorter prompts.
        cache: an empty one, of `preallocated_cache`.
        beams: rows that each prompt gets.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
    pieces = _pieces(list(map(len, prompts)), READ_AT_ONCE if model.device.type == "cpu" else READ_AT_ONCE_BY_GPU)
    length = max(map(len, prompts)) - 1
    alike = len(layers) == len(cache.layers) and _takes_positions(model)
    if not alike or not length or (len(pieces) == 1 and beams == 1):
        return
    read = [_read_piece(model, prompts[piece], pad) for piece in pieces]
    for number, layer in enumerate(layers):
        parts = [piece[number] for piece in read]
        keys = torch.cat([_widened(part.keys, length) for part in parts])
        values = torch.cat([_widened(part.values, length) for part in parts])
        for part in parts:
            part.reset()
        layer.update(keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0))


def _takes_positions(model: PreTrainedModel) -> bool:
    """Whether tokens stand where the mask says. If not, they would stand elsewhere in the narrower rows of a piece."""
    return "position_ids" in inspect.signature(base_model(model).forward).parameters


def _pieces(lengths: list[int], most_tokens: int) -> list[slice]:
    """Neighbours that have `most_tokens` together at most when padded, or are one alone."""
    pieces, begin, longest = [], 0, 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if number > begin and longest * (number + 1 - begin) > most_tokens:
            pieces.append(slice(begin, number))
            begin, longest = number, length
    return [*pieces, slice(begin, len(lengths))]


def _read_piece(model: PreTrainedModel, prompts: list[list[int]], pad: int) -> list[PreallocatedLayer]:
    """Keys and values of these prompts, padded on the left."""
    batch = {name: tensor.to(model.device) for name, tensor in left_padded(prompts, pad).items()}
    cache = preallocated_cache(model, batch["input_ids"].shape[1])
    config = GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=pad, use_cache=True)
    model.generate(**batch, generation_config=config, past_key_values=cache)  # type: ignore[operator]
    assert cache is not None
    return [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]


def _widened(states: torch.Tensor | None, length: int) -> torch.Tensor:
    """States without those of the last token, [rows, heads, length, size of a head], padded on the left with zeros."""
    assert states is not None
    return functional.pad(states[:, :, :-1], (0, 0, length + 1 - states.shape[2], 0))
