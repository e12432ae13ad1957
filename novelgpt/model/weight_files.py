"""The weight files of a local model or adapter folder, and the tensors in them, without loading a model.

Reading a pickle can run code, so none is read unless the user allows it; then only tensors are read (`weights_only`).
"""

from __future__ import annotations

import json
import math
import pickle
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_SAFE_NAME
from peft.utils import WEIGHTS_NAME as ADAPTER_NAME
from pydantic import BaseModel, ConfigDict, Field
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from novelgpt.model.folder_checks import ADAPTER_CONFIG, CONFIG, read_index
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import check_fields, parse_object
from novelgpt.settings.remedies import python_module

SAFE_SUFFIX = ".safetensors"
BLOCK_BYTES = 1 << 22
# Limit of the format.
MAX_HEADER_BYTES = 100_000_000
# Types of stored weights, as safetensors names them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    name: as in the file; dtype: as safetensors names it ("BF16"); shape: its axes; size: bytes of its values;
    read: (first byte, end) of its values -> those bytes, in blocks. Thread-safe.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[int, int], Iterator[memoryview]]

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point values, unlike quantised weights."""
        return self.dtype not in _DTYPES or _DTYPES[self.dtype].is_floating_point


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
        integers = [tensor.name for tensor in stored_tensors(folder / ADAPTER_SAFE_NAME) if not tensor.is_floating]
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


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a .safetensors or .bin file, in the file's order. Their values are not read yet.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return _in_safetensors(file) if file.suffix == ".safetensors" else _in_bin(file)
    except (ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read: {reason}", "fetch the file again") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point type of most weights in `folder`."""
    values: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        for tensor in stored_tensors(file):
            dtype = _DTYPES.get(tensor.dtype)
            if dtype is not None and dtype.is_floating_point:
                values[dtype] += tensor.size // dtype.itemsize
    return values.most_common(1)[0][0] if values else torch.float32


def _in_safetensors(file: Path) -> list[StoredTensor]:
    """Parse the header: its length in 8 bytes, then JSON with the type, shape and offsets of each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        data = file.stat().st_size - 8 - length
        if data < 0 or length > MAX_HEADER_BYTES:
            raise ValueError("it is not a safetensors file")
        header = parse_object(opened.read(length), f"{file}: its header")
    tensors, places = [], []
    for name, given in header.items():
        if name == "__metadata__":
            continue
        entry = check_fields(_Entry, given, f"{file}: {name}")
        begin, end = entry.data_offsets
        if end > data:
            raise ValueError("it ends too early")
        dtype = _DTYPES.get(entry.dtype)
        if begin > end or (dtype is not None and end - begin != math.prod(entry.shape) * dtype.itemsize):
            raise ValueError(f"{name} of shape {list(entry.shape)} in {entry.dtype} does not have {end - begin} bytes")
        read = partial(_read_file, file, 8 + length + begin)
        tensors.append(StoredTensor(name, entry.dtype, tuple(entry.shape), end - begin, read))
        places.append((begin, end))
    ends = [0, *(end for _, end in sorted(places))]
    if [begin for begin, _ in sorted(places)] != ends[:-1] or ends[-1] != data:
        raise ValueError("its tensors do not lie end to end from its header to its end")
    return tensors


class _Entry(BaseModel):
    """A tensor in the header of a safetensors file."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[Annotated[int, Field(ge=0, le=1 << 48)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


def _read_file(file: Path, start: int, begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
    with file.open("rb", buffering=0) as opened:
        opened.seek(start + begin)
        left = end - begin
        while left:
            got = opened.readinto(buffer[: min(left, len(buffer))])
            if not got:
                raise OSError(f"{file} ended while it was read")
            yield buffer[:got]
            left -= got


def _in_bin(file: Path) -> list[StoredTensor]:
    """Through torch, which maps the file into memory; files from before torch 1.6 are read into memory."""
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    stored = []
    for name, tensor in tensors.items():
        values = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
        stored.append(StoredTensor(name, dtype, tuple(tensor.shape), len(values), partial(_read_memory, values)))
    return stored


def _read_memory(values: memoryview, begin: int, end: int) -> Iterator[memoryview]:
    yield values[begin:end]
