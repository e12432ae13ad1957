"""The configuration of a model with random weights: settings of a file, overrides, and the tokenizer's vocabulary."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from novelgpt.model.folder_checks import CONFIGURATION
from novelgpt.model.portable import SLIDING_THETA
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.parsed_files import check_fields
from novelgpt.settings.random_weights import RandomWeights, ready_sizes, size_file

OVERRIDES = "--config_overrides"
# What huggingface_hub writes before the reason.
OF_VALIDATORS = re.compile(r"^Class validation error for validator '\w+': (\w+Error: )?")
# Kinds of the layers one by one, in files that list them.
PER_LAYER = "layer_types"
# What files say of the weights that they came with.
OF_OTHER_WEIGHTS = ("_name_or_path", "auto_map", "transformers_version", "dtype", "torch_dtype", "quantization_config")
# Settings that no override changes, and what decides them.
DECIDED = {
    **dict.fromkeys((*OF_OTHER_WEIGHTS, "architectures"), "it says nothing of random weights: leave it out"),
    "model_type": "it is the family: name another --config_name",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer decides it: leave it out"),
    **dict.fromkeys(("dtype", "torch_dtype"), "weights are drawn in float32: leave it out, and train with --bf16"),
}
# What the heads of attention follow from, by the usual names.
SIZES_OF_HEADS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
# Settings of rotary positions by version 4's names, and the layers that they are for where a file tells layers apart.
# Version 5 puts them into ROPE, where what a file has already comes first.
ROPE, ROPE_SCALING = "rope_parameters", "rope_scaling"
ROTARY = {
    "rope_theta": ("rope_theta", "full_attention"),
    "rotary_emb_base": ("rope_theta", "full_attention"),
    SLIDING_THETA: ("rope_theta", "sliding_attention"),
    "partial_rotary_factor": ("partial_rotary_factor", "full_attention"),
    "rotary_pct": ("partial_rotary_factor", "full_attention"),
}


def random_config(weights: RandomWeights, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Make the configuration of a model for a tokenizer.

    The tokenizer decides the special ids, and the vocabulary where no override does, up to the next multiple of the
    divisor.

    Args:
        weights: settings and overrides.
        tokenizer: of the model.

    Raises:
        UserError: the family is unknown or no causal language model, overrides that it does not have, of another type,
            out of range or without effect, sizes that do not divide, or a tokenizer larger than the vocabulary.
    """
    where = f"--config_name {weights.source}"
    family = _family(weights.settings.get("model_type"), where)
    overrides = _check_overrides(weights, family)
    settings = {name: value for name, value in copy.deepcopy(weights.settings).items() if name not in OF_OTHER_WEIGHTS}
    if "num_hidden_layers" in overrides and len(set(settings.get(PER_LAYER) or [])) == 1:
        del settings[PER_LAYER]  # all alike
    rows = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    vocabulary = overrides.get("vocab_size", rows)
    if isinstance(vocabulary, int) and vocabulary < rows:
        raise UserError(
            f"the tokenizer {weights.tokenizer} has {rows:,} tokens, more than the vocab_size of {vocabulary:,}",
            f"leave vocab_size out, which is then the tokenizer's, or train a tokenizer of at most {vocabulary:,}",
        )
    settings |= copy.deepcopy(overrides)
    _place_positions(settings, overrides)
    settings |= _token_ids(tokenizer) | {"vocab_size": vocabulary}
    try:
        check_fields(CONFIGURATION, overrides, where, f"correct {OVERRIDES}")
        check_fields(CONFIGURATION, settings, where, f"correct {size_file(weights.source)}")
        settings["vocab_size"] = -(-vocabulary // weights.divisor) * weights.divisor
        config: PreTrainedConfig = family.from_dict(settings)
    except (UserError, StrictDataclassError, ValueError, TypeError, KeyError) as error:
        named = {family.attribute_map.get(name, name): value for name, value in settings.items()}
        _check_sizes(_defaults(family) | named, family, weights)  # says more than the error, if that is the reason
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}: {OF_VALIDATORS.sub('', reason_of(error))}", f"correct {place_of(weights)}"
        ) from error
    text = config.get_text_config()
    _check_sizes(vars(text), type(text), weights)
    _check_effects(config, overrides, where)
    return config


def _family(kind: Any, where: str) -> type[PreTrainedConfig]:
    """The configuration class of a family.

    Raises:
        UserError: there is none, or it has no causal language model.
    """
    family: type[PreTrainedConfig] | None = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401
    if family is not None and family in MODEL_FOR_CAUSAL_LM_MAPPING:
        return family
    what = "which transformers does not know" if family is None else "which has no causal language model"
    raise UserError(
        f"{where} says no model_type" if kind is None else f"{where} is of the family {kind!r}, {what}",
        f"name a causal language model as model_type, or a ready size: {', '.join(ready_sizes())}",
    )


def _check_overrides(weights: RandomWeights, family: type[PreTrainedConfig]) -> dict[str, Any]:
    """The overrides by the names that the family's files have.

    Raises:
        UserError: a setting does not exist, or may not be changed.
    """
    names: dict[str, str] = family.attribute_map
    known = {field.name for field in dataclasses.fields(family)} | set(names) | set(weights.settings)
    known |= {"rope_theta", ROPE_SCALING} if ROPE in known else set()
    for name, value in weights.overrides.items():
        if name in DECIDED:
            raise UserError(f"--config_overrides sets {name}, which can have no effect", DECIDED[name])
        if name == "vocab_size" and value is None:
            raise UserError(
                "--config_overrides sets vocab_size to nothing", "leave it out, which makes it the tokenizer's"
            )
        if name not in known:
            nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(
                f"--config_overrides sets {name!r}, which {family.model_type} does not have",
                f"did you mean {nearest!r}?",
            )
    return {names.get(name, name): value for name, value in weights.overrides.items()}


