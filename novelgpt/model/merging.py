"""An adapter's changes written into the weights of its base, in memory."""

from __future__ import annotations

import warnings
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel


def merge_adapter(adapted: PeftModel) -> PreTrainedModel:
    """The base with the adapter merged into it; uses up `adapted`.

    Where head and embedding share their weights and LoRA changes one of the two, the head gets weights of its own:
    merged into shared weights, a change of the one would change the other as well.
    """
    model = cast(PreTrainedModel, adapted.get_base_model())
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    changed = any(isinstance(part, LoraLayer) for part in (embedding, head))
    if changed and head is not None and head.weight is embedding.weight:
        holder = head.get_base_layer() if isinstance(head, LoraLayer) else head
        holder.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        # That the two are not shared any more is what was wanted here.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        merged: Any = adapted.base_model
        return cast(PreTrainedModel, merged.merge_and_unload())
