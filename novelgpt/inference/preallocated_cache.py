"""Keys and values of earlier tokens in buffers with room ahead: a new token moves nothing but itself.

transformers' own layers join old and new states in new tensors, and so copy all of them at every step.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# A full buffer is replaced by one with room for this much more, so each token is copied about 8 times in all.
SPARE_SHARE = 1 / 8
LEAST_SPARE_TOKENS = 32


def preallocated_cache(model: PreTrainedModel, most_tokens: int) -> DynamicCache | None:
    """An empty cache for `generate(past_key_values=…)`, with the same states in it as transformers' would have.

    Layers with plain full attention get room; those of other kinds (sliding windows, linear attention) stay what
    transformers makes of them.

    Args:
        model: one that generates; adapters too.
        most_tokens: how long the sequences may become.

    Returns:
        None where the model's own choice has to stay: no layer has plain full attention, or the model or its settings
        demand a cache of another kind.
    """
    chosen = model.generation_config.cache_implementation if model.generation_config is not None else None
    if chosen is not None or model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():  # type: ignore[operator]
        return None
    cache = DynamicCache(config=model.config)
    plain = [type(layer) is DynamicLayer for layer in cache.layers]  # subclasses keep other states besides
    if not any(plain):
        return None
    cache.layers = [
        PreallocatedLayer(most_tokens) if grows else layer for grows, layer in zip(plain, cache.layers, strict=True)
    ]
    return cache


class PreallocatedLayer(DynamicLayer):
    """A layer whose `keys` and `values` are the filled parts of larger buffers.

    A buffer has room for an eighth more than its filled part or for 32 tokens more, and for no more than `most_tokens`
    unless more are written. While one is replaced, the old and the new one exist together, as in `torch.cat`: one
    buffer of one layer at a time.

    What is handed out is a view. Tokens that are written after a crop appear in views that were handed out before it;
    `generate` keeps none.

    Args:
        most_tokens: how long the sequences may become.
    """

    def __init__(self, most_tokens: int) -> None:
        super().__init__()
        self.most_tokens = most_tokens
        self.key_buffer: torch.Tensor | None = None
        self.value_buffer: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states behind the earlier ones.

        Args:
            key_states: [rows, heads, new tokens, size of a head].
            value_states: as key_states; its heads may be of another size.
            args: for other kinds of layers.
            kwargs: for other kinds of layers.

        Returns:
            Keys and values of all tokens, [rows, heads, tokens, size of a head]; rows and heads lie apart in memory.
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
        """Take the states of other rows, room included: else the next token would copy all of them once more."""
        keys, values, length = self.key_buffer, self.value_buffer, self.get_seq_length()
        if keys is None or values is None or not (_begins(keys, self.keys) and _begins(values, self.values)):
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]
            return
        self.key_buffer = keys.index_select(0, beam_idx.to(keys.device))
        self.keys = self.key_buffer[:, :, :length]
        self.value_buffer = values.index_select(0, beam_idx.to(values.device))
        self.values = self.value_buffer[:, :, :length]

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        super().reset()
        self.key_buffer = self.value_buffer = None

    def _with_room(
        self, buffer: torch.Tensor | None, filled: torch.Tensor, length: int, new: torch.Tensor
    ) -> torch.Tensor:
        """The buffer, if it begins with the filled part and has room for the new tokens; else a larger one."""
        needed = length + new.shape[-2]
        if buffer is not None and _begins(buffer, filled) and needed <= buffer.shape[-2]:
            return buffer
        spare = max(LEAST_SPARE_TOKENS, int(needed * SPARE_SHARE))
        capacity = max(needed, min(needed + spare, self.most_tokens))
        larger = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
        if length:
            larger[:, :, :length] = filled
        return larger


def _begins(buffer: torch.Tensor, filled: torch.Tensor | None) -> bool:
    """Whether the filled part is the start of the buffer still: not after rows were chosen, repeated or dropped."""
    return (
        filled is not None
        and filled.data_ptr() == buffer.data_ptr()
        and len(filled) == len(buffer)
        and filled.stride() == buffer.stride()
    )