def _place_positions(settings: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Put overrides of rotary positions where version 5 reads them first, as files for versions 4 and 5 have both."""
    rope, scaling = settings.get(ROPE), settings.get(ROPE_SCALING)
    if ROPE in overrides and ROPE_SCALING not in overrides:
        settings.pop(ROPE_SCALING, None)
    elif ROPE_SCALING in overrides and isinstance(rope, dict):  # which it takes the place of
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                settings.setdefault(name, rope[name])
    for name, (key, layers) in ROTARY.items():
        for stated in (rope, scaling) if name in overrides else ():
            part = stated.get(layers, stated) if isinstance(stated, dict) else None
            if isinstance(part, dict) and key in part:
                part[key] = overrides[name]


def _check_effects(config: PreTrainedConfig, overrides: dict[str, Any], where: str) -> None:
    """Check that the configuration has the values that it was given; those that are None, or lists, it completes.

    Raises:
        UserError: it has another.
    """
    described = config.to_dict()
    rope = described.get(ROPE) or {}
    for name, value in overrides.items():
        if name == "vocab_size" or not isinstance(value, bool | int | float | str):
            continue
        has = described.get(name, value)
        if name in ROTARY:
            key, layers = ROTARY[name]
            has = (rope.get(layers) or rope).get(key, has)
        if has != value:
            raise UserError(
                f"{where}: {name}={value} of --config_overrides has no effect: {config.model_type} has {has} there",
                "leave it out",
            )


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The special ids of the configuration.

    The embedding of the padding token gets no gradient, so one that begins or ends texts as well is not named for it.
    """
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None if pad in (begin, end) else pad}


def place_of(weights: RandomWeights, *names: str) -> str:
    """Where settings are to be corrected: in the overrides if they set one of them, else in the file.

    Args:
        weights: settings and overrides.
        names: of the settings; none where it could be any.
    """
    file = str(size_file(weights.source))
    if not (weights.overrides.keys() & set(names) if names else weights.overrides):
        return file
    return OVERRIDES if names or weights.source in ready_sizes() else f"{OVERRIDES}, or {file}"


def _check_sizes(sizes: dict[str, Any], family: type[PreTrainedConfig], weights: RandomWeights) -> None:
    """Refuse sizes that do not divide; some families do not look, and would make smaller heads without a word.

    Args:
        sizes: settings of the model. What is missing or no number fits.
        family: of the model, which may have other names for them.
        weights: where the sizes come from.

    Raises:
        UserError: names the sizes, what would fit, and where to set it.
    """
    native = {name: family.attribute_map.get(name, name) for name in SIZES_OF_HEADS}
    values = (sizes.get(name) for name in native.values())
    width, heads, groups, head = (value if isinstance(value, int) else None for value in values)
    if width is None or heads is None or min(width, heads) < 1:
        return
    wide, many, grouped, deep = (_written(names, weights) for names in native.items())
    derived = (weights.settings | weights.overrides).get(deep) is None
    head = width // heads if head is None else head
    rotary = sizes.get(ROPE, ROPE in family.__dataclass_fields__) or sizes.get("position_embedding") == "rope"
    turned = 2 if rotary else 1  # numbers of a head at a time
    wider = f"set {wide} to a multiple of {turned * heads}, or another {many},"
    refusals: tuple[tuple[bool, str, str, tuple[str, ...]], ...] = (
        (
            derived and width % heads > 0,
            f"{heads} attention heads do not divide {wide}={width}", wider, (wide, many),
        ),
        (
            groups is not None and groups > 0 and heads % groups > 0,
            f"{groups} key and value heads do not divide {heads} attention heads",
            f"set {grouped} to a divisor of {heads}, or {many} to a multiple of {groups},", (grouped, many),
        ),
        (head < 1, f"heads of {deep}={head} hold nothing", f"set {deep} to {turned} or more", (deep,)),
        (
            derived and head % turned > 0,
            f"{heads} heads of {wide}={width} hold {head} numbers each, and rotary positions turn pairs of them",
            wider, (wide, many),
        ),
        (
            head % turned > 0,
            f"heads of {deep}={head} hold an odd number, and rotary positions turn pairs of them",
            f"set {deep} to an even number", (deep,),
        ),
    )  # fmt: skip
    for refused, cause, remedy, names in refusals:
        if refused:
            raise UserError(f"--config_name {weights.source}: {cause}", f"{remedy} in {place_of(weights, *names)}")


def _defaults(family: type[PreTrainedConfig]) -> dict[str, Any]:
    """The sizes and names that a family has where a file says nothing of them."""
    fields = dataclasses.fields(family)
    return {field.name: field.default for field in fields if isinstance(field.default, int | str)}


def _written(names: tuple[str, str], weights: RandomWeights) -> str:
    """Of two names of a setting, the one by which an override or the file sets it; else the first, the usual one."""
    sources = (weights.overrides, weights.settings)
    return next((name for source in sources for name in names if name in source), names[0])
