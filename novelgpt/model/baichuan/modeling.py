"""Baichuan and Baichuan2, 7B and 13B, as one model: rotary or ALiBi positions, a plain or a normalised head.

Tensors have the names of the published checkpoints. One forward serves training and evaluation alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from novelgpt.model.attention import PACKED_ATTENTION
from novelgpt.model.baichuan.configuration import BaichuanConfig
from novelgpt.model.baichuan.positions import alibi_mask, alibi_slopes, rotary_factors, rotate

# Row norms of a head are at least this, so that rows of zeros have zeros for logits.
SMALLEST_NORM = 1e-12


class BaichuanRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), made in fp32, times a weight (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., width] -> the same."""
        exact = states.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(states.dtype)


class BaichuanMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same."""
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))


class BaichuanAttention(nn.Module):
    """Attention whose queries, keys and values are made by one matrix, as in the checkpoints."""

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
            states: what attends.
            attention_mask: as the attention in use wants it, with ALiBi's biases unless `options` hold the slopes.
            rotation: cosines and sines of rotary positions.
            past_key_values: keys and values of earlier tokens, which get those of `states`.
            options: for the attention in use, such as the borders of packed documents.

        Returns:
            The same shape, and the weights if the attention in use tells them.
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
    """Attention written out: the definition that the kernels are held to.

    Scores are made in fp32, twice the memory and on GPUs several times the time of bf16: bf16 keeps three digits, too
    few for the sum of a product and a bias in the hundreds.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BaichuanLayer(GradientCheckpointingLayer):
    """Attention and MLP, each on normalised states and added to them."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, states: torch.Tensor, **options: Any) -> torch.Tensor:
        """[rows, tokens, hidden_size] -> the same; options are those of BaichuanAttention."""
        attended, _ = self.self_attn(self.input_layernorm(states), **options)
        states = states + attended
        return states + self.mlp(self.post_attention_layernorm(states))


class NormHead(nn.Linear):
    """h · W_v / ||W_v||: each row of the vocabulary counts by its direction only, so no logit is beyond ||h||.

    A function of its weight and nothing else, in training and evaluation: nothing is kept, nothing is overwritten.
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
    """What transformers reads about the models, and how weights begin."""

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
            self._supports_flash_attn = False  # that package has biases of its own, which nothing here has tried
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        """Touches `module`'s own weights only, unless they were loaded."""
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
        self.norm = BaichuanRMSNorm(config.hidden_size, config.rms_norm_eps)
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
        """States of the last layer, [rows, tokens, hidden_size], normalised. Arguments are transformers' usual ones."""
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
        """Whether ALiBi goes by the mask: all attentions take one, only the toolkit's own takes slopes."""
        return self.config.position_embedding == "alibi" and self.config._attn_implementation != PACKED_ATTENTION

    def _biased(
        self, mask: torch.Tensor | None, slopes: torch.Tensor, places: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """The mask with biases, one for all layers, by places in the row: padding and position_ids change nothing.

        It takes 4 bytes for each head, query and key. Kernels on CUDA want it in the number format of the queries:
        biases rounded to bf16 are within 0.4 % of themselves, which moves less than 0.1 % of the attention.
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
        head = NormHead if config.norm_head else _plain_head
        self.lm_head = head(config.hidden_size, config.vocab_size)
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

        In training, a `z_loss_weight` above 0 adds its part; the loss of evaluation is the cross-entropy alone.
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
        """A NormHead stays one; transformers would put a plain layer in its place, with the same weights."""
        resized = super()._get_resized_lm_head(old_lm_head, *sizes, **options)
        if not isinstance(old_lm_head, NormHead) or isinstance(resized, NormHead):
            return resized
        head = NormHead(resized.in_features, resized.out_features, device="meta")
        head.weight = resized.weight
        return head


def _plain_head(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


def _z_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:  # fmt: skip
    """Mean squared largest logit of all positions that predict, trained or not, as in the original.

    Where the number of items of a whole step is told, it is the sum of the trained ones over that number, which adds up
    over micro-batches.
    """
    squares = logits[:, :-1].float().amax(-1).square()
    if num_items_in_batch is None:
        return squares.mean()
    return (squares * (labels[:, 1:] >= 0)).sum() / num_items_in_batch
