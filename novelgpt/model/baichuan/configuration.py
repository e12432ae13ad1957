"""The configuration of Baichuan and Baichuan2, with the settings that the original leaves implicit."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# How to tell the original checkpoints apart, whose config.json names neither positions nor head.
FIRST_ARCHITECTURE = "BaiChuanForCausalLM"
ROPE_WIDTH = 4096
NORM_HEAD_VOCABULARY = 125696
# Positions of all four models, for a config.json without them.
POSITIONS = 4096


@strict
class BaichuanConfig(PreTrainedConfig):
    """Sizes and kinds of a Baichuan model; the defaults are Baichuan2-7B's.

    Attributes:
        max_position_embeddings: tokens of the longest training rows; if 0, `model_max_length`, its name in the 13B
            files.
        position_embedding: "rope" or "alibi"; None infers it from the sizes, which fails for tiny models.
        norm_head: whether logits are divided by the norms of the head's rows; None infers it from the vocabulary,
            which fails once that was resized. Both are saved.
        rope_theta: base of the rotary frequencies.
        z_loss_weight: of the mean squared max logit in the training loss that the model itself computes.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = NORM_HEAD_VOCABULARY
    hidden_size: int = ROPE_WIDTH
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    position_embedding: Literal["rope", "alibi"] | None = None
    norm_head: bool | None = None
    rope_theta: float | int = 10000.0
    z_loss_weight: float | int = 0.0

    def __post_init__(self, **others: Any) -> None:
        """Infer what the file leaves open.

        Args:
            others: keys of the file that are not fields. Those of remote code are dropped: a saved `auto_map` would
                point at missing files, and the 13B files enable checkpointing through a tuple, which is truthy.
        """
        for name in ("auto_map", "gradient_checkpointing"):
            others.pop(name, None)
        length = others.pop("model_max_length", None)
        self.max_position_embeddings = self.max_position_embeddings or length or POSITIONS
        if self.position_embedding is None:
            first = FIRST_ARCHITECTURE in (self.architectures or [])
            self.position_embedding = "rope" if first or self.hidden_size == ROPE_WIDTH else "alibi"
        if self.norm_head is None:
            self.norm_head = self.vocab_size == NORM_HEAD_VOCABULARY
        super().__post_init__(**others)
