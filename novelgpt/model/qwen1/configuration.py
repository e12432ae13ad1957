"""The configuration of Qwen v1, with the fields of its original `config.json`."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

# The fields of the first release (August 2023) and their later names.
FIRST_RELEASE_FIELDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "padded_vocab_size": "vocab_size",
}


class QWenConfig(PreTrainedConfig):
    """Qwen v1: Qwen-1.8B, 7B, 14B and 72B, as bases and as chat models.

    Field names are those of the original file, so that the original code and other tools read a saved one. Both of its
    spellings are read; the later one is written. `auto_map`, which names code beside the checkpoint, is dropped.

    `max_position_embeddings` is at most `seq_length`, the length of the texts that the weights have seen. Past it the
    original code, in evaluation only, changes the base of the rotary embedding (dynamic NTK) and scales the queries
    (LogN). Here neither is done, in any mode, as training and evaluation have to compute the same function;
    `use_dynamic_ntk` and `use_logn_attn` are kept for other tools.

    Attributes:
        intermediate_size: twice the width of the feed-forward layers, as in the original file.
        kv_channels: size of an attention head.
        rotary_emb_base: base of the rotary embedding's wavelengths.
        seq_length: max tokens of a pretraining row.

    Raises:
        ValueError: a setting that no released model has, and that is not implemented.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Names in the layers of Qwen2 -> fields.
    attribute_map: ClassVar[dict[str, str]] = {
        "rms_norm_eps": "layer_norm_epsilon",
        "head_dim": "kv_channels",
        "attention_dropout": "attn_dropout_prob",
        "num_key_value_heads": "num_attention_heads",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    seq_length: int = 2048
    max_position_embeddings: int = 8192
    rotary_emb_base: float = 10000.0
    rotary_pct: float = 1.0
    rope_parameters: dict[str, Any] | None = None
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    scale_attn_weights: bool = True
    no_bias: bool = True
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **others: Any) -> None:
        for first, later in FIRST_RELEASE_FIELDS.items():
            if others.get(first) is not None:
                setattr(self, later, others.pop(first))
        others.pop("auto_map", None)
        expected = {"rotary_pct": 1.0, "emb_dropout_prob": 0.0, "scale_attn_weights": True, "no_bias": True}
        for name, value in expected.items():
            if vars(self)[name] != value:
                raise ValueError(
                    f"{name} is {vars(self)[name]} in config.json, and only {value} is supported for Qwen v1"
                )
        self.max_position_embeddings = min(self.max_position_embeddings, self.seq_length)
        self.rope_parameters = {"rope_type": "default", "rope_theta": float(self.rotary_emb_base)}
        super().__post_init__(**others)

    @property
    def hidden_act(self) -> str:
        """Of the feed-forward layers' gate."""
        return "silu"

    @property
    def layer_types(self) -> list[str]:
        """Each layer attends to all that came before."""
        return ["full_attention"] * self.num_hidden_layers
