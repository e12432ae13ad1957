"""Settings files of a checkpoint that transformers 4 and 5 read the same way.

transformers 5 renamed settings. Version 4 ignores the new names and silently uses its defaults: a base with a
`rope_theta` of 1,000,000 is read with 10,000. So both names are written wherever version 5 reads the same from a file
with both.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from novelgpt.settings.atomic_files import atomic_write, follow_umask

# Name of a generic tokenizer class in version 5 -> its name in version 4, which version 5 accepts as well.
TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}
# Classes that in version 4 add begin and end tokens according to their own settings, whatever tokenizer.json says;
# version 5 omits these settings and follows tokenizer.json.
BY_SETTINGS = {f"{family}Tokenizer{fast}" for family in ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")
               for fast in ("", "Fast")}  # fmt: skip
# RoPE base of sliding-window layers, in models with two types of layers.
SLIDING_THETA = "rope_local_base_freq"
# Names in GPT-NeoX.
NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def save_portable(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_shard_size: str = "50GB"
) -> None:
    """Write a model and its tokenizer into a folder that transformers 4 and 5 read, with the modes of the umask.

    Args:
        folder: exists.
        model: with its generation settings.
        tokenizer: of the model.
        max_shard_size: of a file of weights.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    follow_umask(folder)


def make_portable(folder: Path) -> None:
    """Complete config.json and tokenizer_config.json of a folder that transformers 5 has just written.

    Weights and tokenizer.json are the same in both versions. Missing files are skipped: an adapter has no config.json.
    """
    config, tokenizer_config = folder / CONFIG_NAME, folder / TOKENIZER_CONFIG_FILE
    if config.is_file():
        _write(config, portable_config(_read(config)))
    if tokenizer_config.is_file():
        settings = portable_tokenizer_config(_read(tokenizer_config))
        vocabulary = folder / FULL_TOKENIZER_FILE
        if settings.get("tokenizer_class") in BY_SETTINGS and vocabulary.is_file():
            settings |= _tokens_around(Tokenizer.from_file(str(vocabulary)), settings)
        _write(tokenizer_config, settings)


def portable_config(settings: dict[str, Any]) -> dict[str, Any]:
    """config.json with the names of version 4 beside those of version 5, in nested models as well.

    If version 5 would read both names differently, only its own are kept.
    """
    complete = {
        name: portable_config(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in settings.items()
    }
    if settings.get("dtype") is not None:
        complete.setdefault("torch_dtype", settings["dtype"])
    known = CONFIG_MAPPING[settings["model_type"]] if settings.get("model_type") in CONFIG_MAPPING else None
    if known is None:
        return complete
    experts = {alias: name for alias, name in known.attribute_map.items() if "experts" in alias and name in settings}
    additions = {alias: settings[name] for alias, name in experts.items()} | _positions(settings)
    both = additions | complete
    return both if _reading(known, both, additions) == _reading(known, complete, additions) else complete


def portable_tokenizer_config(settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with a class and names of special tokens that both versions know."""
    complete = dict(settings)
    if settings.get("tokenizer_class") in TOKENIZER_CLASSES:
        complete["tokenizer_class"] = TOKENIZER_CLASSES[settings["tokenizer_class"]]
    if isinstance(settings.get("extra_special_tokens"), list):
        complete["additional_special_tokens"] = complete.pop("extra_special_tokens")
    if isinstance(settings.get("model_specific_special_tokens"), dict):  # version 4 uses one name for both
        complete["extra_special_tokens"] = settings["model_specific_special_tokens"]
    return complete


def _tokens_around(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer adds a begin and an end token."""
    tokens = tokenizer.encode("a", add_special_tokens=True).tokens
    begin, end = (
        token.get("content") if isinstance(token, dict) else token
        for token in (settings.get("bos_token"), settings.get("eos_token"))
    )
    return {"add_bos_token": tokens[0] == begin, "add_eos_token": tokens[-1] == end}


def _read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _write(path: Path, settings: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def _reading(known: type[PreTrainedConfig], settings: dict[str, Any], additions: dict[str, Any]) -> dict[str, Any]:
    """What version 5 reads, without the names of version 4, which it keeps unchanged."""
    read = known.from_dict(copy.deepcopy(settings)).to_dict()
    read = {name: value for name, value in read.items() if name not in additions}
    if isinstance(read.get("rope_parameters"), dict):
        read["rope_parameters"].pop("type", None)  # the same as its rope_type
    return read


def _positions(settings: dict[str, Any]) -> dict[str, Any]:
    """Version 4's `rope_theta`, `rope_scaling` and related names, from `rope_parameters`."""
    parameters = settings.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    additions: dict[str, Any] = {}
    if isinstance(parameters.get("full_attention"), dict):  # by type of layer
        sliding = parameters.get("sliding_attention") or {}
        if "rope_theta" in sliding:
            additions[SLIDING_THETA] = sliding["rope_theta"]
        parameters = parameters["full_attention"]
    names = NEOX_NAMES if settings["model_type"].startswith("gpt_neox") else {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(name) is not None:
            additions[names.get(name, name)] = parameters[name]
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        apart = ("rope_theta", "partial_rotary_factor")
        scaling = {name: value for name, value in parameters.items() if name not in apart}
        if kind == "longrope":  # the only keys that version 4 accepts
            scaling = {"type": kind} | {name: scaling[name] for name in ("short_factor", "long_factor")}
        additions["rope_scaling"] = scaling
    return additions
