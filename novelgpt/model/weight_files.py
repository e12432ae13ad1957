"""The weight files of a local model or adapter folder, and the tensors in them, without loading a model.

Reading a pickle can run code, so none is read unless the user allows it; then only tensors are read (`weights_only`).
"""

from __future__ import annotations

import json
import pickle
import shlex
from collections import Counter
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_SAFE_NAME
from peft.utils import WEIGHTS_NAME as ADAPTER_NAME
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from novelgpt.model.folder_checks import ADAPTER_CONFIG, CONFIG, read_index
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import python_module

SAFE_SUFFIX = ".safetensors"
# Types of stored weights, as safetensors names them.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def weight_files(folder: Path) -> list[Path]:
    """The files from which `from_pretrained` reads the weights of `folder`, sorted by name.

    Raises:
        UserError: there are none, or the index names one that is missing.
    """
    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index_name).is_file():
            files = [folder / file for file in read_index(folder / index_name)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{folder} lacks {', '.join(missing)}", f"fetch the files that {index_name} names")
            return files
    raise UserError(
        f"{folder} holds no weights", f"name a folder with {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, or their shards"
    )


def check_no_pickles(folder: Path, allowed: bool) -> None:
    """Refuse a folder of a model or an adapter whose weights would be read from pickles.

    Args:
        folder: of the files; hub names pass, as `from_pretrained` chooses their files.
        allowed: whether --allow_pickles was given.

    Raises:
        UserError: there are pickles, and they are not allowed.
    """
    pickles = [] if allowed else pickled_weights(folder)
    if pickles:
        raise UserError(
            f"the weights of {folder} are pickles ({', '.join(pickles)}), and reading a pickle can run code",
            "take its safetensors where there are any; if you trust the source: --allow_pickles, or once and for all "
            f"`{python_module(f'novelgpt.export.to_safetensors {shlex.quote(str(folder))} OUTPUT')}`",
        )


def check_adapter_files(folder: Path, allowed: bool) -> None:
    """Refuse an adapter without weights, for which peft would ask the hub, or with pickles that are not allowed.

    Raises:
        UserError: also if its weights are damaged.
    """
    check_no_pickles(folder, allowed)
    if (folder / ADAPTER_SAFE_NAME).is_file():
        tensors = stored_tensors(folder / ADAPTER_SAFE_NAME)
        integers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
        if integers:
            raise UserError(f"{folder / ADAPTER_SAFE_NAME}: {integers[0]} holds integers", "fetch the file again")
    elif not (folder / ADAPTER_NAME).is_file():
        raise UserError(f"adapter {folder} holds no {ADAPTER_SAFE_NAME}", "copy the adapter's folder again")


def pickled_weights(folder: Path) -> list[str]:
    """The pickle that transformers or peft would read the weights of a folder from: one name, or none."""
    if (folder / ADAPTER_CONFIG).is_file():
        safe, pickles = [ADAPTER_SAFE_NAME], [ADAPTER_NAME]
    else:
        try:  # transformers prefers the file that config.json names; loading reports a damaged configuration
            named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("transformers_weights")
        except (OSError, ValueError, AttributeError):
            named = None
        if named is not None:
            return [] if str(named).endswith((SAFE_SUFFIX, f"{SAFE_SUFFIX}.index.json")) else [str(named)]
        safe, pickles = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME], [WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    if any((folder / name).is_file() for name in safe):
        return []
    return [name for name in pickles if (folder / name).is_file()][:1]


def stored_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .bin file by name, mapped into memory: values are read where they are used.

    Files from before torch 1.6 are read into memory.

    Raises:
        UserError: the file is damaged.
    """
    try:
        if file.suffix == SAFE_SUFFIX:
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not iterable)
        try:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in tensors.items()}
    except (SafetensorError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read: {reason}", "fetch the file again") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point type of most weights in `folder`."""
    values: Counter[torch.dtype] = Counter()
    for tensor in (tensor for file in weight_files(folder) for tensor in stored_tensors(file).values()):
        if tensor.is_floating_point():
            values[tensor.dtype] += tensor.numel()
    return values.most_common(1)[0][0] if values else torch.float32
