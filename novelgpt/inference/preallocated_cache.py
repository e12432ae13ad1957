"""A KV cache in preallocated buffers, which appends new tokens in place, and its prefill a few prompts at a time.

transformers' own layers concatenate old and new states, which copies all of them at every step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from novelgpt.model.lora import base_model

# A full buffer grows by this fraction, so each token is copied about 8 times in total.
GROWTH = 1 / 8
MIN_GROWTH_TOKENS = 32
# Padded tokens per prefill step: the activations of a layer stay in the caches of a CPU, and saturate a GPU.
CPU_STEP_TOKENS = 1024
GPU_STEP_TOKENS = 16384
# Settings of sampling where there is none, transformers' defaults: where they are not given, it takes those of the
# model's folder, and warns that they have no effect.
GREEDY: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


def preallocated_cache(model: PreTrainedModel, max_tokens: int) -> DynamicCache | None:
    """Create an empty cache for `generate(past_key_values=…)`, which holds the same states as transformers' own.

    Layers with full attention are preallocated; those of other types (sliding windows, linear attention) are
    transformers' own.

    Args:
        model: one that generates; adapters too.
        max_tokens: max length of the sequences.

    Returns:
        None if the model needs its own cache: no layer has full attention, or the model or its settings require a cache
        of another type.
    """
    chosen = model.generation_config.cache_implementation if model.generation_config is not None else None
    if chosen is not None or model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():  # type: ignore[operator]
        return None
    cache = DynamicCache(config=model.config)
    plain = [type(layer) is DynamicLayer for layer in cache.layers]  # subclasses keep further states
    if not any(plain):
        return None
    cache.layers = [
        PreallocatedLayer(max_tokens) if grows else layer for grows, layer in zip(plain, cache.layers, strict=True)
    ]
    return cache


class PreallocatedLayer(DynamicLayer):
    """A layer whose `keys` and `values` are the filled parts of larger buffers.

    A buffer has room for an eighth more than its filled part, at least 32 tokens, and not for more than `max_tokens`
    unless more are written. While it grows, the old and the new one coexist, as in `torch.cat`: one buffer of one layer
    at a time.

    `update` returns views. Tokens that are written after a crop appear in views that were returned before it;
    `generate` keeps none.

    Args:
        max_tokens: max length of the sequences.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.key_buffer: torch.Tensor | None = None
        self.value_buffer: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new states.

        Args:
            key_states: [rows, heads, new tokens, head_dim].
            value_states: as key_states; head_dim may differ.
            args: for other types of layers.
            kwargs: for other types of layers.

        Returns:
            Keys and values of all tokens, [rows, heads, tokens, head_dim]; not contiguous.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        self.key_buffer = self._with_room(self.key_buffer, self.keys, begin, key_states)
        self.key_buffer[:, :, begin:end] = key_states
        self.keys = self.key_buffer[:, :, :end]
        self.value_buffer = self._with_room(self.value_buffer, self.values, begin, value_states)
        self.value_buffer[:, :, begin:end] = value_states
        self.values = self.value_buffer[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows of the complete buffers: otherwise the next token would copy all states again."""
        keys, values, length = self.key_buffer, self.value_buffer, self.get_seq_length()
        if keys is None or values is None or not (_is_prefix(keys, self.keys) and _is_prefix(values, self.values)):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            return
        self.key_buffer = keys.index_select(0, beam_idx.to(keys.device))
        self.keys = self.key_buffer[:, :, :length]
        self.value_buffer = values.index_select(0, beam_idx.to(values.device))
        self.values = self.value_buffer[:, :, :length]

    def reset(self) -> None:
        """Drop all tokens and free the buffers."""
        super().reset()
        self.key_buffer = self.value_buffer = None

    def _with_room(
        self, buffer: torch.Tensor | None, filled: torch.Tensor, length: int, new: torch.Tensor
    ) -> torch.Tensor:
        """The buffer if it starts with the filled part and has room for the new tokens; else a larger one."""
        needed = length + new.shape[-2]
        if buffer is not None and _is_prefix(buffer, filled) and needed <= buffer.shape[-2]:
            return buffer
        extra = max(MIN_GROWTH_TOKENS, int(needed * GROWTH))
        capacity = max(needed, min(needed + extra, self.max_tokens))
        larger = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
        if length:
            larger[:, :, :length] = filled
        return larger


def _is_prefix(buffer: torch.Tensor, filled: torch.Tensor | None) -> bool:
    """Whether the filled part is still the start of the buffer: not after rows were selected, repeated or dropped."""
    return (
        filled is not None
        and filled.data_ptr() == buffer.data_ptr()
        and len(filled) == len(buffer)
        and filled.stride() == buffer.stride()
    )


def left_padded(prompts: list[list[int]], pad: int | None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, [prompts, tokens of the longest].

    Args:
        prompts: token ids, at least one each.
        pad: token that pads shorter prompts; None for the first token of each prompt.
    """
    longest = max(map(len, prompts))
    filled = [[prompt[0] if pad is None else pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    return {
        "input_ids": torch.tensor(filled),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def prefill(model: PreTrainedModel, prompts: list[list[int]], pad: int, cache: DynamicCache, beams: int) -> None:
    """Fill the cache with all tokens of the prompts but the last ones, from which `generate` continues.

    This takes less time and memory than one step for all prompts: activations stay in the processor's caches, prompts
    of similar length need little padding, and beams share the prefill of their prompt. The cache stays empty if it
    gains nothing (one step fits all prompts) or is impossible (layers that do not keep every token).

    Args:
        model: the one that generates.
        prompts: token ids, at least one each.
        pad: token that pads shorter prompts.
        cache: an empty one, of `preallocated_cache`.
        beams: rows per prompt.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
    steps = _steps(list(map(len, prompts)), CPU_STEP_TOKENS if model.device.type == "cpu" else GPU_STEP_TOKENS)
    length = max(map(len, prompts)) - 1
    # Positions must follow the mask, or they would differ in the narrower rows of a step.
    takes_positions = "position_ids" in inspect.signature(base_model(model).forward).parameters
    alike = len(layers) == len(cache.layers) and takes_positions
    if not alike or not length or (len(steps) == 1 and beams == 1):
        return
    read = [_prefill_step(model, prompts[step], pad) for step in steps]
    for number, layer in enumerate(layers):
        parts = [layers_of_step[number] for layers_of_step in read]
        keys = torch.cat([_widened(part.keys, length) for part in parts])
        values = torch.cat([_widened(part.values, length) for part in parts])
        for part in parts:
            part.reset()
        layer.update(keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0))


def _steps(lengths: list[int], max_tokens: int) -> list[slice]:
    """Slices of neighbours with at most `max_tokens` padded tokens, or a single prompt."""
    steps, begin, longest = [], 0, 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if number > begin and longest * (number + 1 - begin) > max_tokens:
            steps.append(slice(begin, number))
            begin, longest = number, length
    return [*steps, slice(begin, len(lengths))]


def _prefill_step(model: PreTrainedModel, prompts: list[list[int]], pad: int) -> list[PreallocatedLayer]:
    """Compute keys and values of these prompts, padded on the left."""
    batch = {name: tensor.to(model.device) for name, tensor in left_padded(prompts, pad).items()}
    cache = preallocated_cache(model, batch["input_ids"].shape[1])
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=pad, use_cache=True, **GREEDY
    )  # fmt: skip
    model.generate(**batch, generation_config=config, past_key_values=cache)  # type: ignore[operator]
    assert cache is not None
    return [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]


def _widened(states: torch.Tensor | None, length: int) -> torch.Tensor:
    """States without the last token, [rows, heads, length, head_dim], padded on the left with zeros."""
    assert states is not None
    return functional.pad(states[:, :, :-1], (0, 0, length + 1 - states.shape[2], 0))
