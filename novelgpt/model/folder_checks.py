"""The border for folders of models and adapters: their files are what their names say, with fields that can be meant.

Every loader passes here before transformers, peft or tokenizers read the folder. Sizes that no model has are refused by
name before memory is taken for them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import REMEDY, check_fields, read_object

CONFIG, TOKENIZER_CONFIG, ADAPTER_CONFIG = "config.json", "tokenizer_config.json", "adapter_config.json"
# Settings, however long their lists of tokens are.
MOST_SETTINGS_BYTES = 1 << 28
# What is read beside those below; each must be a file that can be opened.
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.safetensors", "pytorch_model*.bin")

Count = Annotated[int, Field(ge=0, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=1 << 22)]
Rows = Annotated[int, Field(ge=1, le=1 << 28)]
Token = Annotated[int, Field(ge=-1, le=1 << 31)]
# One for all layers, or one a layer.
Widths = Width | list[Width]
Real = Annotated[float, Field(ge=-1e30, le=1e30)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Settings(BaseModel):
    """Fields that are not named here are for transformers to judge. No text is taken for a number, and NaN for none."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Positions(_Settings):
    """How rotary positions are stretched: in all layers, or in those of a kind."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    factor: Annotated[float, Field(gt=0, le=1e9)] | None = None
    original_max_position_embeddings: Rows | None = None
    attention_factor: Real | None = None
    partial_rotary_factor: Real | None = None
    beta_fast: Real | None = None
    beta_slow: Real | None = None
    low_freq_factor: Real | None = None
    high_freq_factor: Real | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None

    full_attention: _Positions | None = None
    sliding_attention: _Positions | None = None


class Configuration(_Settings):
    """config.json, and each part of it whose name ends in _config."""

    model_type: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    num_hidden_layers: Layers | None = None
    n_layer: Layers | None = None
    num_layers: Layers | None = None
    hidden_size: Width | None = None
    n_embd: Width | None = None
    d_model: Width | None = None
    intermediate_size: Widths | None = None
    moe_intermediate_size: Widths | None = None
    n_inner: Width | None = None
    num_attention_heads: Widths | None = None
    n_head: Width | None = None
    num_key_value_heads: Widths | None = None
    head_dim: Count | None = None
    vocab_size: Rows | None = None
    max_position_embeddings: Rows | None = None
    n_positions: Rows | None = None
    model_max_length: Rows | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    n_routed_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    layer_types: list[str] | None = None
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_scaling: _Positions | None = None
    rope_parameters: _Positions | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    rms_norm_eps: Annotated[float, Field(ge=0)] | None = None
    layer_norm_epsilon: Annotated[float, Field(ge=0)] | None = None
    initializer_range: Annotated[float, Field(ge=0)] | None = None
    attention_dropout: Share | None = None
    hidden_dropout: Share | None = None
    dropout: Share | None = None
    attn_pdrop: Share | None = None
    embd_pdrop: Share | None = None
    resid_pdrop: Share | None = None
    output_router_logits: bool | None = None
    router_aux_loss_coef: Real | None = None
    hidden_act: str | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None
    transformers_weights: str | None = None

    @model_validator(mode="after")
    def groups_share_the_heads(self) -> Configuration:
        """As many attention heads for each head of keys and values."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise ValueError(f"{groups} key and value heads do not divide {heads} attention heads")
        return self


class _ChatTemplate(_Settings):
    name: str
    template: str


class _TemplateRecord(_Settings):
    name: str
    sha256: str


class TokenizerSettings(_Settings):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    model_max_length: Annotated[float, Field(ge=1)] | int | None = None
    chat_template: str | list[_ChatTemplate] | dict[str, str] | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    auto_map: dict[str, Any] | list[Any] | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    extra_special_tokens: dict[str, Any] | list[Any] | None = None
    additional_special_tokens: list[Any] | None = None
    novelgpt_chat_template: _TemplateRecord | None = None


class GenerationSettings(_Settings):
    """generation_config.json."""

    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    num_beams: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    do_sample: bool | None = None
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None
    temperature: Real | None = None
    top_p: Real | None = None
    top_k: int | None = None
    repetition_penalty: Real | None = None


class AdapterSettings(_Settings):
    """adapter_config.json."""

    base_model_name_or_path: Annotated[str, Field(min_length=1)] | None = None
    peft_type: str | None = None
    r: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1 << 16)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_bias: bool | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    layer_replication: list[list[int]] | None = None
    megatron_config: dict[str, Any] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


class WeightIndex(_Settings):
    """model.safetensors.index.json or pytorch_model.bin.index.json."""

    metadata: dict[str, Any] | None = None
    weight_map: Annotated[dict[str, str], Field(min_length=1)]

    @model_validator(mode="after")
    def names_files_beside_it(self) -> WeightIndex:
        """An index names no files of other folders."""
        outside = [name for name in self.weight_map.values() if Path(name).name != name or not name]
        if outside:
            raise ValueError(f"{outside[0]!r} is no name of a file beside it")
        return self


FIELDS: dict[str, type[_Settings]] = {
    CONFIG: Configuration,
    TOKENIZER_CONFIG: TokenizerSettings,
    "generation_config.json": GenerationSettings,
    ADAPTER_CONFIG: AdapterSettings,
}
MAPPINGS = ("special_tokens_map.json", "added_tokens.json")


def check_model_folder(folder: Path) -> None:
    """Refuse a folder with a file that is not what its name says; what is not there is for its reader to tell.

    Raises:
        UserError: names the first such file, and its field.
    """
    paths = sorted({path for pattern in OTHER_FILES for path in folder.glob(pattern)})
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is a link to what is not there", REMEDY)
        if not path.is_file():
            raise UserError(f"{path} is no file", REMEDY)
    states = [(path, path.stat()) for path in paths if path.name in FIELDS or path.name in MAPPINGS]
    for path, state in states:
        _check_settings(path, (state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns))


def read_index(path: Path) -> list[str]:
    """Names of the files that an index of weights names, in their order.

    Raises:
        UserError: it is damaged, or names what does not lie beside it.
    """
    index = check_fields(WeightIndex, read_object(path), str(path))
    return sorted(set(index.weight_map.values()))


@lru_cache(maxsize=64)
def _check_settings(path: Path, _state: tuple[int, ...]) -> None:
    """Once for each state of a file: a command asks for its model's folder many times."""
    content = read_object(path, most_bytes=MOST_SETTINGS_BYTES)
    if path.name in FIELDS:
        check_fields(FIELDS[path.name], content, str(path))
    if path.name == CONFIG:
        for name, part in content.items():
            if name.endswith("_config") and name != "quantization_config" and isinstance(part, dict):
                check_fields(Configuration, part, f"{path}: {name}")
