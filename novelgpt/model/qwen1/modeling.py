"""Qwen v1 as the Qwen2 that it is: attention with biases on query, key and value, no shared key heads, SwiGLU.

Two things differ. The file's `intermediate_size` counts both halves of the feed-forward layer, and the tensors have
names of their own, with query, key and value in one. `ORIGINAL_NAMES` tells transformers how to read and write those,
so that original checkpoints load unchanged and saved ones keep the original names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, apply_renamings
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from novelgpt.model.qwen1.configuration import QWenConfig

RENAMED = {
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.h\.": "model.layers.",
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    # The names do not show which of the two is activated: it is w2.
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
FUSED = "attn.c_attn"
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ORIGINAL_NAMES: list[WeightConverter | WeightRenaming] = [
    *(WeightRenaming(original, name) for original, name in RENAMED.items()),
    *(
        WeightConverter(f"{FUSED}.{kind}", [f"{part}.{kind}" for part in PARTS], operations=[Chunk(dim=0)])
        for kind in ("weight", "bias")
    ),
]


class QWenMLP(Qwen2MLP):
    """down(up(x) * silu(gate(x))), half as wide as the configuration's `intermediate_size`."""

    def __init__(self, config: QWenConfig) -> None:
        halved = copy.copy(config)
        halved.intermediate_size = config.intermediate_size // 2
        super().__init__(halved)


class QWenModel(Qwen2Model):
    """The layers of Qwen v1, without the head."""

    config_class = QWenConfig

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        for layer in self.layers:
            layer.mlp = QWenMLP(config)
        self.post_init()


class QWenLMHeadModel(Qwen2ForCausalLM):
    """Qwen v1 with its language head; named as in the original checkpoints, by which other tools find their class.

    Neither dynamic NTK nor LogN is applied, in any mode: see `QWenConfig`.
    """

    config_class = QWenConfig

    def __init__(self, config: QWenConfig) -> None:
        # The constructor of the parent would build the layers of Qwen2 first, unnecessarily.
        super(Qwen2ForCausalLM, self).__init__(config)  # type: ignore[arg-type]
        self.model = QWenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Tensors under their names here or under the original ones, which saved checkpoints have.

        The Trainer resumes through this, and would otherwise continue from the untouched base with only a warning.
        """
        return super().load_state_dict(with_module_names(state_dict), strict=strict, assign=assign)


def with_module_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original names turned into those of the modules, query, key and value apart; other names stay."""
    # New instances, as each records whether it was used, which decides under which names a model is saved.
    renamings = [WeightRenaming(original, name) for original, name in RENAMED.items()]
    renamed: dict[str, torch.Tensor] = {}
    for original, tensor in state_dict.items():
        name = apply_renamings(original, renamings)
        if FUSED in name:
            chunks = tensor.chunk(len(PARTS))
            renamed |= {name.replace(FUSED, part): chunk for part, chunk in zip(PARTS, chunks, strict=True)}
        else:
            renamed[name] = tensor
    return renamed


def as_qwen2(model: PreTrainedModel) -> Qwen2ForCausalLM:
    """Convert to the equivalent Qwen2, which transformers and vLLM load without code for Qwen v1.

    The two share their tensors.
    """
    assert isinstance(model, QWenLMHeadModel)
    config = model.config
    settings = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.head_dim,  # type: ignore[call-arg]  # read, though no field
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=config.rope_parameters,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        dtype=model.dtype,
    )
    with torch.device("meta"):
        converted = Qwen2ForCausalLM._from_config(settings, attn_implementation=config._attn_implementation)
    converted.load_state_dict(model.state_dict(), assign=True)
    # Not a parameter, and left empty by the meta device.
    converted.model.rotary_emb = model.model.rotary_emb
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)
