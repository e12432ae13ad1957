"""Loading a base or a checkpoint through AutoModel. Code in a checkpoint does not run unless allowed."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from novelgpt.model.adapter_bases import extend_vocabulary
from novelgpt.model.attention import PACKED_ATTENTION
from novelgpt.model.folder_checks import ADAPTER_CONFIG, check_model_folder
from novelgpt.model.hub import locate, runs_own_code
from novelgpt.model.weight_files import SAFE_SUFFIX, check_no_pickles, stored_tensors, weight_files
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.remedies import pip_install, python_module
from novelgpt.settings.terminal import counted, gigabytes

# Errors that are not about the files, or are already UserErrors. Anything else that transformers, peft, safetensors and
# torch raise while they read a folder is about its files.
NOT_OF_FILES = (UserError, MemoryError, torch.OutOfMemoryError)


def frozen_dtype() -> torch.dtype:
    """Of weights that are not trained: bf16 on GPUs that support it, else fp32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def load_model(
    model: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    qlora: bool = False,
    adapter: Path | None = None,
) -> PreTrainedModel:
    """Load the causal language model of a folder or hub name, with every weight read from its files.

    Args:
        model: where it is and which attention it uses.
        tokenizer: its tokenizer, whose ids must fit the embedding.
        dtype: of the weights; fp32 for full training, where small updates would be lost in bf16.
        qlora: quantise the weights to 4 bits.
        adapter: folder of the adapter that will be attached, which may have another vocabulary.

    Raises:
        UserError: nothing to load, an unknown architecture, code of its own that may not run, files that are missing,
            damaged or of another model, 4 bits without their package, or a vocabulary that does not fit.
    """
    options = {"quantization_config": _four_bits()} if qlora else {}
    source = locate(model)
    if adapter_base(source) is not None:  # transformers would load the base it names instead, from wherever that is
        raise UserError(
            f"{model.model} is an adapter, not a model",
            f"merge it first: {python_module('finetune_lora.merge ADAPTER OUTPUT')}",
        )
    check_no_pickles(Path(source), model.allow_pickles)
    config = read_config(model)
    if Path(source).is_dir():
        _check_headers(Path(source), config, None if qlora or is_deepspeed_zero3_enabled() else dtype)
    try:
        # `_check_weights` reports shapes that differ, with their names.
        outcome: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation=_attention(model, config),
            trust_remote_code=runs_own_code(model), weights_only=True, ignore_mismatched_sizes=True,
            use_safetensors=None if model.allow_pickles else True,
            output_loading_info=True, **options,
        )  # fmt: skip
    except NOT_OF_FILES:
        raise
    except Exception as error:
        raise _unreadable(model.model, source, error) from error
    loaded, report = outcome
    _check_weights(model.model, report)
    if adapter is not None:
        extend_vocabulary(loaded, adapter)
    _check_vocabulary(model.model if adapter is None else f"adapter {adapter}", tokenizer, loaded.config.vocab_size)
    loaded.config.use_cache = False
    return loaded


def _check_headers(folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None) -> None:
    """Before memory is allocated, refuse damaged weight files, and sizes that exceed the files or the memory.

    Args:
        folder: of the model.
        config: its configuration.
        dtype: in which this process will hold all the weights; None if it will not.

    Raises:
        UserError: names the file, or the size.
    """
    files = [file for file in weight_files(folder) if file.suffix == SAFE_SUFFIX]
    tensors = [tensor for file in files for tensor in stored_tensors(file).values()]
    stored = sum(tensor.nbytes for tensor in tensors)
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    needed = 0 if dtype is None else sum(tensor.numel() for tensor in tensors) * dtype.itemsize
    if needed > memory:
        raise UserError(
            f"the weights of {folder} take {gigabytes(needed)} as {str(dtype).removeprefix('torch.')}, and this "
            f"machine has {gigabytes(memory)} of memory",
            "take a smaller model, or see that the files are whole: of those cut off, some systems keep the full size",
        )
    sizes = vars(config.get_text_config())
    width = sizes.get("hidden_size") or 1
    for name in ("vocab_size", "intermediate_size", "hidden_size"):
        rows = sizes.get(name)
        # No weight takes less than a bit.
        if files and isinstance(rows, int) and rows * width > 8 * stored:
            raise UserError(
                f"{folder / 'config.json'}: {name} {rows} and hidden_size {width} take far more than the "
                f"{stored:,} bytes of weights that lie beside it",
                "put the config.json that belongs to these weights beside them",
            )


