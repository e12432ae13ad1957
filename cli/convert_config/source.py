"""Read settings from YAML, JSON or a shell script that calls the tool, detect the tool, and convert values to types.

The tools' YAML readers differ from YAML 1.1, in which `1e-5` is text and `no` is false, and accept most types silently;
here a wrong type would be noticed only when something is computed from it.
"""

from __future__ import annotations

import datetime
import math
import re
import shlex
from collections.abc import Mapping
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
                f"{file}: cannot tell which tool's settings these are", f"pass --from {'|'.join(_OF_TOOLS)}"
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
            args = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{file}: {error}: {line.strip()[:60]}", "correct the script") from error
        for index in range(len(args) - 1):
            command = (Path(args[index]).name, args[index + 1])
            if command in _COMMANDS and (tool is None or _COMMANDS[command][0] == tool):
                calls.append((*_COMMANDS[command], args[index + 2 :]))
    if len(calls) != 1:
        names = ", ".join(sorted({" ".join(command) for command in _COMMANDS}))
        raise UserError(f"{file} calls a tool {len(calls)} times", f"leave one call of {names} in a file of its own")
    name, known, args = calls[0]
    if args and not args[0].startswith("-"):
        raise UserError(f"{file} names the settings {args[0]}", "convert that file")
    settings: dict[str, list[Any]] = {}
    key = None
    for arg in args:
        if re.search(r"\$[\w{(]|`", arg):
            raise UserError(f"{file}: {arg} must be expanded by the shell", "write the value itself")
        if arg.startswith("--"):
            option, _, value = arg[2:].partition("=")
            key = option.replace("-", "_")
            settings[key] = [_parse_arg(value)] if value else []
        elif key is None:
            raise UserError(f"{file}: {arg} belongs to no option", "write --option value")
        else:
            settings[key].append(_parse_arg(arg))
    # An option without a value is true.
    return name, {key: values[0] if len(values) == 1 else values or True for key, values in settings.items()} | known


def _parse_arg(arg: str) -> Any:
    """A value as YAML reads it; invalid YAML is text."""
    try:
        return yaml.safe_load(arg)
    except (yaml.YAMLError, ValueError, RecursionError):
        return arg


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# Keys without a default that shows their type.
_SWITCHES = (
    "do_train", "fp16", "pure_bf16", "neat_packing", "mask_history", "train_on_prompt", "use_swanlab", "use_hf",
    "use_chat_template", "load_in_4bit", "assistant_only_loss", "completion_only_loss", "overwrite_output_dir",
    "trust_remote_code", "use_rslora", "use_dora", "load_best_model_at_end", "save_only_model",
)  # fmt: skip
_NUMBERS = (
    "lora_alpha",
    "quantization_bit",
    "quant_bits",
    "eval_steps",
    "max_steps",
    "save_total_limit",
    "dataset_test_ratio",
    "max_length",
    "max_seq_length",
    "max_seq_len",
    "max_epochs",
    "warmup_ratio",
    "warmup_steps",
    "learning_rate",
)
# Counts, which something is divided by.
_COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_samples",
)  # fmt: skip
_TEXT = (
    "model_name_or_path", "model", "output_dir", "default_system", "system", "template", "dataset_config",
    "metric_for_best_model", "torch_dtype", "dtype", "chat_template_path",
)  # fmt: skip
_LISTS = (
    "dataset", "eval_dataset", "val_dataset", "lora_target", "target_modules", "lora_target_modules", "report_to",
)  # fmt: skip
# Free text, in which `${` is text.
_FREE = ("default_system", "system")
_STRATEGIES = ("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy")


def convert_types(file: Path, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, each of its type.

    Args:
        file: for errors.
        given: as it was parsed.
        defaults: of the tool, whose types say what a key takes.

    Raises:
        UserError: names the first of another type.
    """
    return {key: None if value is None else _value(file, key, value, defaults.get(key)) for key, value in given.items()}


def _value(file: Path, key: str, given: Any, default: Any) -> Any:
    value = _plain(file, key, given)
    if isinstance(value, str) and re.fullmatch(_NUMBER, value) and re.search("[eE]", value):
        value = float(value)
    if key in _LISTS:
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in found):
            raise _error(file, key, value, "a name, or a list of names")
    elif isinstance(default, bool) or key in _SWITCHES:
        if (value := _SWITCH.get(str(value).lower())) is None:
            raise _error(file, key, given, "true or false")
    elif key in _COUNTS:
        value = _number(file, key, value)
        if value != int(value) or value < 1:
            raise _error(file, key, value, "a positive whole number")
        return int(value)
    elif isinstance(default, int | float) or key in _NUMBERS:
        return _number(file, key, value)
    elif key in _STRATEGIES and value is False:
        return "no"
    elif (isinstance(default, str) or key in _TEXT) and not isinstance(value, str):
        raise _error(file, key, value, "text")
    elif key == "deepspeed" and not isinstance(value, str | dict):
        raise _error(file, key, value, "a file's name, or its settings")
    return value


def _plain(file: Path, key: str, value: Any) -> Any:
    """A value that JSON can hold; YAML dates are text, as in the tools' readers."""
    if isinstance(value, dict):
        return {str(name): _plain(file, key, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(file, key, part) for part in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise _error(file, key, value, "a finite number")
    if isinstance(value, str):
        if "${" in value and key not in _FREE:
            raise UserError(f"{file}: {key}: {value[:60]} must be filled in", "write the value itself")
        if "\0" in value:
            raise _error(file, key, value, "text without zero bytes")
    elif value is not None and not isinstance(value, bool | int | float):
        raise _error(file, key, type(value).__name__, "a plain value")
    return value


def _number(file: Path, key: str, value: Any) -> int | float:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if re.search("[.eE]", value) else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(file, key, value, "a number")
    return value


def _error(file: Path, key: str, value: Any, wanted: str) -> UserError:
    shown = str(value)
    return UserError(f"{file}: {key}: {shown[:60]}{'…' * (len(shown) > 60)} is not {wanted}", "correct it")
