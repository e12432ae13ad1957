"""Baichuan and Baichuan2, 7B and 13B, as one model: rotary or ALiBi positions, a plain or a normalised head.

Tensors have the names of the published checkpoints. Training and evaluation share one forward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from novelgpt.model.attention import PACKED_ATTENTION
from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.positions import alibi_mask, alibi_slopes, rotary_factors, rotate

# Lower bound of row norms, so that rows of zeros give logits of zero.
SMALLEST_NORM = 1e-12


class BaichuanAttention(nn.Module):
    """Attention with one projection for queries, keys and values, as in the checkpoints."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over [rows, tokens, hidden_size].

        Args:
            states: hidden states.
            attention_mask: for the attention kernel in use, with ALiBi biases unless `options` hold the slopes.
            rotation: cosines and sines of the rotary positions.
            past_key_values: keys and values of earlier tokens; those of `states` are appended.
            options: for the attention kernel, such as the boundaries of packed documents.

        Returns:
            The same shape, and the attention weights if the kernel returns them.
        """
        shape = states.shape[:-1]
        packed = self.W_pack(states).view(*shape, 3, -1, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **options)
        return self.o_proj(output.flatten(2)), weights


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference implementation of attention, against which the kernels are tested.

    Scores are computed in fp32, at twice the memory and on GPUs several times the time of bf16: the three digits of
    bf16 are too few for the sum of a product and a bias in the hundreds.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BaichuanLayer(GradientCheckpointingLayer):
    """Attention and MLP with pre-normalisation and residual connections."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)  # type: ignore[arg-type]
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, states: torch.Tensor, **options: Any) -> torch.Tensor:
        """[rows, tokens, hidden_size] -> the same; options are those of BaichuanAttention."""
        attended, _ = self.self_attn(self.input_layernorm(states), **options)
        states = states + attended
        return states + self.mlp(self.post_attention_layernorm(states))


class NormHead(nn.Linear):
    """h · W_v / ||W_v||: each row of the vocabulary only contributes its direction, so no logit exceeds ||h||.

    A pure function of its weight, in training and evaluation: nothing is cached or overwritten.
    """

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **options)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] fp32."""
        # Dividing products is more exact in bf16 than products with normalised rows, and makes no copy of the weight.
        return functional.linear(states, self.weight).float() / self.row_norms()

    def row_norms(self) -> torch.Tensor:
        """[out_features] fp32."""
        return torch.linalg.vector_norm(self.weight, dim=-1, dtype=torch.float32).clamp(min=SMALLEST_NORM)


class BaichuanPreTrainedModel(PreTrainedModel):
    """Capabilities for transformers, and weight initialisation."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BaichuanLayer, "attentions": BaichuanAttention}

    def __init__(self, config: BaichuanConfig) -> None:
        if config.position_embedding == "alibi":
            self._supports_flash_attn = False  # untested: that package has its own implementation of the biases
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the module's own weights, unless they were loaded."""
        if isinstance(module, NormHead):
            initialization.kaiming_uniform_(module.weight, a=math.sqrt(5))
        else:
            super()._init_weights(module)


class BaichuanModel(BaichuanPreTrainedModel):
    """Token ids to states."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BaichuanLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Normalised states of the last layer, [rows, tokens, hidden_size]. Arguments are transformers' usual ones."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = torch.arange(states.shape[1], device=states.device) + past
        if position_ids is None:
            position_ids = places[None]
        alike = attention_mask is None and len(position_ids) == 1
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=states[:1] if alike else states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=not self._biases_in_mask(),
        )
        if self.config.position_embedding == "rope":
            options["rotation"] = rotary_factors(self.config, position_ids)
        else:
            slopes = alibi_slopes(self.config.num_attention_heads).to(states.device)
            if self._biases_in_mask():
                mask = self._biased(mask, slopes, places, states)
            else:
                options["alibi_slopes"] = slopes
        for layer in self.layers:
            states = layer(
                states, attention_mask=mask, position_ids=position_ids, past_key_values=past_key_values,
                use_cache=use_cache, **options,
            )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), past_key_values=past_key_values)

    def _biases_in_mask(self) -> bool:
        """Whether ALiBi is part of the mask: every kernel takes one, only the toolkit's own takes slopes."""
        return self.config.position_embedding == "alibi" and self.config._attn_implementation != PACKED_ATTENTION

    def _biased(
        self, mask: torch.Tensor | None, slopes: torch.Tensor, places: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """The mask with biases for all layers, by places in the row, whatever the padding and position_ids.

        It takes 4 bytes per head, query and key. CUDA kernels need it in the dtype of the queries: rounding to bf16
        changes biases by at most 0.4 %, which moves less than 0.1 % of the attention.
        """
        if mask is None:
            raise ValueError(f"ALiBi's biases need a mask, which {self.config._attn_implementation} does not take")
        biased = alibi_mask(slopes, places, mask)
        device = states.device.type
        if self.config._attn_implementation == "eager" or device == "cpu":
            return biased
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        return biased.clamp(min=torch.finfo(computed).min).to(computed)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    """Token ids to logits of the next token."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        sizes = config.hidden_size, config.vocab_size
        self.lm_head = NormHead(*sizes) if config.norm_head else nn.Linear(*sizes, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, [rows, tokens, vocab_size]; with labels the mean cross-entropy in nats.

        In training, a `z_loss_weight` above 0 adds the z-loss; the evaluation loss is the cross-entropy alone.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
            if self.training and self.config.z_loss_weight > 0:
                loss = loss + self.config.z_loss_weight * _z_loss(logits, labels, options.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *sizes: Any, **options: Any) -> nn.Linear:
        """Keeps a NormHead; transformers would replace it by a plain layer with the same weights."""
        resized = super()._get_resized_lm_head(old_lm_head, *sizes, **options)
        if not isinstance(old_lm_head, NormHead) or isinstance(resized, NormHead):
            return resized
        head = NormHead(resized.in_features, resized.out_features, device="meta")
        head.weight = resized.weight
        return head


def _z_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:  # fmt: skip
    """Mean squared max logit of all positions that predict a token, trained or not, as in the original.

    With the number of items of a whole step, it is the sum over trained positions divided by that number, which adds up
    over micro-batches.
    """
    squares = logits[:, :-1].float().amax(-1).square()
    if num_items_in_batch is None:
        return squares.mean()
    return (squares * (labels[:, 1:] >= 0)).sum() / num_items_in_batch