def read_config(model: ModelArguments) -> PreTrainedConfig:
    """Read the model's configuration, without references to code that is not needed.

    Raises:
        UserError: there is none, it cannot be read, it needs code that may not run, or --attention names a kernel
            whose package is missing, which transformers would otherwise download from a hub.
    """
    if model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("--attention flash_attention_2 needs the package flash-attn", pip_install("flash-attn"))
    source, own_code = locate(model), runs_own_code(model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=own_code)
    except NOT_OF_FILES:
        raise
    except Exception as error:
        raise UserError(
            f"no model can be loaded from {model.model}: {reason_of(error)}",
            "check --model: a folder with config.json and all its weights, or a hub name",
        ) from error
    if not own_code and "auto_map" in vars(config):
        del config.auto_map  # saved with the weights, it would name missing files
    return config


def longest_row(config: PreTrainedConfig) -> int | None:
    """Max tokens of a row that the model has positions for, with scaling; None if unknown."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)  # has another name in some configurations
    if positions is None:
        return None
    scaling = getattr(text, "rope_parameters", None) or {}
    original = scaling.get("original_max_position_embeddings") or positions
    return max(int(positions), int(original * (scaling.get("factor") or 1)))


def _attention(model: ModelArguments, config: PreTrainedConfig) -> str | None:
    """The requested kernel; transformers' choice if the architecture does not support ours."""
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model.attention == PACKED_ATTENTION and (architecture is None or not architecture.is_backend_compatible()):
        return None
    return model.attention


def _check_weights(name: str, report: dict[str, Any]) -> None:
    """Refuse a model with weights that are in none of its files, which would be random."""
    shapes = [(key, *("x".join(map(str, shape)) for shape in both)) for key, *both in report["mismatched_keys"]]
    differing = [f"{key} ({stored} instead of {built})" for key, stored, built in shapes]
    if differing:
        raise UserError(
            f"{name}: {counted(len(differing), 'weight')} of other shapes than config.json says: {_few(differing)}",
            "put the config.json that belongs to these weights beside them",
        )
    missing = report["missing_keys"]
    if missing:
        raise UserError(
            f"{name}: {counted(len(missing), 'weight')} in none of its files: {_few(missing)}",
            "download the checkpoint again, or put the config.json that belongs to these weights beside them",
        )


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for."""
    beyond = [f"{token} ({index})" for token, index in tokenizer.get_vocab().items() if index >= rows]
    cause = ""
    if len(tokenizer) > rows:
        cause = f"the tokenizer of {name} has {len(tokenizer)} tokens, the model's embedding {rows}"
    elif beyond:  # ids may leave gaps
        cause = f"the tokenizer of {name} has ids beyond the {rows} rows of the model's embedding: {_few(beyond)}"
    if cause:
        raise UserError(cause, "use the tokenizer that belongs to the model")


def _unreadable(name: str, source: str, error: Exception) -> UserError:
    """The error for a model that could not be loaded; names the damaged file if there is one."""
    folder = Path(source)
    try:
        for file in weight_files(folder) if folder.is_dir() else []:
            stored_tensors(file)
    except UserError as precise:
        if isinstance(precise.__cause__, pickle.UnpicklingError):  # whose message advises to run the pickle's code
            return UserError(
                f"{file} is damaged or holds more than tensors, and nothing else is read from a pickle",
                "fetch it again, or get the weights as safetensors",
            )
        return precise
    return UserError(
        f"no model can be loaded from {name}: {reason_of(error)}",
        "check --model: a folder with config.json and all its weights, or a hub name",
    )


def _few(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def adapter_base(folder: str) -> str | None:
    """The base that an adapter was trained on; None if the folder is not an adapter.

    Raises:
        UserError: adapter_config.json is damaged or names no base.
    """
    config = Path(folder) / ADAPTER_CONFIG
    if not config.is_file():
        return None
    check_model_folder(Path(folder))
    base: str | None = read_object(config).get("base_model_name_or_path")
    if base is None:
        raise UserError(f"{config} names no base: base_model_name_or_path", "copy the adapter's folder again")
    return base


def _four_bits() -> object:
    if not torch.cuda.is_available():
        raise UserError("--qlora needs a CUDA device", "leave --qlora out, or run on a machine with a GPU")
    try:
        import bitsandbytes  # noqa: F401  to report early that it is missing
    except ImportError as error:
        raise UserError("--qlora needs the package bitsandbytes", pip_install("bitsandbytes")) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )
