"""Prefill of a batch's cache, a few prompts at a time, before `generate` continues with all of them."""

from __future__ import annotations

import inspect

import torch
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from novelgpt.inference.preallocated_cache import PreallocatedLayer, preallocated_cache
from novelgpt.model.lora import base_model

# Padded tokens per prefill step: the activations of a layer stay in the caches of a CPU, and saturate a GPU.
CPU_STEP_TOKENS = 1024
GPU_STEP_TOKENS = 16384


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
    alike = len(layers) == len(cache.layers) and _takes_positions(model)
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


def _takes_positions(model: PreTrainedModel) -> bool:
    """Whether positions follow the mask. Otherwise they would differ in the narrower rows of a step."""
    return "position_ids" in inspect.signature(base_model(model).forward).parameters


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
    config = GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1, pad_token_id=pad, use_cache=True)
    model.generate(**batch, generation_config=config, past_key_values=cache)  # type: ignore[operator]
    assert cache is not None
    return [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]


def _widened(states: torch.Tensor | None, length: int) -> torch.Tensor:
    """States without the last token, [rows, heads, length, head_dim], padded on the left with zeros."""
    assert states is not None
    return functional.pad(states[:, :, :-1], (0, 0, length + 1 - states.shape[2], 0))
