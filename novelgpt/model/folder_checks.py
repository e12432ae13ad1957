"""Validation of the settings files of models and adapters, before transformers, peft or tokenizers read them.

Every loader calls `check_model_folder` first. Fields have their type and are within the range of real models, so that
sizes that no model has are refused by name before memory is allocated for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import REMEDY, check_fields, read_object

CONFIG, TOKENIZER_CONFIG, ADAPTER_CONFIG = "config.json", "tokenizer_config.json", "adapter_config.json"
# Of a settings file, which may hold long lists of tokens.
MAX_SETTINGS_BYTES = 1 << 28
# Read beside those that are validated; each must be a file that can be opened.
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.safetensors", "pytorch_model*.bin")

Count = Annotated[int, Field(ge=0, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=1 << 22)]
Rows = Annotated[int, Field(ge=1, le=1 << 28)]
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Token = Annotated[int, Field(ge=-1, le=1 << 31)]
Real = Annotated[float, Field(ge=-1e30, le=1e30)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Mapped = dict[str, Any]


class _Settings(BaseModel):
    """Other fields are left to transformers. Strings are not converted to numbers, and NaN is refused."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def _optional(name: str, kinds: Mapping[Any, str], **validators: Any) -> Any:
    """A class of settings that may all be missing or null.

    Args:
        name: of the class.
        kinds: names of the fields by their type.
        validators: of pydantic.
    """
    fields: dict[str, Any] = {field: (kind | None, None) for kind, names in kinds.items() for field in names.split()}
    return create_model(name, __base__=_Settings, __validators__=validators, **fields)


# How rotary positions are scaled: in all layers, or by the type of the layer.
ROPE: dict[Any, str] = {
    str: "rope_type type",
    Positive: "rope_theta",
    Annotated[float, Field(gt=0, le=1e9)]: "factor",
    Rows: "original_max_position_embeddings",
    Real: "attention_factor partial_rotary_factor beta_fast beta_slow low_freq_factor high_freq_factor",
    list[float]: "short_factor long_factor",
}
ROPE_BY_LAYERS = ROPE | {_optional("RopeOfLayers", ROPE): "full_attention sliding_attention"}


def _check_heads(configuration: Any) -> Any:
    """Each key-value head serves the same number of attention heads."""
    heads, groups = configuration.num_attention_heads, configuration.num_key_value_heads
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(f"{groups} key and value heads do not divide {heads} attention heads")
    return configuration


# config.json, and each part of it whose name ends in _config.
CONFIGURATION = _optional("Configuration", {
    str: "model_type hidden_act transformers_weights",
    list[str]: "architectures layer_types",
    Mapped: "auto_map quantization_config text_config",
    bool: "output_router_logits tie_word_embeddings",
    Layers: "num_hidden_layers n_layer num_layers",
    Width: "hidden_size n_embd d_model n_inner n_head",
    Width | list[Width]: "intermediate_size moe_intermediate_size num_attention_heads num_key_value_heads",
    Rows: "vocab_size max_position_embeddings n_positions model_max_length",
    Count: "head_dim num_experts num_local_experts n_routed_experts num_experts_per_tok",
    Token | list[Token]: "bos_token_id eos_token_id pad_token_id",
    Positive: "rope_theta",
    NotNegative: "rms_norm_eps layer_norm_epsilon initializer_range",
    Share: "attention_dropout hidden_dropout dropout attn_pdrop embd_pdrop resid_pdrop",
    Real: "router_aux_loss_coef",
    _optional("Rope", ROPE_BY_LAYERS): "rope_scaling rope_parameters",
}, check_heads=model_validator(mode="after")(_check_heads))  # fmt: skip


class _ChatTemplate(_Settings):
    name: str
    template: str


class _TemplateRecord(_Settings):
    name: str
    sha256: str


class WeightIndex(_Settings):
    """model.safetensors.index.json or pytorch_model.bin.index.json."""

    metadata: Mapped | None = None
    weight_map: Annotated[dict[str, str], Field(min_length=1)]

    @model_validator(mode="after")
    def names_siblings(self) -> WeightIndex:
        """An index does not name files of other folders."""
        outside = [name for name in self.weight_map.values() if Path(name).name != name or not name]
        if outside:
            raise ValueError(f"{outside[0]!r} is not the name of a file beside it")
        return self


FIELDS: dict[str, Any] = {
    CONFIG: CONFIGURATION,
    TOKENIZER_CONFIG: _optional("TokenizerSettings", {
        str: "tokenizer_class",
        Annotated[float, Field(ge=1)] | int: "model_max_length",
        str | list[_ChatTemplate] | dict[str, str]: "chat_template",
        dict[str, Mapped]: "added_tokens_decoder",
        Mapped | list[Any]: "auto_map extra_special_tokens",
        str | Mapped: "bos_token eos_token pad_token unk_token",
        list[Any]: "additional_special_tokens",
        _TemplateRecord: "novelgpt_chat_template",
    }),
    "generation_config.json": _optional("GenerationSettings", {
        Token | list[Token]: "bos_token_id eos_token_id pad_token_id",
        int: "max_length max_new_tokens top_k",
        Rank: "num_beams",
        bool: "do_sample use_cache output_attentions output_hidden_states output_scores output_logits "
              "return_dict_in_generate",
        Real: "temperature top_p repetition_penalty",
    }),
    ADAPTER_CONFIG: _optional("AdapterSettings", {
        Annotated[str, Field(min_length=1)]: "base_model_name_or_path",
        str: "peft_type bias",
        Rank: "r",
        Positive: "lora_alpha",
        Share: "lora_dropout",
        str | list[str]: "target_modules exclude_modules layers_pattern",
        list[str]: "modules_to_save target_parameters",
        dict[str, Rank]: "rank_pattern",
        dict[str, float]: "alpha_pattern",
        bool: "use_rslora use_dora fan_in_fan_out lora_bias",
        bool | str: "init_lora_weights",
        int | list[int]: "layers_to_transform",
        list[list[int]]: "layer_replication",
        Mapped: "megatron_config",
        list[int] | dict[str, list[int]]: "trainable_token_indices",
    }),
}  # fmt: skip
MAPPINGS = ("special_tokens_map.json", "added_tokens.json")


def check_model_folder(folder: Path) -> None:
    """Refuse a folder with a damaged settings file; missing files are left to those who read them.

    Raises:
        UserError: names the first such file, and its field.
    """
    paths = sorted({path for pattern in OTHER_FILES for path in folder.glob(pattern)})
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is a link to a missing file", REMEDY)
        if not path.is_file():
            raise UserError(f"{path} is not a file", REMEDY)
    for path in paths:
        if path.name in FIELDS or path.name in MAPPINGS:
            state = path.stat()
            _check_settings(path, (state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns))


def read_index(path: Path) -> list[str]:
    """The weight files that an index names, sorted.

    Raises:
        UserError: it is damaged, or names files outside its folder.
    """
    return sorted(set(check_fields(WeightIndex, read_object(path), str(path)).weight_map.values()))


@lru_cache(maxsize=64)
def _check_settings(path: Path, _state: tuple[int, ...]) -> None:
    """Once for each state of a file: a command locates its model many times."""
    content = read_object(path, max_bytes=MAX_SETTINGS_BYTES)
    if path.name in FIELDS:
        check_fields(FIELDS[path.name], content, str(path))
    if path.name == CONFIG:
        for name, part in content.items():
            if name.endswith("_config") and name != "quantization_config" and isinstance(part, dict):
                check_fields(CONFIGURATION, part, f"{path}: {name}")
