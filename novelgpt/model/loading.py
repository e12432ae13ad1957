"""Loading a base or a checkpoint through AutoModel, and the base of an adapter. Code in them only runs if allowed."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_SAFE_NAME
from peft.utils import WEIGHTS_NAME as ADAPTER_NAME
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from novelgpt.model.attention import PACKED_ATTENTION
from novelgpt.model.folder_checks import ADAPTER_CONFIG, check_model_folder
from novelgpt.model.hub import cached_folder, locate, looks_like_path, runs_own_code
from novelgpt.model.weight_files import SAFE_SUFFIX, check_no_pickles, stored_tensors, weight_files
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.remedies import pip_install, python_module
from novelgpt.settings.terminal import counted, gigabytes

# Errors that are not about the files, or are already UserErrors. Anything else that transformers, peft, safetensors and
# torch raise while they read a folder is about its files.
NOT_OF_FILES = (UserError, MemoryError, torch.OutOfMemoryError)
BASE_HELP = "of an adapter: folder or hub name of its base [default: its recorded path, or its copy in the hub's cache]"


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
            "use a smaller model, or check that the files are complete: truncated files keep their full size on some "
            "systems",
        )
    sizes = vars(config.get_text_config())
    width = sizes.get("hidden_size") or 1
    for name in ("vocab_size", "intermediate_size", "hidden_size"):
        rows = sizes.get(name)
        # No weight takes less than a bit.
        if files and isinstance(rows, int) and rows * width > 8 * stored:
            raise UserError(
                f"{folder / 'config.json'}: {name} {rows} and hidden_size {width} take far more than the "
                f"{stored:,} bytes of weights in its folder",
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


def find_base(adapter: str, recorded: str, named: ModelArguments | None = None) -> str:
    """Find the base of an adapter: a folder, or a hub name if the user gives one.

    The content of a folder, which may come from anyone, never triggers a download.

    Args:
        adapter: its folder.
        recorded: the base that its folder names.
        named: the base that the user names.

    Raises:
        UserError: the folder gives a hub name of which this host has no copy, and the user gives none.
    """
    if named is not None:
        return locate(named)
    if Path(recorded).is_dir() or looks_like_path(recorded):  # loading reports it if it is missing
        return recorded
    cached = cached_folder(recorded)
    with contextlib.suppress(UserError):
        if cached is not None and weight_files(Path(cached)):
            return cached
    raise UserError(
        f"adapter {adapter} names its base {recorded}, of which this host has no copy, and nothing is downloaded "
        "because a folder names it",
        f"--base {recorded} downloads it, if you trust that name; --base FOLDER uses a copy of yours",
    )


def extend_vocabulary(model: PreTrainedModel, adapter: Path) -> None:
    """Resize a base to the vocabulary that its adapter was trained with; the adapter holds the values.

    Adapters of other tools may have added tokens or removed unused rows. They hold the complete embedding (and head),
    or each added row (peft's `trainable_token_indices`).

    Args:
        model: the base; unchanged if its embedding has as many rows as the adapter's.
        adapter: folder.

    Raises:
        UserError: the adapter lacks some of the rows that are missing in the base.
    """
    files = [adapter / name for name in (ADAPTER_SAFE_NAME, ADAPTER_NAME) if (adapter / name).is_file()][:1]
    shapes = {name: tensor.shape for file in files for name, tensor in stored_tensors(file).items()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names = {part: name for name, part in model.named_modules()}
    rows = int(embedding.weight.shape[0])
    wanted = _rows_held(shapes, names[embedding], embedding)
    if wanted is None:
        wanted = max({rows - 1, *_added_rows(adapter, names[embedding])}) + 1
    if wanted == rows:
        return
    untied = isinstance(head, nn.Module) and head in names and head.weight is not embedding.weight
    for kind, part in [("embedding", embedding)] + [("head", head)] * untied:
        complete = _rows_held(shapes, names[part], part) == wanted
        if not complete and not set(range(rows, wanted)) <= _added_rows(adapter, names[part]):
            raise UserError(
                f"adapter {adapter} was trained with a vocabulary of {wanted} tokens, its base has {rows}, and the "
                f"adapter holds no rows of the {kind} for the others",
                "take the adapter with its embedding and head (peft: save_embedding_layers=True), or name the extended "
                "base that it was trained on with --base",
            )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _rows_held(shapes: dict[str, torch.Size], name: str, part: Any) -> int | None:
    """Rows of a matrix of which the adapter holds a complete copy; None without one."""
    prefix = f"base_model.model.{name}."
    found = {
        shape[0]
        for key, shape in shapes.items()
        if key.startswith(prefix) and key.endswith("weight") and "lora_" not in key
        and len(shape) == 2 and shape[1] == part.weight.shape[1]
    }  # fmt: skip
    return max(found, default=None)


def _added_rows(adapter: Path, name: str) -> set[int]:
    """Rows of a matrix that the adapter holds individually."""
    indices = read_object(adapter / ADAPTER_CONFIG).get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for part, rows in indices.items() if f".{name}".endswith(f".{part}")), None)
    return {row for row in indices if isinstance(row, int)} if isinstance(indices, list) else set()
