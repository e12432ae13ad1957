"""Reads settings from YAML, JSON or a shell script that calls the tool, and finds out which tool they are for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_object, read_yaml

# Keys that only one tool has.
_OF_TOOLS = {
    "llamafactory": (
        "finetuning_type", "stage", "cutoff_len", "dataset_dir", "val_size", "lora_target", "quantization_bit",
        "neat_packing", "mask_history", "max_samples", "overwrite_cache", "preprocessing_num_workers",
        "adapter_name_or_path", "plot_loss",
    ),
    "ms-swift": (
        "model", "train_type", "tuner_type", "split_dataset_ratio", "val_dataset", "torch_dtype", "target_modules",
        "attn_impl", "truncation_strategy", "loss_scale", "quant_bits", "rlhf_type", "use_hf", "ENV", "model_author",
        "dataset_num_proc",
    ),
    "trl": (
        "dataset_name", "datasets", "use_peft", "lora_r", "lora_target_modules", "load_in_4bit", "dtype",
        "attn_implementation", "dataset_text_field", "assistant_only_loss", "packing_strategy", "dataset_train_split",
        "completion_only_loss", "max_seq_length",
    ),
}  # fmt: skip
# Commands in scripts -> tool, and the settings that the command implies.
_COMMANDS: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {
    ("llamafactory-cli", "train"): ("llamafactory", {}), ("lmf", "train"): ("llamafactory", {}),
    ("swift", "sft"): ("ms-swift", {}), ("swift", "pt"): ("ms-swift", {"_command": "pt"}),
    ("swift", "rlhf"): ("ms-swift", {"rlhf_type": "dpo"}), ("trl", "sft"): ("trl", {}),
}  # fmt: skip
REMEDY = "write one `key: value` per line"


def read_settings(file: Path, tool: str | None) -> tuple[str, dict[str, Any]]:
    """The tool of a file's settings, and the settings.

    Args:
        file: YAML, JSON, or a shell script that calls the tool.
        tool: as the user named it.

    Raises:
        UserError: it cannot be read, or the tool is not clear.
    """
    if file.suffix.lower() == ".sh":
        return _read_script(file, tool)
    if file.suffix.lower() == ".json":
        settings = read_object(file, "name a file of settings")
    else:
        settings = read_yaml(file, "name a file of settings", REMEDY)
    if not isinstance(settings, dict) or not settings:
        raise UserError(f"{file} does not hold `key: value` lines", REMEDY)
    named = {str(key): value for key, value in settings.items()}
    if tool is None:
        counts = {name: sum(key in named for key in keys) for name, keys in _OF_TOOLS.items()}
        tool, *others = [name for name, count in counts.items() if count == max(counts.values())]
        if others:
            raise UserError(
                f"{file}: cannot tell which tool's settings these are", f"say it: --from {'|'.join(_OF_TOOLS)}"
            )
    return tool, named


def _read_script(file: Path, tool: str | None) -> tuple[str, dict[str, Any]]:
    """The options of the only call of the tool in a script."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}", "name a script in UTF-8") from error
    calls = []
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{file}: {error}: {line.strip()[:60]}", "correct the script") from error
        for index in range(len(words) - 1):
            command = (Path(words[index]).name, words[index + 1])
            if command in _COMMANDS and (tool is None or _COMMANDS[command][0] == tool):
                calls.append((*_COMMANDS[command], words[index + 2 :]))
    if len(calls) != 1:
        names = ", ".join(sorted({" ".join(command) for command in _COMMANDS}))
        raise UserError(f"{file} calls a tool {len(calls)} times", f"leave one call of {names} in a file of its own")
    name, known, words = calls[0]
    if words and not words[0].startswith("-"):
        raise UserError(f"{file} names the settings {words[0]}", "convert that file")
    return name, _options(file, words) | known


def _options(file: Path, words: list[str]) -> dict[str, Any]:
    """Options with their values, read as YAML; an option without a value is true."""
    settings: dict[str, list[Any]] = {}
    key = None
    for word in words:
        if re.search(r"\$[\w{(]|`", word):
            raise UserError(f"{file}: {word} must be expanded by the shell", "write the value itself")
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            key = name.replace("-", "_")
            settings[key] = [_read_word(value)] if value else []
        elif key is None:
            raise UserError(f"{file}: {word} belongs to no option", "write --option value")
        else:
            settings[key].append(_read_word(word))
    return {name: values[0] if len(values) == 1 else values or True for name, values in settings.items()}


def _read_word(word: str) -> Any:
    """A value as YAML reads it; invalid YAML is text."""
    try:
        return yaml.safe_load(word)
    except (yaml.YAMLError, ValueError, RecursionError):
        return word
