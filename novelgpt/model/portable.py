"""Settings files of a checkpoint that transformers 4 and 5 read alike.

transformers 5 renamed settings. Version 4 does not know the new names, takes its defaults instead and says nothing: a
base with a `rope_theta` of 1,000,000 is read with 10,000. So both names are written wherever version 5 reads the same
from a file that holds both.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from novelgpt.settings.atomic_files import atomic_write

# What version 5 calls its tokenizer without a class of its own -> what version 4 calls it, and version 5 as well.
TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}
# Those of version 4 that put begin and end tokens around texts by settings of their own, whatever tokenizer.json says;
# version 5 leaves those out, and goes by tokenizer.json.
BY_SETTINGS = {f"{family}Tokenizer{fast}" for family in ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")
               for fast in ("", "Fast")}  # fmt: skip
# Where layers have positions of two kinds, those of the sliding window have a base of their own, called so.
SLIDING_THETA = "rope_local_base_freq"
# GPT-NeoX has names of its own.
NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def make_portable(folder: Path) -> None:
    """Complete config.json and tokenizer_config.json of a folder that transformers 5 has just written.

    Weights and tokenizer.json are the same in both versions. Files that are missing are left out, as an adapter has no
    config.json.
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
    """config.json with the names of version 4 beside those of version 5, parts of several models included.

    A model that version 5 would read otherwise from both names keeps those of version 5 alone.
    """
    complete = {name: portable_config(value) if _is_model(value) else value for name, value in settings.items()}
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
    """tokenizer_config.json with a class that both versions have, and special tokens under the name that both read."""
    complete = dict(settings)
    if settings.get("tokenizer_class") in TOKENIZER_CLASSES:
        complete["tokenizer_class"] = TOKENIZER_CLASSES[settings["tokenizer_class"]]
    if isinstance(settings.get("extra_special_tokens"), list):
        complete["additional_special_tokens"] = complete.pop("extra_special_tokens")
    if isinstance(settings.get("model_specific_special_tokens"), dict):  # a list and a mapping had one name in turn
        complete["extra_special_tokens"] = settings["model_specific_special_tokens"]
    return complete


def _tokens_around(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, bool]:
    """Whether texts get a begin and an end token."""
    tokens = tokenizer.encode("a", add_special_tokens=True).tokens
    return {
        "add_bos_token": tokens[0] == _token(settings.get("bos_token")),
        "add_eos_token": tokens[-1] == _token(settings.get("eos_token")),
    }


def _token(written: Any) -> Any:
    return written.get("content") if isinstance(written, dict) else written


def _read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _write(path: Path, settings: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def _reading(known: type[PreTrainedConfig], settings: dict[str, Any], additions: dict[str, Any]) -> dict[str, Any]:
    """What version 5 makes of the settings, but for the names of version 4, which it keeps as they are."""
    read = known.from_dict(copy.deepcopy(settings)).to_dict()
    read = {name: value for name, value in read.items() if name not in additions}
    if isinstance(read.get("rope_parameters"), dict):
        read["rope_parameters"].pop("type", None)  # the same as its rope_type
    return read


def _is_model(value: object) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _positions(settings: dict[str, Any]) -> dict[str, Any]:
    """Of version 4: `rope_theta`, `rope_scaling` and their kin, from `rope_parameters`."""
    parameters = settings.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    additions: dict[str, Any] = {}
    if isinstance(parameters.get("full_attention"), dict):  # by kinds of layers
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
        if kind == "longrope":  # version 4 wants just these
            scaling = {"type": kind} | {name: scaling[name] for name in ("short_factor", "long_factor")}
        additions["rope_scaling"] = scaling
    return additions
